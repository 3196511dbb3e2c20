"""Families of detectors: one file each, which defines and registers the family."""

from detr_dist.models.families import (
    conditional_detr,
    dab_detr,
    deformable_detr,
    detr,
    lw_detr,
    rt_detr,
)
from detr_dist.models.families.family import (
    Family,
    decoder_rows,
    family_of,
    find_family,
    num_queries_of,
    register_family,
)

__all__ = [
    "Family",
    "conditional_detr",
    "dab_detr",
    "decoder_rows",
    "deformable_detr",
    "detr",
    "family_of",
    "find_family",
    "lw_detr",
    "num_queries_of",
    "register_family",
    "rt_detr",
]
