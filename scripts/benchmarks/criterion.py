"""Time of our criterion, forward and backward, beside that of the transformers library.

    python scripts/benchmarks/criterion.py [--device cuda] [--threads 2] [--json]

Both run alternately in one process, so that whatever else the machine does meets both. Medians after warm-up.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from detr_dist.models.criterion import LossSettings, SetCriterion, StepCounts
from detr_dist.models.matcher import ClassKind

NUM_IMAGES, NUM_LAYERS, NUM_QUERIES, NUM_BOXES, NUM_CLASSES = 8, 6, 100, 20, 91


def settings_for(kind: ClassKind) -> LossSettings:
    """The published weights of the family; the library's total counts the class loss once in both."""
    return LossSettings(
        kind=kind,
        cost_class=1.0 if kind == "softmax" else 2.0,
        cost_bbox=5.0,
        cost_giou=2.0,
        weight_ce=1.0,
        weight_bbox=5.0,
        weight_giou=2.0,
        eos_coef=0.1,
        focal_alpha=0.25,
        num_classes=NUM_CLASSES,
    )


def random_problem(kind: ClassKind, device: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Predictions with gradient, labels and boxes of one batch, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    shape = (NUM_LAYERS, NUM_IMAGES, NUM_QUERIES)
    pred_logits = 4 * rand(*shape, NUM_CLASSES + (kind == "softmax")) - 2
    outputs = {"pred_logits": pred_logits, "pred_boxes": 0.1 + 0.4 * rand(*shape, 4)}
    num_targets = NUM_IMAGES * NUM_BOXES
    labels = torch.randint(NUM_CLASSES, (num_targets,), generator=generator)
    boxes_cxcywh = 0.1 + 0.4 * rand(num_targets, 4)
    leaves = {name: value.to(device).requires_grad_() for name, value in outputs.items()}
    return leaves, labels.to(device), boxes_cxcywh.to(device)


def our_loss(settings: LossSettings, outputs: dict[str, Tensor], labels: Tensor, boxes: Tensor) -> Tensor:
    counts = StepCounts(num_boxes=NUM_IMAGES * NUM_BOXES, num_images=NUM_IMAGES)
    return SetCriterion(settings)(outputs, labels, boxes, [NUM_BOXES] * NUM_IMAGES, counts).loss


def library_loss(settings: LossSettings, outputs: dict[str, Tensor], labels: Tensor, boxes: Tensor) -> Tensor:
    config = SimpleNamespace(
        class_cost=settings.cost_class,
        bbox_cost=settings.cost_bbox,
        giou_cost=settings.cost_giou,
        bbox_loss_coefficient=settings.weight_bbox,
        giou_loss_coefficient=settings.weight_giou,
        eos_coefficient=settings.eos_coef,
        focal_alpha=settings.focal_alpha,
        num_labels=settings.num_classes,
        auxiliary_loss=True,
        decoder_layers=NUM_LAYERS,
    )
    per_image = zip(labels.split(NUM_BOXES), boxes.split(NUM_BOXES), strict=True)
    targets = [
        {"class_labels": image_labels, "boxes": image_boxes} for image_labels, image_boxes in per_image
    ]
    logits, pred_boxes = outputs["pred_logits"], outputs["pred_boxes"]
    published: Any = (
        ForObjectDetectionLoss if settings.kind == "softmax" else DeformableDetrForObjectDetectionLoss
    )
    loss: Tensor = published(logits[-1], targets, labels.device, pred_boxes[-1], config, logits, pred_boxes)[
        0
    ]
    return loss


def time_ms(function: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of one forward and backward pass, and the loss."""
    for leaf in leaves:
        leaf.grad = None
    on_cuda = leaves[0].is_cuda
    if on_cuda:
        torch.cuda.synchronize()
    started_at = time.perf_counter()
    loss = function()
    loss.backward()
    if on_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started_at), float(loss.detach())


def compare(kind: ClassKind, device: str, repeats: int) -> dict[str, Any]:
    """Median times of both criteria and how far their losses lie apart."""
    settings = settings_for(kind)
    outputs, labels, boxes = random_problem(kind, device)
    leaves = list(outputs.values())
    ours, library = [], []
    loss_difference = 0.0
    for repeat in range(repeats + 5):
        our_ms, our_value = time_ms(lambda: our_loss(settings, outputs, labels, boxes), leaves)
        library_ms, library_value = time_ms(lambda: library_loss(settings, outputs, labels, boxes), leaves)
        loss_difference = max(loss_difference, abs(our_value / library_value - 1))
        if repeat >= 5:  # the first calls fill caches and start threads
            ours.append(our_ms)
            library.append(library_ms)
    our_median, library_median = statistics.median(ours), statistics.median(library)
    return {
        "kind": kind,
        "device": device,
        "ours_ms": round(our_median, 3),
        "library_ms": round(library_median, 3),
        "ratio": round(library_median / our_median, 2),
        "relative_loss_difference": loss_difference,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=50, help="timed repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds: tuple[ClassKind, ...] = ("softmax", "sigmoid")
    rows = [compare(kind, args.device, args.repeats) for kind in kinds]
    if args.json:
        print(json.dumps({"torch": torch.__version__, "threads": args.threads, "results": rows}))
        return 0
    print(
        f"{NUM_IMAGES} images, {NUM_LAYERS} layers, {NUM_QUERIES} queries, {NUM_BOXES} boxes per image,",
        end=" ",
    )
    print(f"{NUM_CLASSES} classes, forward and backward, {args.device}, {args.threads} CPU threads")
    print(f"{'classes':<10}{'ours ms':>10}{'library ms':>12}{'ratio':>8}{'loss differs by':>18}")
    for row in rows:
        times = f"{row['ours_ms']:>10.2f}{row['library_ms']:>12.2f}{row['ratio']:>8.2f}"
        print(f"{row['kind']:<10}{times}{row['relative_loss_difference']:>18.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
