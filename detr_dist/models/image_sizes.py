"""The check that a family's networks take images of the configured sizes."""

from collections.abc import Iterator

from transformers import PreTrainedConfig

from detr_dist.config import DataConfig
from detr_dist.errors import UsageError
from detr_dist.models.families import Family
from detr_dist.resize import Resize


def check_image_sizes(
    data: DataConfig, family: Family, network_config: PreTrainedConfig, *, train: bool
) -> None:
    """Check that a network of this configuration takes the images that `data` describes.

    Raises:
        UsageError: it does not; the message lists the settings to change, with the nearest valid sizes.
    """
    multiple = family.size_multiple(network_config)
    changes = []
    if family.square_only and data.resize != "square":
        changes.append(f"data.resize=square (it is {data.resize})")
    elif multiple > 1 and data.resize == "shortest_edge":
        changes.append("data.resize=square or rectangle (it is shortest_edge)")
    for key, edge in _sides(data, is_square=family.square_only, train=train):
        if edge % multiple:
            below = edge // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
            changes.append(f"{key}={nearest} (it is {edge})")
    if changes:
        images = "square images" if family.square_only else "images"
        sides = f" with sides that are multiples of {multiple}" if multiple > 1 else ""
        raise UsageError(f"{family.name} takes {images}{sides}: set {', '.join(changes)}")


def _sides(data: DataConfig, *, is_square: bool, train: bool) -> Iterator[tuple[str, int]]:
    """Yield each side that images can have after the resize to a fixed size, with the key that sets it."""
    has_two = data.resize == "rectangle" and not is_square
    yield "data.shortest_edge", data.shortest_edge
    if has_two:
        yield "data.longest_edge", data.longest_edge
    for edge in sorted(set(data.multi_scale)) if train else ():
        yield "data.multi_scale", edge
        if has_two:
            yield f"the longer side at data.multi_scale {edge}", Resize.of(data).at(edge).longest_edge
