"""Writing some images of a data set and their boxes in YOLO's format."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from detr_dist.data.coco import CocoData
from detr_dist.data.coco_writing import put_image, target_names
from detr_dist.data.images import folded
from detr_dist.storage import write_text


def write_yolo(data: CocoData, rows: Sequence[int], folder: Path) -> None:
    """Write `images`, `labels` and `data.yaml` into `folder`, which must be empty or absent.

    Images are hard links where the file system allows them, else copies, all in one folder. A name of which
    another image has the stem gets a number. Crowds are left out, because YOLO has none.
    """
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    names = target_names(data)
    taken: set[str] = set()
    for row in rows:
        flat = PurePosixPath(names[row].replace("/", "_"))
        stem, number = flat.stem, 1
        while folded(stem) in taken:  # two images cannot have the same label file
            number += 1
            stem = f"{flat.stem}-{number}"
        taken.add(folded(stem))
        put_image(data, row, folder / "images" / f"{stem}{flat.suffix}")
        (folder / "labels" / f"{stem}.txt").write_text("".join(_lines(data, row)), encoding="utf-8")
    document = {"train": "images", "names": dict(enumerate(data.class_names))}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    write_text(folder / "data.yaml", text)


def _lines(data: CocoData, row: int) -> list[str]:
    boxes, labels = data.training_targets(row)
    height, width = data.size_hw(row)
    return [
        f"{label} {(x + w / 2) / width:.8f} {(y + h / 2) / height:.8f} {w / width:.8f} {h / height:.8f}\n"
        for (x, y, w, h), label in zip(boxes.tolist(), labels.tolist(), strict=True)
    ]
