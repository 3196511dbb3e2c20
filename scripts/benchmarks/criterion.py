"""Compare forward and backward time of our criterion with that of the transformers library.

    python scripts/benchmarks/criterion.py [--device cuda] [--threads 2] [--json FILE]

Both alternate in one process. Goal: a quarter of the library's time.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from timing import command_line, median_ratio, medians, publish, take_turns
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from detr_dist.models.criterion import LossSettings, SetCriterion, StepCounts
from detr_dist.models.matcher import ClassKind

NUM_IMAGES, NUM_LAYERS, NUM_QUERIES, NUM_BOXES, NUM_CLASSES = 8, 6, 100, 20, 91


def settings_for(kind: ClassKind) -> LossSettings:
    """Return the published weights of the family; the library's total counts the class loss once in both."""
    return LossSettings(
        kind=kind,
        cost_class=1.0 if kind == "softmax" else 2.0,
        cost_bbox=5.0,
        cost_giou=2.0,
        weights={"ce": 1.0, "bbox": 5.0, "giou": 2.0},
        eos_coef=0.1,
        focal_alpha=0.25,
        num_classes=NUM_CLASSES,
    )


def random_problem(kind: ClassKind, device: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return predictions with gradients, labels and boxes of one batch, the same at every call."""
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
    return SetCriterion(settings)(outputs, labels, boxes, [NUM_BOXES] * NUM_IMAGES, counts).total


def library_loss(settings: LossSettings, outputs: dict[str, Tensor], labels: Tensor, boxes: Tensor) -> Tensor:
    config = SimpleNamespace(
        class_cost=settings.cost_class,
        bbox_cost=settings.cost_bbox,
        giou_cost=settings.cost_giou,
        bbox_loss_coefficient=settings.weights["bbox"],
        giou_loss_coefficient=settings.weights["giou"],
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


def compare(kind: ClassKind, device: str, rounds: int) -> dict[str, Any]:
    """Return median times of both criteria, forward and backward, and the difference of their losses."""
    settings = settings_for(kind)
    outputs, labels, boxes = random_problem(kind, device)
    losses: dict[str, Tensor] = {}

    def run(name: str, criterion: Callable[..., Tensor]) -> None:
        for leaf in outputs.values():
            leaf.grad = None
        loss = criterion(settings, outputs, labels, boxes)
        loss.backward()
        losses[name] = loss.detach()

    ways = {"ours": lambda: run("ours", our_loss), "library": lambda: run("library", library_loss)}
    seconds = take_turns(ways, rounds=rounds, warm_up=5, device=device)
    of_ways = medians(seconds)
    return {
        "classes": kind,
        "ours_ms": 1000 * of_ways["ours"],
        "library_ms": 1000 * of_ways["library"],
        "ratio": median_ratio(seconds, "library", "ours"),
        "loss_differs_by": abs(float(losses["ours"] / losses["library"]) - 1),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds: tuple[ClassKind, ...] = ("softmax", "sigmoid")
    rows = [compare(kind, options.device, options.rounds) for kind in kinds]
    print(
        f"{NUM_IMAGES} images, {NUM_LAYERS} layers, {NUM_QUERIES} queries, {NUM_BOXES} boxes per image, "
        f"{NUM_CLASSES} classes, forward and backward, {options.device}"
    )
    least = min(row["ratio"] for row in rows)
    publish(rows, options.json, device=options.device, goals={"least_ratio": "4"}, least_ratio=least)


if __name__ == "__main__":
    main()
