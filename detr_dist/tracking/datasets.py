"""Data sets as inputs of a run, with the number of boxes and images of each class."""

from typing import Any

import numpy as np

from detr_dist.data.coco import CocoData
from detr_dist.data.columns import counted
from detr_dist.tracking.store import acceptable
from detr_dist.tracking.uris import local_location


def describe_dataset(data: CocoData) -> dict[str, Any]:
    """Return a data set for MLflow: name, short digest, source, profile, and a schema with its classes.

    MLflow's UI shows the profile line by line, and the schema as a table of names and types.
    """
    counts = _counts(data)
    boxes = {name: num_boxes for name, (num_boxes, _) in counts.items()}
    columns = [
        {"name": name, "type": f"{counted(num_boxes, 'box')} in {counted(num_images, 'image')}"}
        for name, (num_boxes, num_images) in counts.items()
    ]
    return {
        "name": acceptable(data.annotations_path.parent.name),
        "digest": data.fingerprint()[:8],
        "source": local_location(data.annotations_path),
        "profile": {
            "num_images": len(data),
            "num_boxes": len(data.box_classes),
            "num_classes": data.num_classes,
            "boxes_per_class": boxes,
        },
        "schema": {"mlflow_colspec": columns},
    }


def summary_of(dataset: dict[str, Any]) -> str:
    """Return one line on a data set from `describe_dataset`."""
    profile = dataset["profile"]
    return (
        f"{dataset['name']} ({dataset['digest']}), {counted(profile['num_images'], 'image')}, "
        f"{counted(profile['num_boxes'], 'box')}"
    )


def _counts(data: CocoData) -> dict[str, tuple[int, int]]:
    """Return the number of boxes, without crowds, and of images with any, by class."""
    own = ~data.iscrowd
    classes, rows = data.box_classes[own], data.image_rows[own]
    pairs = np.unique(classes * len(data) + rows)
    images = np.bincount(pairs // max(len(data), 1), minlength=data.num_classes)
    each = zip(data.class_names, data.boxes_per_class.tolist(), images.tolist(), strict=True)
    return {name: (num_boxes, num_images) for name, num_boxes, num_images in each}
