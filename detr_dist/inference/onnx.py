"""Export to ONNX, for any number and size of images, with a comparison of the outputs with torch's."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMultiscaleDeformableAttention,
)

from detr_dist.data.sampling import round_up
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.models.families import family_of
from detr_dist.text import one_line

TOLERANCES = {"logits": 1e-3, "pred_boxes": 1e-4}
"""Largest accepted difference to torch. Rounding in float32 stays well below; 1e-4 of an image 1333 pixels
wide is a seventh of a pixel, 1e-3 of a logit at most 0.00025 of a score."""

_PACKAGES = ("onnx", "onnxruntime")
_TRACED_SHAPE = (2, 256, 320)

# Number, height and width of images to compare, all different from the traced ones; odd sizes reveal wrong
# rounding.
_CHECKED_SHAPES = ((1, 224, 224), (3, 288, 199), (2, 193, 352))


def check_onnx_packages() -> None:
    """Check that the packages needed by the other functions are installed.

    Raises:
        UsageError: some are missing; the message names them.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"--onnx needs {' and '.join(missing)}: pip install 'detr_dist[export]'")


def write_onnx(network: PreTrainedModel, path: Path) -> float:
    """Write `network` as ONNX and return the largest difference of its outputs to torch.

    Inputs `pixel_values` float32 [B, 3, H, W], normalised, and `pixel_mask` int64 [B, H, W], 1 on the image
    and 0 on padding; outputs `logits` [B, Q, C] and `pred_boxes` [B, Q, 4], cxcywh in [0, 1]. B may be any,
    H and W all that the family takes. Boxes are fractions of the image, or of H and W for a family that does
    not use the mask.

    Raises:
        DetrDistError: the export fails, or gives different results at other sizes; delete the file.
    """
    traced = _Traced(network).eval()
    try:
        with _shapes_that_follow_the_image(network):
            _export(traced, path)
        differences = _differences(traced, path)
    except Exception as error:  # torch, onnx and onnxruntime raise many types
        reason = one_line(error)
        raise DetrDistError(
            f"--onnx: this {network.config.model_type} cannot be exported for images of any size ({reason}); "
            "export without --onnx"
        ) from error
    for name, tolerance in TOLERANCES.items():
        if not differences[name] <= tolerance:  # also refuses NaN
            raise DetrDistError(
                f"--onnx: {name} of this {network.config.model_type} differ from torch's by "
                f"{differences[name]:.1e}, more than {tolerance:.0e}; export without --onnx"
            )
    return max(differences.values())


