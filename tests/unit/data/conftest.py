"""Small COCO data sets on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

Document = dict[str, Any]
WriteCoco = Callable[..., Path]


def document() -> Document:
    """Return three images of 60x40: two boxes, one box, none. Category ids are not contiguous."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in (7, 3, 5)],
        "annotations": [
            {"id": 11, "image_id": 3, "category_id": 20, "bbox": [10, 5, 20, 30], "area": 500, "iscrowd": 0},
            {"id": 12, "image_id": 7, "category_id": 10, "bbox": [0, 0, 6.5, 8]},
            {"id": 13, "image_id": 3, "category_id": 10, "bbox": [30, 20, 30, 20], "area": 600},
        ],
        "categories": [
            {"id": 20, "name": "player", "supercategory": "none"},
            {"id": 10, "name": "ball", "supercategory": "none"},
        ],
    }


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Use one thread like a loader process: for images this small, more threads are slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(name="document")
def document_fixture() -> Document:
    return document()


@pytest.fixture
def write_coco(tmp_path: Path) -> WriteCoco:
    """Return a function that writes a document and, by default, images of the sizes in it."""

    def write(document: Document, name: str = "train", *, with_images: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "_annotations.coco.json").write_text(json.dumps(document))
        for image in document["images"] if with_images else []:
            path = folder / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = np.random.default_rng(image["id"]).integers(0, 256, (4, 6, 3), dtype=np.uint8)
            size = image.get("width", 60), image.get("height", 40)
            Image.fromarray(colours).resize(size).save(path)
        return folder

    return write
