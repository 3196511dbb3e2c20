"""Tiny data sets, and the configuration of a tiny network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detr_dist.data.coco import CocoData
from detr_dist.extensions import FAMILIES

RESNET_FAMILIES = [name for name in FAMILIES.built_in if name not in ("lw_detr", "rf_detr")]
"""The families that can have a ResNet and images of any proportions."""
TINY_BACKBONE: dict[str, Any] = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
TINY_CONFIG = {
    "data": {"num_workers": 0, "shortest_edge": 64, "longest_edge": 96, "augmentation": "none"},
    "model": {
        "backbone": TINY_BACKBONE,
        "pretrained_backbone": False,
        "hidden_dim": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_queries": 8,
        "config_overrides": {
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    },
    "training": {"batch_size": 4, "num_epochs": 1, "learning_rate": 1e-4, "learning_rate_backbone": 1e-4},
    "evaluation": {"pictures": False},
    "logging": {"log_every_steps": 1, "tensorboard": False},
}

_THREE_SCALES = "model.backbone.out_features=[stage2, stage3, stage4]"
_DENOISING = "model.config_overrides.num_denoising=10"
_SQUARE = "data.resize=square"
# Untrained, and with batch norm that does not learn, the encoders of D-FINE and DEIMv2 score all positions of
# an image alike: measured differences are 1e-6. Rounding, which depends on the size of a micro-batch, would
# then decide which ones become queries. With a query for each of the 64 + 16 + 4 positions of 64 x 64 pixels,
# all do.
_EVERY_POSITION = "model.num_queries=84"
_GROUPS = (
    _SQUARE,
    "model.num_encoder_layers=null",
    "model.config_overrides={decoder_ffn_dim: 32, decoder_self_attention_heads: 2, "
    "decoder_cross_attention_heads: 2, group_detr: 3}",
)
_VIT = (
    "hidden_size: 16, num_hidden_layers: 4, num_attention_heads: 2, image_size: 64, patch_size: 8, "
    "out_features: [stage2, stage3]"
)
_LW_VIT = "model_type: lw_detr_vit, pretrain_image_size: 64, window_block_indices: [0, 2], num_windows: 4"
_DINO_V3 = (
    "model_type: dinov3_vit, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 4, "
    "num_attention_heads: 2, patch_size: 16, out_indices: [1, 2, 3]"
)
_TINY_OF = {
    "detr": (),
    "deformable_detr": (
        _THREE_SCALES,
        "model.config_overrides.two_stage=true",
        "model.config_overrides.with_box_refine=true",
        "model.config_overrides.num_feature_levels=3",
    ),
    "rt_detr": (_THREE_SCALES, _DENOISING),
    "rt_detr_v2": (_THREE_SCALES, _DENOISING),
    "d_fine": (_SQUARE, _THREE_SCALES, _DENOISING, _EVERY_POSITION),
    "deimv2": (_SQUARE, f"model.backbone={{{_DINO_V3}}}", _DENOISING, _EVERY_POSITION),
    "lw_detr": (*_GROUPS, f"model.backbone={{{_VIT}, {_LW_VIT}}}"),
    "rf_detr": (*_GROUPS, f"model.backbone={{{_VIT}, model_type: rf_detr_dinov2, num_windows: 2}}"),
}
TINY_OVERRIDES = {name: (f"model.model_architecture={name}", *own) for name, own in _TINY_OF.items()}
"""Overrides of the tiny configuration for each family, with two stages, denoising or groups of queries."""
TINY_RT_DETR = TINY_OVERRIDES["rt_detr_v2"]


def write_coco(
    folder: Path, *, num_images: int, with_boxes: Callable[[int], int], mixed_sizes: bool, seed: int = 0
) -> None:
    """Write a COCO folder of noise images; image i has `with_boxes(i)` boxes, players and balls in turn."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        height, width = (80, 96) if not mixed_sizes else [(80, 96), (96, 80), (64, 100), (120, 90)][i % 4]
        name = f"{i:03d}.jpg"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": 10 + i, "file_name": name, "height": height, "width": width})
        for j in range(with_boxes(i)):
            x, y, w, h = (float(v) for v in rng.integers(4, 30, 4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + i,
                    "category_id": 1 + j % 2,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 1, "name": "player"}, {"id": 2, "name": "ball"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def ground_truth(data: CocoData) -> dict[str, Any]:
    """Return a data set in COCO's format, for pycocotools, with class indices as category ids.

    Image ids are `image_ranks`: small numbers in the order of the real ids, by which COCO's evaluation ranks
    detections of equal score. Annotations are numbered from 1: pycocotools uses id 0 for "no match".
    """
    ranks = data.image_ranks
    columns = (data.box_classes, data.boxes_xywh_px, data.areas, data.iscrowd.astype(int))
    rows = zip(ranks[data.image_rows].tolist(), *(column.tolist() for column in columns), strict=True)
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [{"id": rank} for rank in ranks.tolist()],
        "annotations": [dict(zip(keys, (i, *row), strict=True)) for i, row in enumerate(rows, start=1)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(data.class_names)],
    }
