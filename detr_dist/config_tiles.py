"""The setting `data.tiles` of the configuration. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from detr_dist.config_text import describe_problem
from detr_dist.config_types import Section, Share
from detr_dist.serving.grid import Grid

LEAST_WINDOW_PX = 32


def _are_sides(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(type(side) is int and side >= LEAST_WINDOW_PX for side in sides):
        raise ValueError(f"pixels from {LEAST_WINDOW_PX}, or [height, width], are wanted")
    return value


class Tiles(Section):
    """Windows of images, which are trained on and searched like images."""

    size: Annotated[int | tuple[int, int], BeforeValidator(_are_sides)]
    """pixels a side of the square windows, or [height, width], in the original image"""
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.2
    """least fraction of a window's side that it has in common with its neighbour in the grid"""
    full_image: bool = True
    """use the full image as well, for objects larger than a window; in training, as often as any one window
    of its grid"""
    rare_share: Share = 0.5
    """fraction of the training windows that hold a chosen box: of a class drawn by the inverse of its number
    of boxes; the others are anywhere in the image"""
    min_visible: Share = 0.4
    """train on a box that a window cuts if it shows at least this fraction of the box's area; otherwise what
    it shows of the box is ignored: it counts neither as an object nor as background"""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of a window in pixels, in an image that is as large."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def grid(self) -> Grid:
        """The windows of an image in evaluation and prediction."""
        return Grid(self.size_hw, self.overlap, self.full_image)


def _one_problem(value: Any) -> Any:
    """Report all that is wrong with a mapping in one problem, by its keys."""
    if not isinstance(value, dict):
        if value is None or value == "auto" or isinstance(value, Tiles):
            return value
        raise ValueError("auto, or a mapping such as {size: 640}, is wanted")
    try:
        return Tiles.model_validate(value)
    except ValidationError as error:
        keys = {"data.tiles": list(Tiles.model_fields)}
        problems: list[Any] = [{**each, "loc": ("data.tiles", *each["loc"])} for each in error.errors()]
        lines = "; ".join(describe_problem(each, keys) for each in problems)
        raise PydanticCustomError("of_parts", "{text}", {"text": lines}) from None


TilesOrAuto = Annotated[Tiles | Literal["auto"] | None, BeforeValidator(_one_problem)]

TILES_MEANING = (
    "Train on windows of images instead of images, and search images in windows, so that small objects stay "
    "large enough after the resize: "
    "`auto`, or a mapping with "
    + "; ".join(
        f"`{name}` ({'required' if field.is_required() else field.default}): {field.description}"
        for name, field in Tiles.model_fields.items()
    ).replace("\n", " ")
    + ". `auto` takes the largest windows in which half of the boxes of the smallest class have at least the "
    "stride of the model's finest feature map a side, or none if they do in full images; windows are "
    "enlarged at most twice. The model searches images in the same windows afterwards. Unset: no windows."
)
"""The description of `data.tiles`, with that of its keys."""
