"""The section `data` of the configuration. Imports no torch."""

from typing import Self

from pydantic import Field, model_validator

from detr_dist.config_tiles import TILES_MEANING, TilesOrAuto
from detr_dist.config_types import (
    Augmentation,
    CopyPasteOrNone,
    Count,
    CountOrAuto,
    CountOrZero,
    Edge,
    Edges,
    ExifRule,
    Factor,
    ResizeMode,
    Section,
)


class DataConfig(Section):
    """How images are loaded, resized and augmented."""

    num_workers: CountOrAuto = "auto"
    """Loader processes per training process; `auto`: as many as it has CPU cores, but at most 4; 0 loads in
    the training process itself."""
    prefetch_factor: Count = 4
    """Micro-batches that each loader process prepares in advance."""
    exif: ExifRule = "auto"
    """Rotation of photographs by their EXIF data: `auto` rotates an image whose annotated size fits only
    then; `apply` rotates every image, `ignore` none. `predict` has no annotations: `auto` rotates every
    image there."""
    resize: ResizeMode = "shortest_edge"
    """`shortest_edge` keeps the aspect ratio. `square` gives every image `shortest_edge` x `shortest_edge`
    pixels; `rectangle`, for footage, `shortest_edge` x `longest_edge`, a portrait the other way round. Unset:
    `square` for RT-DETR, D-FINE, DEIMv2, LW-DETR and RF-DETR, which do not see padding."""
    shortest_edge: Edge = 800
    """Pixels of an image's shorter side after the resize."""
    longest_edge: Edge = 1333
    """Upper limit in pixels of an image's longer side after the resize; wins over `shortest_edge`. In a
    `rectangle`, its longer side."""
    multi_scale: Edges = Field([])
    """Values of `shortest_edge` for training, e.g. [480, 512, 544]: every optimizer step draws one, and
    scales `longest_edge` with it. Repeat a value to draw it more often. Empty: always `shortest_edge`."""
    tiles: TilesOrAuto = Field(None, description=TILES_MEANING)
    augmentation: Augmentation = "detr"
    """`none`; `light`: flip and mild colour changes; `detr`: those, random crops and the published
    multi-scale resize; `footage`: those, and after all else `scale_out` (shrunk by up to 1.5), `motion_blur`,
    `sensor_noise`, `gamma` and `jpeg` (quality 40 to 95), each of every fifth image. Or a list, applied in
    this order: one of these recipes, then any of `mosaic` (every second image is made of four), `mixup`
    (every second is blended with another), `photometric` (brightness, contrast, saturation, hue), `zoom_out`
    (every second is shrunk on a black canvas), `iou_crop` (a random window around a box is enlarged), parts
    of `footage` by their names, and transforms of your own by registered name, `package.module.Name` or
    `file.py:Name`."""
    copy_paste: CopyPasteOrNone = None
    """Paste small objects of other images, as {classes: [ball], most: 3}: into each image between 0 and
    `most` objects of these classes, from one other image of the epoch, where they cover no other small
    object and little of a larger one. Unset: nothing is pasted."""
    augmentation_off_epochs: CountOrZero = 0
    """In the last N of `training.num_epochs`, apply only the recipe of `augmentation` and paste nothing:
    images are then like those of validation."""
    repeat_rare: Factor | None = None
    """Repeat images with rare classes within every epoch (repeat-factor sampling, as for LVIS): a class in a
    fraction f of all images, with f below this threshold, makes its images count sqrt(threshold / f) times,
    e.g. 0.001 for LVIS. The classes of an image that is in several count by the rarest. Unset: each image
    counts once."""
    group_by_shape: bool = True
    """Group images of similar height and width, after augmentation, into optimizer steps, because all images
    of a step are padded to the largest. No effect if all images have one size; `false` mixes sizes as in the
    paper."""
    canvas_multiple: Count = 32
    """Round the height and width to which a step's images are padded up to a multiple of this many pixels: a
    GPU plans its work again for each new size. 1 does not round. Without the augmentation `detr`, images of
    one size stay unpadded; so do the fixed sizes of `resize`."""

    @model_validator(mode="after")
    def _edges_in_order(self) -> Self:
        if self.longest_edge < self.shortest_edge and self.resize != "square":
            raise ValueError(f"longest_edge {self.longest_edge} is below shortest_edge {self.shortest_edge}")
        return self
