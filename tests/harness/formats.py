"""COCO data written in other formats, as their usual tools write them."""

import os
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import yaml

from detr_dist.data.coco import CocoData


def link_images(data: CocoData, folder: Path, split: str) -> list[str]:
    """Link the images into a folder, and return their names, which begin with the split's."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{split}_{data.image_path(row).name}" for row in range(len(data))]
    for row, name in enumerate(names):
        os.link(data.image_path(row), folder / name)
    return names


def write_yolo(splits: dict[str, CocoData], folder: Path) -> Path:
    """Write `images/<split>`, `labels/<split>` and `data.yaml`; an image without boxes has no label file."""
    for split, data in splits.items():
        labels = folder / "labels" / split
        labels.mkdir(parents=True)
        for row, name in enumerate(link_images(data, folder / "images" / split, split)):
            height, width = data.size_hw(row)
            lines = [
                f"{index} {(x + w / 2) / width!r} {(y + h / 2) / height!r} {w / width!r} {h / height!r}\n"
                for (x, y, w, h), index in boxes_of(data, row)
            ]
            if lines:
                (labels / f"{Path(name).stem}.txt").write_text("".join(lines))
    places = {split: f"images/{split}" for split in splits}
    names = next(iter(splits.values())).class_names
    (folder / "data.yaml").write_text(yaml.safe_dump({**places, "names": [*names], "nc": len(names)}))
    return folder / "data.yaml"


def boxes_of(data: CocoData, row: int) -> list[tuple[list[float], int]]:
    rows = data.box_rows(row)
    return list(zip(data.boxes_xywh_px[rows].tolist(), data.box_classes[rows].tolist(), strict=True))


def write_voc(splits: dict[str, CocoData], folder: Path) -> Path:
    """Write `Annotations`, `JPEGImages` and `ImageSets/Main` with a list for each split."""
    for place in ("Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    for split, data in splits.items():
        stems = []
        for row, name in enumerate(link_images(data, folder / "JPEGImages", split)):
            stem = Path(name).stem
            stems.append(stem)
            (folder / "Annotations" / f"{stem}.xml").write_text(voc_xml(data, row, name))
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return folder


def voc_xml(data: CocoData, row: int, name: str) -> str:
    height, width = data.size_hw(row)
    objects = "".join(
        f"<object><name>{escape(data.class_names[index])}</name><difficult>0</difficult>\n"
        f"<bndbox><xmin>{x!r}</xmin><ymin>{y!r}</ymin><xmax>{x + w!r}</xmax><ymax>{y + h!r}</ymax></bndbox>\n"
        "</object>\n"
        for (x, y, w, h), index in boxes_of(data, row)
    )
    return (
        f"<annotation>\n<filename>{escape(name)}</filename>\n"
        f"<size><width>{width}</width><height>{height}</height></size>\n{objects}</annotation>\n"
    )


def write_cvat(splits: dict[str, CocoData], folder: Path) -> Path:
    """Write `annotations.xml`, with the splits as subsets, and `images`."""
    names = next(iter(splits.values())).class_names
    labels = "".join(f"<label><name>{escape(name)}</name></label>\n" for name in names)
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
        f"<meta><project><labels>\n{labels}</labels></project></meta>\n"
    ]
    for split, data in splits.items():
        for row, name in enumerate(link_images(data, folder / "images", split)):
            height, width = data.size_hw(row)
            parts.append(
                f'<image id="{row}" name={quoteattr(name)} subset="{split.capitalize()}" '
                f'width="{width}" height="{height}">\n'
            )
            parts += [
                f'<box label={quoteattr(data.class_names[index])} source="manual" occluded="0" xtl="{x!r}" '
                f'ytl="{y!r}" xbr="{x + w!r}" ybr="{y + h!r}" z_order="0">\n</box>\n'
                for (x, y, w, h), index in boxes_of(data, row)
            ]
            parts.append("</image>\n")
    (folder / "annotations.xml").write_text("".join([*parts, "</annotations>\n"]), encoding="utf-8")
    return folder / "annotations.xml"


WRITERS = {"yolo": write_yolo, "voc": write_voc, "cvat": write_cvat}


def zipped(folder: Path) -> Path:
    """Return a zip of a folder, with the folder's name before all others as most exporters have it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.rglob("*")):
            file.write(each, each.relative_to(folder.parent))
    return path
