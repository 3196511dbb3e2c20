"""Writing some images of a data set and their boxes as "CVAT for images 1.1"."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from posixpath import dirname
from xml.sax.saxutils import escape, quoteattr

from detr_dist.data.coco import CocoData
from detr_dist.data.coco_writing import put_image, target_names
from detr_dist.data.images import path_of
from detr_dist.errors import DataError
from detr_dist.storage import write_text

_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters, and bytes of a file's name that are no UTF-8."""


def write_cvat(data: CocoData, rows: Sequence[int], folder: Path) -> None:
    """Write `annotations.xml` and `images` into `folder`, which must be empty or absent.

    Images are hard links where the file system allows them, else copies, and keep their names and
    sub-folders. Crowds are left out, because CVAT has none.

    Raises:
        DataError: XML cannot hold the name of an image or class.
    """
    names, images = target_names(data), folder / "images"
    for name in (*data.class_names, *(names[row] for row in rows)):
        if _NOT_IN_XML.search(name):
            raise DataError(f"{name!a}: CVAT's XML cannot hold this name; rename it, or write another format")
    for row in rows:
        path_of(images, dirname(names[row])).mkdir(parents=True, exist_ok=True)
        put_image(data, row, path_of(images, names[row]))
    write_text(folder / "annotations.xml", "\n".join(_document(data, rows, names)) + "\n")


def _document(data: CocoData, rows: Sequence[int], names: Sequence[str]) -> Iterator[str]:
    yield '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>'
    yield "  <meta>\n    <task>\n      <labels>"
    for name in data.class_names:
        yield f"        <label>\n          <name>{escape(name)}</name>\n        </label>"
    yield "      </labels>\n    </task>\n  </meta>"
    for number, row in enumerate(rows):
        height, width = data.size_hw(row)
        size = f'width="{width}" height="{height}"'
        yield f'  <image id="{number}" name={quoteattr(names[row])} {size}>'
        boxes, labels = data.training_targets(row)
        for (x, y, w, h), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            corners = f'xtl="{x:.3f}" ytl="{y:.3f}" xbr="{x + w:.3f}" ybr="{y + h:.3f}"'
            name = quoteattr(data.class_names[label])
            yield f'    <box label={name} source="manual" occluded="0" {corners} z_order="0"></box>'
        yield "  </image>"
    yield "</annotations>"
