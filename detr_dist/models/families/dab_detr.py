"""DAB-DETR.

Source: Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", 2022, and its code.
"""

from detr_dist.models.families.family import SHAPE_OPTIONS, Family, register_family

FAMILY = Family(
    name="dab_detr",
    model_type="dab-detr",
    loss_kind="sigmoid",
    weights={"ce": 1.0},
    shape_options={**SHAPE_OPTIONS, "hidden_dim": "hidden_size"},
)
register_family(FAMILY)