class _Traced(nn.Module):
    """A network with tensors as inputs and outputs, as tracing needs it."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        self.uses_mask = family_of(network.config).uses_mask
        self.chooses_proposals = False

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        if not self.uses_mask:
            pixel_values = pixel_values * pixel_mask[:, None]  # an input without use would be left out
        output = self.network(pixel_values=pixel_values, pixel_mask=pixel_mask)
        self.chooses_proposals = output.get("enc_outputs_class") is not None
        return output.logits, output.pred_boxes


def _export(traced: _Traced, path: Path) -> None:
    """Export by tracing.

    The newer exporter (`dynamo=True`) fixes a size of Deformable DETR, and takes half a minute.
    """
    size = {2: "height", 3: "width"}
    torch.onnx.register_custom_op_symbolic(  # type: ignore[attr-defined]
        "aten::_upsample_bicubic2d_aa", _antialiased_resize, 18
    )
    with warnings.catch_warnings(action="ignore"):  # on each traced size, and on its deprecation
        torch.onnx.export(
            traced,
            _images(traced, _TRACED_SHAPE),
            path,
            input_names=["pixel_values", "pixel_mask"],
            output_names=list(TOLERANCES),
            dynamic_axes={
                "pixel_values": {0: "batch", **size},
                "pixel_mask": {0: "batch", 1: "height", 2: "width"},
                **{name: {0: "batch"} for name in TOLERANCES},
            },
            opset_version=family_of(traced.network.config).onnx_opset,
            dynamo=False,
        )


def _antialiased_resize(graph: Any, image: Any, size: Any, *_: Any) -> Any:
    """Return ONNX's node for torch's bicubic resize with antialiasing, which the exporter does not know."""
    ends = [graph.op("Constant", value_t=torch.tensor([end])) for end in (0, 2)]
    images_and_channels = graph.op("Slice", graph.op("Shape", image), *ends)
    sizes = graph.op("Concat", images_and_channels, graph.op("Cast", size, to_i=7), axis_i=0)
    none = graph.op("Constant", value_t=torch.tensor([], dtype=torch.float32))
    how = {"mode_s": "cubic", "cubic_coeff_a_f": -0.5, "antialias_i": 1, "exclude_outside_i": 1}
    return graph.op("Resize", image, none, none, sizes, **how)


@contextlib.contextmanager
def _shapes_that_follow_the_image(network: PreTrainedModel) -> Iterator[None]:
    """Make the sizes of Deformable DETR's feature maps part of the trace.

    The way in which transformers converts them to a tensor would fix the sizes of the traced images.
    """

    def follow(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        shapes = named["spatial_shapes_list"]
        sizes = [torch.stack([torch.as_tensor(size) for size in shape]) for shape in shapes]
        return arguments, named | {"spatial_shapes": torch.stack(sizes)}

    hooks = [
        module.register_forward_pre_hook(follow, with_kwargs=True)
        for module in network.modules()
        if isinstance(module, DeformableDetrMultiscaleDeformableAttention)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _differences(traced: _Traced, path: Path) -> dict[str, float]:
    """Return the largest difference to torch of each output, over images of several numbers and sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised in any case
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    largest = torch.zeros(len(TOLERANCES), dtype=torch.float64)
    for shape in _CHECKED_SHAPES:
        pixel_values, pixel_mask = _images(traced, shape)
        inputs = {"pixel_values": pixel_values.numpy(), "pixel_mask": pixel_mask.numpy()}
        found = [torch.from_numpy(each).double() for each in session.run(list(TOLERANCES), inputs)]
        wanted = [each.double() for each in traced(pixel_values, pixel_mask)]
        if traced.chooses_proposals:
            differences = _differences_of_chosen(wanted, found)
        else:
            differences = torch.stack([(w - f).abs().max() for w, f in zip(wanted, found, strict=True)])
        largest = torch.maximum(largest, differences)  # keeps NaN
    return dict(zip(TOLERANCES, largest.tolist(), strict=True))


def _differences_of_chosen(wanted: list[Tensor], found: list[Tensor]) -> Tensor:
    """Return the largest difference of each output [B, Q, ...] for queries that are proposals of the network.

    Rounding decides between proposals of nearly equal scores, which a network has many of before it has
    learned. So each query is compared with the nearest one, and a quarter of an image's queries may differ.
    """
    nearest = torch.cdist(torch.cat(wanted, -1), torch.cat(found, -1), p=torch.inf).argmin(-1)
    num_compared = math.ceil(0.75 * nearest.shape[1])
    differences = []
    for output, other in zip(wanted, found, strict=True):
        distance = (output - other.take_along_dim(nearest[..., None], 1)).abs().amax(-1)
        differences.append(distance.sort(1).values[:, :num_compared].max())
    return torch.stack(differences)


def _suitable(shape: tuple[int, int, int], network: PreTrainedModel) -> tuple[int, int, int]:
    """Return number, height and width of images with the next larger sides that the network takes."""
    family, (num_images, *sides) = family_of(network.config), shape
    scale = max(1, family.trial_edge // min(_TRACED_SHAPE[1:]))  # for enough proposals
    height, width = (side * scale for side in sides)
    size_hw = (height, height if family.square_only else width)
    return num_images, *round_up(size_hw, family.size_multiple(network.config))


def _images(traced: _Traced, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return noise of a shape that is suitable for the network, and its mask.

    If the network uses the mask, image i is 16 i rows and 24 (i + 1) columns smaller than the batch. For
    others padding would be black pixels: positions with equal scores, of which rounding would choose.
    """
    num_images, height, width = _suitable(shape, traced.network)
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(num_images, 3, height, width, generator=generator)
    pixel_mask = torch.ones(num_images, height, width, dtype=torch.int64)
    for i in range(num_images if traced.uses_mask else 0):
        pixel_mask[i, height - 16 * i :] = 0
        pixel_mask[i, :, width - 24 * (i + 1) :] = 0
    return pixel_values * pixel_mask[:, None], pixel_mask
