"""Compare forward and backward time of our criterion with that of the transformers library, for each family.

    python scripts/benchmarks/criterion.py [--device cuda] [--threads 2] [--json FILE] [FAMILY ...]

Both get the tensors that the network of the family's default configuration returns in training, with its
denoising queries, and alternate in one process. Goals: a quarter of the library's time for DETR and
Deformable DETR, a third for the later families. The losses are equal, except those of `d_fine` and `deimv2`,
where the library omits terms and pairs distributions with other layers' boxes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timing import command_line, median_ratio, medians, publish, take_turns
from torch import Tensor
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig
from transformers.loss.loss_utils import LOSS_MAPPING

from detr_dist.models.criterion import SetCriterion, StepCounts
from detr_dist.models.denoising import Denoising, denoising_queries
from detr_dist.models.families import Family, find_family

NUM_IMAGES, NUM_BOXES, NUM_CLASSES = 8, 20, 80
FAMILIES = ("detr", "deformable_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr")
LEAST_RATIO = {"detr": 4.0, "deformable_detr": 4.0}
"""Goals; 3 for the other families."""
OF_THE_LIBRARY = {"deformable_detr": {"ce": 1.0}}
"""Weights in which the library's loss differs from the paper's."""


@dataclass(frozen=True)
class Problem:
    """One batch: what a network of the family returns in training, and the targets."""

    family: Family
    config: PreTrainedConfig
    outputs: dict[str, Tensor]
    """Named like the arguments of the library's loss, with gradients."""
    labels: Tensor
    boxes_cxcywh: Tensor
    denoising: Denoising | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return what the network passes to its loss besides the labels."""
        layer = -1 if self.family.denoising_settings(self.config) is None else (slice(None), -1)
        return {
            "config": self.config,
            "logits": self.outputs["outputs_class"][layer],
            "pred_boxes": self.outputs["outputs_coord"][layer],
            "denoising_meta_values": self._denoising_meta_values(),
            **self.outputs,
        }

    def _denoising_meta_values(self) -> dict[str, Any] | None:
        if self.denoising is None:
            return None
        num_denoising = self.denoising.labels.shape[1]
        positive = self.denoising.query.view(NUM_IMAGES, -1) % num_denoising
        return {
            "dn_positive_idx": tuple(positive),
            "dn_num_group": positive.shape[1] // NUM_BOXES,
            "dn_num_split": [num_denoising, self.config.num_queries],
        }


def random_problem(name: str, device: str) -> Problem:
    """Return a problem of the family's default configuration, the same at every call."""
    family, generator = find_family(name), torch.Generator().manual_seed(0)
    options = {**family.config_defaults, **family.derived({}), "num_labels": NUM_CLASSES}
    config = AutoConfig.for_model(family.model_type, **options, auxiliary_loss=True)
    labels = torch.randint(NUM_CLASSES, (NUM_IMAGES * NUM_BOXES,), generator=generator)
    boxes_cxcywh = 0.1 + 0.4 * torch.rand(NUM_IMAGES * NUM_BOXES, 4, generator=generator)
    settings, denoising = family.denoising_settings(config), None
    if settings is not None:
        rngs = [np.random.default_rng(image) for image in range(NUM_IMAGES)]
        denoising = denoising_queries(settings, labels, boxes_cxcywh, [NUM_BOXES] * NUM_IMAGES, rngs)
        denoising = denoising.to(torch.device(device))

    outputs = {}
    for output, shape in shapes_of(config, 0 if denoising is None else denoising.labels.shape[1]).items():
        values = torch.rand(shape, generator=generator)
        is_box = shape[-1] == 4
        outputs[output] = (0.1 + 0.4 * values if is_box else 4 * values - 2).to(device).requires_grad_()
    return Problem(family, config, outputs, labels.to(device), boxes_cxcywh.to(device), denoising)


