"""DEIMv2.

Source: Huang et al., "Real-Time Object Detection Meets DINOv3", 2025; for the loss Huang et al., "DEIM: DETR
with Improved Matching for Fast Convergence", CVPR 2025; and their code.
"""

from dataclasses import replace

from detr_dist.models.families import d_fine
from detr_dist.models.families.family import register_family

_OPTIONS = {name: option for name, option in d_fine.FAMILY.loss_options.items() if name != "vfl"}
FAMILY = replace(
    d_fine.FAMILY,
    name="deimv2",
    model_type="deimv2",
    config_defaults={"focal_loss_gamma": 1.5},
    loss_options={
        **_OPTIONS,
        "mal": "weight_loss_mal",
        "mal_gamma": "focal_loss_gamma",
        "union": "use_dense_one_to_one",
    },
)
register_family(FAMILY)
