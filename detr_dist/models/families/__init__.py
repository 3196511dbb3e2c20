"""Families of detectors: one file each, which defines and registers the family."""

from detr_dist.models.families import (
    conditional_detr,
    d_fine,
    dab_detr,
    deformable_detr,
    deimv2,
    detr,
    lw_detr,
    rt_detr,
)
from detr_dist.models.families.family import (
    Family,
    decoder_rows,
    family_of,
    find_family,
    finest_stride_of,
    num_queries_of,
    register_family,
)

__all__ = [
    "Family",
    "conditional_detr",
    "d_fine",
    "dab_detr",
    "decoder_rows",
    "deformable_detr",
    "deimv2",
    "detr",
    "family_of",
    "find_family",
    "finest_stride_of",
    "lw_detr",
    "num_queries_of",
    "register_family",
    "rt_detr",
]
