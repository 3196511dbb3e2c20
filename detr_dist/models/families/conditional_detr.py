"""Conditional DETR.

Source: Meng et al., "Conditional DETR for Fast Training Convergence", 2021, and its code.
"""

from detr_dist.models.families.detr import return_every_layer
from detr_dist.models.families.family import Family, register_family

FAMILY = Family(
    name="conditional_detr",
    model_type="conditional_detr",
    loss_kind="sigmoid",
    weights={"ce": 2.0},
    class_heads=("class_labels_classifier",),
    prepare=return_every_layer,
)
register_family(FAMILY)
