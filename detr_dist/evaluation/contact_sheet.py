"""Sheets of images: those with the most errors of an evaluation, and samples of the training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from detr_dist.boxes import cxcywh_to_xyxy
from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import Sample
from detr_dist.evaluation.drawing import (
    Colour,
    Mark,
    class_colour,
    class_label,
    draw_marks,
    drawable,
    font,
)
from detr_dist.evaluation.thresholds import Matches
from detr_dist.serving.decoding import UnreadableImageError, decode_rgb

NUM_TILES, NUM_COLUMNS = 12, 4
TILE_WIDTH, GAP, FONT_PX = 480, 12, 15
LINE = FONT_PX + 6
BACKGROUND = (224, 224, 224)
FALSE_NEGATIVE, MISCLASSIFIED, FALSE_POSITIVE = (230, 20, 20), (170, 60, 255), (255, 150, 0)
DUPLICATE, TRUE_POSITIVE, CROWD = (255, 235, 0), (0, 180, 255), (150, 150, 150)
_SAMPLE = (2.0, 2.0, LINE + LINE // 2 - 2.0, LINE - 2.0)
LEGEND = (
    ("false negative", Mark(_SAMPLE, FALSE_NEGATIVE, dashed=True)),
    ("false positive", Mark(_SAMPLE, FALSE_POSITIVE)),
    ("duplicate", Mark(_SAMPLE, DUPLICATE)),
    ("misclassified, truth → prediction", Mark(_SAMPLE, MISCLASSIFIED)),
    ("true positive", Mark(_SAMPLE, TRUE_POSITIVE, is_thin=True)),
    ("crowd, and what lies in it", Mark(_SAMPLE, CROWD, dashed=True, is_thin=True)),
    ("dashed: truth, solid: prediction", None),
)


def image_errors(data: CocoData, matches: Matches) -> dict[str, NDArray[np.int64]]:
    """Count each kind of error of the confusion matrix in each of N images: [N] by kind.

    Duplicates are apart from the other false positives.
    """
    boxes, detections = matches.boxes, matches.detections
    is_wrong = np.append(data.box_classes, -1)[boxes] != detections.labels
    is_misclassified = is_wrong & (boxes >= 0) & ~matches.in_crowd
    image_rows = {
        "false negatives": data.image_rows[matches.false_negatives],
        "false positives": detections.image_rows[(boxes < 0) & ~matches.is_duplicate],
        "duplicates": detections.image_rows[matches.is_duplicate],
        "misclassified": detections.image_rows[is_misclassified],
    }
    return {kind: np.bincount(rows, minlength=len(data)) for kind, rows in image_rows.items()}


def describe_errors(errors: dict[str, NDArray[np.int64]], row: int | None = None) -> str:
    """Describe the errors in one image, or in all; empty if there are none."""
    counts = {kind: int(each.sum() if row is None else each[row]) for kind, each in errors.items()}
    return ", ".join(f"{kind}: {count:,}" for kind, count in counts.items() if count)


def worst_first(errors: dict[str, NDArray[np.int64]]) -> list[int]:
    """Return the rows of all images, most errors first; equal ones stay in the order of the data set."""
    order: list[int] = np.argsort(-sum(errors.values()), kind="stable").tolist()
    return order


def contact_sheet(data: CocoData, matches: Matches) -> Image.Image:
    """Draw the images with most errors, each with its boxes, file name and errors."""
    errors = image_errors(data, matches)
    rows = worst_first(errors)[:NUM_TILES]
    num_columns = min(NUM_COLUMNS, len(rows))
    shape = np.median(data.sizes_hw[rows, 0] / data.sizes_hw[rows, 1])
    tile_height = round(TILE_WIDTH * float(np.clip(shape, 0.4, 1.3)))
    width = GAP + max(num_columns, 2) * (TILE_WIDTH + GAP)  # at least two columns, for the title
    in_all = describe_errors(errors)
    title = f"{len(rows)} of {len(data):,} images, worst first. In all: {in_all}"
    head = _head(title if in_all else f"No errors in {len(data):,} images", width)
    pitch = tile_height + 2 * LINE + GAP
    sheet = Image.new("RGB", (width, head.height + -(-len(rows) // num_columns) * pitch), "white")
    sheet.paste(head, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        left = GAP + place % num_columns * (TILE_WIDTH + GAP)
        top = head.height + place // num_columns * pitch
        sheet.paste(_tile(data, matches, row, tile_height), (left, top))
        name = drawable(data.image_path(row).name, limit=TILE_WIDTH // FONT_PX + 8)
        for line, text in enumerate((name, describe_errors(errors, row) or "no errors")):
            draw.text((left, top + tile_height + 2 + line * LINE), text, fill="black", font=font(FONT_PX))
    return sheet


def sample_sheet(samples: Sequence[Sample], class_names: Sequence[str]) -> Image.Image:
    """Draw training images as the network gets them, before normalization, with their boxes."""
    tiles = [_sample_tile(sample, class_names) for sample in samples]
    num_columns = min(NUM_COLUMNS, len(tiles))
    pitch = max(tile.height for tile in tiles) + GAP
    size = GAP + num_columns * (TILE_WIDTH + GAP), GAP + -(-len(tiles) // num_columns) * pitch
    sheet = Image.new("RGB", size, "white")
    for place, tile in enumerate(tiles):
        down, right = divmod(place, num_columns)
        sheet.paste(tile, (GAP + right * (TILE_WIDTH + GAP), GAP + down * pitch))
    return sheet


def _sample_tile(sample: Sample, class_names: Sequence[str]) -> Image.Image:
    image = Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())
    height = round(min(1.3, image.height / image.width) * TILE_WIDTH)
    image.thumbnail((TILE_WIDTH, height), Image.Resampling.BILINEAR)
    corners = cxcywh_to_xyxy(sample.boxes_cxcywh).numpy() * (image.size * 2)
    marks = [
        Mark(tuple(box), class_colour(label), class_label(label, class_names[label]), is_thin=True)
        for box, label in zip(corners.tolist(), sample.labels.tolist(), strict=True)
    ]
    draw_marks(image, marks)
    return image


def _head(title: str, width: int) -> Image.Image:
    """Draw the title and under it the legend, in as many lines as the width needs."""
    letters, down = font(FONT_PX), LINE + GAP // 2
    head = Image.new("RGB", (width, 2 * GAP + (1 + len(LEGEND)) * down), "white")
    draw = ImageDraw.Draw(head)
    draw.text((GAP, GAP), title, fill="black", font=letters)
    left, top = GAP, GAP + down
    for text, mark in LEGEND:
        extent = int(letters.getlength(text)) + (2 * LINE if mark else 0) + 2 * GAP
        if left > GAP and left + extent > width:
            left, top = GAP, top + down
        if mark is not None:
            sample = Image.new("RGB", (LINE + LINE // 2, LINE), "white")
            draw_marks(sample, [mark])
            head.paste(sample, (left, top))
        draw.text((left + (2 * LINE if mark else 0), top + 2), text, fill="black", font=letters)
        left += extent
    return head.crop((0, 0, width, top + LINE + GAP))


def _tile(data: CocoData, matches: Matches, row: int, tile_height: int) -> Image.Image:
    tile = Image.new("RGB", (TILE_WIDTH, tile_height), BACKGROUND)
    try:
        pixels = decode_rgb(data.image_path(row), data.exif, data.size_hw(row))
    except UnreadableImageError:
        middle = TILE_WIDTH / 2, tile_height / 2
        ImageDraw.Draw(tile).text(middle, "cannot be read", fill="black", font=font(FONT_PX), anchor="mm")
        return tile
    height, width = data.size_hw(row)
    scale = min(TILE_WIDTH / width, tile_height / height)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BILINEAR)
    draw_marks(image, error_marks(data, matches, row, (size[0] / width, size[1] / height)))
    tile.paste(image, ((TILE_WIDTH - size[0]) // 2, (tile_height - size[1]) // 2))
    return tile


def error_marks(
    data: CocoData, matches: Matches, row: int, scale: tuple[float, float] = (1.0, 1.0)
) -> list[Mark]:
    """Return the boxes and detections of one image, scaled along x and y, errors first."""
    names = [class_label(index, name) for index, name in enumerate(data.class_names)]
    detections = matches.detections

    def truth(box: int, colour: Colour, caption: str = "", *, is_thin: bool = True) -> Mark:
        left, top, width, height = (data.boxes_xywh_px[box] * (*scale, *scale)).tolist()
        corners = left, top, left + width, top + height
        return Mark(corners, colour, caption, dashed=True, is_thin=is_thin)

    def found(detection: int, colour: Colour, caption: str = "") -> Mark:
        left, top, right, bottom = (detections.boxes_xyxy_px[detection] * (*scale, *scale)).tolist()
        return Mark((left, top, right, bottom), colour, caption, is_thin=not caption)

    unmatched = matches.false_negatives[data.image_rows[matches.false_negatives] == row].tolist()
    wrong = [truth(box, FALSE_NEGATIVE, names[data.box_classes[box]], is_thin=False) for box in unmatched]
    right: list[Mark] = []
    for each in np.flatnonzero(detections.image_rows == row).tolist():
        box = int(matches.boxes[each])
        caption = f"{names[detections.labels[each]]} {detections.scores[each]:.2f}"
        if box < 0:
            wrong.append(found(each, DUPLICATE if matches.is_duplicate[each] else FALSE_POSITIVE, caption))
        elif data.iscrowd[box]:
            right.append(found(each, CROWD))
        elif data.box_classes[box] == detections.labels[each]:
            right += [found(each, TRUE_POSITIVE), truth(box, TRUE_POSITIVE)]
        else:
            caption = f"{names[data.box_classes[box]]} → {caption}"
            wrong += [found(each, MISCLASSIFIED, caption), truth(box, MISCLASSIFIED)]
    rows = data.box_rows(row)
    crowds = np.flatnonzero(data.iscrowd[rows]) + rows.start
    return wrong + right + [truth(box, CROWD) for box in crowds.tolist()]
