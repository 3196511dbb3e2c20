"""The worst images of an evaluation on one sheet, with what is there and what was detected."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from detr_dist.data.coco import CocoData
from detr_dist.data.images import UnreadableImageError, decode_rgb
from detr_dist.evaluation.drawing import Colour, Mark, draw_marks
from detr_dist.evaluation.lettering import class_label, drawable, font
from detr_dist.evaluation.operating_point import Matches

NUM_TILES, NUM_COLUMNS = 12, 4
TILE_WIDTH, GAP, FONT_PX = 480, 12, 15
LINE = FONT_PX + 6
WHITE, BLACK, BACKGROUND = (255, 255, 255), (0, 0, 0), (224, 224, 224)
MISSED, CONFUSED, INVENTED = (230, 20, 20), (170, 60, 255), (255, 150, 0)
RIGHT, CROWD = (0, 180, 255), (150, 150, 150)
LEGEND = (
    ("missed", Mark((0, 0, 0, 0), MISSED, dashed=True)),
    ("invented", Mark((0, 0, 0, 0), INVENTED)),
    ("confused, truth → prediction", Mark((0, 0, 0, 0), CONFUSED)),
    ("right", Mark((0, 0, 0, 0), RIGHT, is_thin=True)),
    ("crowd, and what lies in it", Mark((0, 0, 0, 0), CROWD, dashed=True, is_thin=True)),
    ("dashed: truth, solid: prediction", None),
)


@dataclass(frozen=True)
class ImageErrors:
    """How often the detector was wrong in each of N images."""

    missed: NDArray[np.int64]
    """[N], boxes that no detection found."""
    invented: NDArray[np.int64]
    """[N], detections that found nothing."""
    confused: NDArray[np.int64]
    """[N], detections that found a box of another class."""

    def worst_first(self) -> list[int]:
        """All images, by the sum of their errors, equal ones in the order of the data set."""
        errors = self.missed + self.invented + self.confused
        order: list[int] = np.argsort(-errors, kind="stable").tolist()
        return order

    def of_image(self, row: int) -> str:
        return _counted(int(self.missed[row]), int(self.invented[row]), int(self.confused[row]))

    def of_all(self) -> str:
        return _counted(int(self.missed.sum()), int(self.invented.sum()), int(self.confused.sum()))


def image_errors(data: CocoData, matches: Matches) -> ImageErrors:
    """Those that the confusion matrix counts, by image."""
    boxes, detections = matches.boxes, matches.detections
    is_wrong = np.append(data.box_classes, -1)[boxes] != detections.labels
    is_confused = is_wrong & (boxes >= 0) & ~matches.in_crowd(data)
    return ImageErrors(
        missed=np.bincount(data.image_rows[matches.missed], minlength=len(data)),
        invented=np.bincount(detections.image_rows[boxes < 0], minlength=len(data)),
        confused=np.bincount(detections.image_rows[is_confused], minlength=len(data)),
    )


def contact_sheet(data: CocoData, matches: Matches) -> Image.Image:
    """The images with most errors, each with its boxes, file name and counts."""
    errors = image_errors(data, matches)
    rows = errors.worst_first()[:NUM_TILES]
    num_columns = min(NUM_COLUMNS, len(rows))
    shape = np.median(data.sizes_hw[rows, 0] / data.sizes_hw[rows, 1])
    tile_height = round(TILE_WIDTH * float(np.clip(shape, 0.4, 1.3)))
    width = GAP + max(num_columns, 2) * (TILE_WIDTH + GAP)  # the title needs as much
    head = _head(_title(data, errors, len(rows)), width)
    pitch = tile_height + 2 * LINE + GAP
    sheet = Image.new("RGB", (width, head.height + -(-len(rows) // num_columns) * pitch), WHITE)
    sheet.paste(head, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        left = GAP + place % num_columns * (TILE_WIDTH + GAP)
        top = head.height + place // num_columns * pitch
        sheet.paste(_tile(data, matches, row, tile_height), (left, top))
        name = drawable(data.image_path(row).name, most=TILE_WIDTH // FONT_PX + 8)
        for line, text in enumerate((name, errors.of_image(row) or "no errors")):
            draw.text((left, top + tile_height + 2 + line * LINE), text, fill=BLACK, font=font(FONT_PX))
    return sheet


def _counted(missed: int, invented: int, confused: int) -> str:
    """Empty if there are none."""
    counts = {"missed": missed, "invented": invented, "confused": confused}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _title(data: CocoData, errors: ImageErrors, num_shown: int) -> str:
    of_all = errors.of_all()
    if not of_all:
        return f"No errors in {len(data):,} images"
    return f"{num_shown} of {len(data):,} images, worst first. In all: {of_all}"


def _head(title: str, width: int) -> Image.Image:
    """The title and under it the legend, in as many lines as the width needs."""
    letters = font(FONT_PX)
    places: list[tuple[int, int]] = []
    left, top = GAP, GAP + LINE + GAP // 2
    for text, mark in LEGEND:
        extent = int(letters.getlength(text)) + (2 * LINE if mark else 0) + 2 * GAP
        if left > GAP and left + extent > width:
            left, top = GAP, top + LINE + GAP // 2
        places.append((left, top))
        left += extent
    head = Image.new("RGB", (width, top + LINE + GAP), WHITE)
    draw = ImageDraw.Draw(head)
    draw.text((GAP, GAP), title, fill=BLACK, font=letters)
    for (text, mark), (left, top) in zip(LEGEND, places, strict=True):
        if mark is not None:
            sample = Image.new("RGB", (LINE + LINE // 2, LINE), WHITE)
            edges = 2.0, 2.0, sample.width - 2.0, sample.height - 2.0
            draw_marks(sample, [Mark(edges, mark.colour, dashed=mark.dashed, is_thin=mark.is_thin)])
            head.paste(sample, (left, top))
            left += 2 * LINE
        draw.text((left, top + 2), text, fill=BLACK, font=letters)
    return head


def _tile(data: CocoData, matches: Matches, row: int, tile_height: int) -> Image.Image:
    tile = Image.new("RGB", (TILE_WIDTH, tile_height), BACKGROUND)
    try:
        pixels = decode_rgb(data.image_path(row))
    except UnreadableImageError:
        middle = TILE_WIDTH / 2, tile_height / 2
        ImageDraw.Draw(tile).text(middle, "cannot be read", fill=BLACK, font=font(FONT_PX), anchor="mm")
        return tile
    height, width = data.size_hw(row)
    scale = min(TILE_WIDTH / width, tile_height / height)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BILINEAR)
    draw_marks(picture, _marks(data, matches, row, (size[0] / width, size[1] / height)))
    tile.paste(picture, ((TILE_WIDTH - size[0]) // 2, (tile_height - size[1]) // 2))
    return tile


def _marks(data: CocoData, matches: Matches, row: int, scale: tuple[float, float]) -> list[Mark]:
    """Of one image, errors first."""
    names = [class_label(index, name) for index, name in enumerate(data.class_names)]
    detections = matches.detections

    def truth(box: int, colour: Colour, caption: str = "", *, is_thin: bool = True) -> Mark:
        left, top, width, height = (data.boxes_xywh_px[box] * (*scale, *scale)).tolist()
        corners = left, top, left + width, top + height
        return Mark(corners, colour, caption, dashed=True, is_thin=is_thin)

    def found(detection: int, colour: Colour, caption: str = "") -> Mark:
        left, top, right, bottom = (detections.boxes_xyxy_px[detection] * (*scale, *scale)).tolist()
        return Mark((left, top, right, bottom), colour, caption, is_thin=not caption)

    missed = matches.missed[data.image_rows[matches.missed] == row].tolist()
    wrong = [truth(box, MISSED, names[data.box_classes[box]], is_thin=False) for box in missed]
    right: list[Mark] = []
    for each in np.flatnonzero(detections.image_rows == row).tolist():
        box = int(matches.boxes[each])
        told = f"{names[detections.labels[each]]} {detections.scores[each]:.2f}"
        if box < 0:
            wrong.append(found(each, INVENTED, told))
        elif data.iscrowd[box]:
            right.append(found(each, CROWD))
        elif data.box_classes[box] == detections.labels[each]:
            right += [found(each, RIGHT), truth(box, RIGHT)]
        else:
            told = f"{names[data.box_classes[box]]} → {told}"
            wrong += [found(each, CONFUSED, told), truth(box, CONFUSED)]
    rows = data.box_rows(row)
    crowds = np.flatnonzero(data.iscrowd[rows]) + rows.start
    return wrong + right + [truth(box, CROWD) for box in crowds.tolist()]