def shapes_of(config: PreTrainedConfig, num_denoising: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network's outputs in training, by the names of the loss's arguments."""
    num_layers, num_classes = config.decoder_layers, NUM_CLASSES + (config.model_type == "detr")
    if num_denoising:
        proposals, queries = (NUM_IMAGES, config.num_queries), config.num_queries + num_denoising
        has_edges = hasattr(config, "max_num_bins")
        layers = (NUM_IMAGES, num_layers + has_edges, queries)  # with edges, the first head is one more
        shapes = {"enc_topk_logits": (*proposals, num_classes), "enc_topk_bboxes": (*proposals, 4)}
        if has_edges:
            edges = (NUM_IMAGES, num_layers, queries)
            shapes["predicted_corners"] = (*edges, 4 * (config.max_num_bins + 1))
            shapes["initial_reference_points"] = (*edges, 4)
    else:
        queries = config.num_queries * getattr(config, "group_detr", 1)
        layers, shapes = (num_layers, NUM_IMAGES, queries), {}
        if hasattr(config, "group_detr"):
            shapes["enc_outputs_class"] = (NUM_IMAGES, queries, num_classes)
            shapes["enc_outputs_coord"] = (NUM_IMAGES, queries, 4)
    return {"outputs_class": (*layers, num_classes), "outputs_coord": (*layers, 4), **shapes}


def our_loss(problem: Problem) -> Tensor:
    settings = problem.family.loss_settings(problem.config)
    criterion = SetCriterion(settings, OF_THE_LIBRARY.get(problem.family.name))
    counts = StepCounts(num_boxes=NUM_IMAGES * NUM_BOXES, num_images=NUM_IMAGES)
    return criterion(
        problem.family.rows(**problem.arguments),
        problem.labels,
        problem.boxes_cxcywh,
        [NUM_BOXES] * NUM_IMAGES,
        counts,
        problem.denoising,
    ).total


def library_loss(problem: Problem) -> Tensor:
    network_class = AutoModelForObjectDetection._model_mapping[type(problem.config)]
    per_image = zip(problem.labels.split(NUM_BOXES), problem.boxes_cxcywh.split(NUM_BOXES), strict=True)
    targets = [{"class_labels": labels, "boxes": boxes} for labels, boxes in per_image]
    published: Any = LOSS_MAPPING.get(network_class.__name__, LOSS_MAPPING["ForObjectDetection"])
    arguments = {"labels": targets, "device": problem.labels.device, **problem.arguments}
    loss: Tensor = published(**arguments)[0]
    return loss


def compare(name: str, device: str, rounds: int) -> dict[str, Any]:
    """Return median times of both criteria, forward and backward, and the difference of their losses."""
    problem = random_problem(name, device)
    losses: dict[str, Tensor] = {}

    def run(whose: str, criterion: Callable[[Problem], Tensor]) -> None:
        for output in problem.outputs.values():
            output.grad = None
        loss = criterion(problem)
        loss.backward()
        losses[whose] = loss.detach()

    ways = {"ours": lambda: run("ours", our_loss), "library": lambda: run("library", library_loss)}
    seconds = take_turns(ways, rounds=rounds, warm_up=2, device=device)
    of_ways = medians(seconds)
    return {
        "family": name,
        "queries": problem.config.num_queries,
        "ours_ms": 1000 * of_ways["ours"],
        "library_ms": 1000 * of_ways["library"],
        "ratio": median_ratio(seconds, "library", "ours"),
        "loss_differs_by": abs(float(losses["ours"] / losses["library"]) - 1),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=FAMILIES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [compare(name, options.device, options.rounds) for name in options.families]
    print(
        f"{NUM_IMAGES} images, {NUM_BOXES} boxes per image, {NUM_CLASSES} classes, forward and backward, "
        f"{options.device}"
    )
    reached = min(row["ratio"] / LEAST_RATIO.get(row["family"], 3.0) for row in rows)
    publish(rows, options.json, device=options.device, goals={"of_the_goal": "1"}, of_the_goal=reached)


if __name__ == "__main__":
    main()
