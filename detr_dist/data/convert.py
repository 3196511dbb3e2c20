"""`detr-dist convert`: a data set of any format, written as COCO."""

import logging
from collections.abc import Iterable
from pathlib import Path

from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.coco_writing import write_coco
from detr_dist.data.columns import counted
from detr_dist.data.formats import splits_of
from detr_dist.errors import DataError
from detr_dist.storage import check_new, new_folder

_logger = logging.getLogger(__name__)

_FOLDER_OF_SPLIT = {"val": "valid"}  # as in Roboflow's exports


def convert(source: Path, output_dir: Path) -> list[str]:
    """Write a data set as COCO, a folder for each split, and return a line on each of them.

    Raises:
        UsageError: the output folder holds something.
        DataError: the data set cannot be read, training would refuse it, or the disk fails.
    """
    check_new("OUT", output_dir)
    splits = splits_of(source)
    data_of = {
        _FOLDER_OF_SPLIT.get(split.name, split.name) if split.name else "": load_data(split)
        for split in splits
    }
    ids = _category_ids(data_of.values())
    try:
        with new_folder(output_dir, flush=False) as partial:
            for name, data in data_of.items():
                for notice in data.notices:
                    _logger.info(notice)
                write_coco(data, range(len(data)), partial / name, ids)
    except OSError as error:
        raise DataError(f"{error.filename or output_dir}: {error.strerror}; nothing was written") from None
    return [
        f"{output_dir / name}: {counted(len(data), 'image')}, {counted(len(data.box_classes), 'box')}"
        for name, data in data_of.items()
    ]


def _category_ids(splits: Iterable[CocoData]) -> dict[str, int]:
    """Return one category id for each class name of all splits.

    It is that of the files, unless different splits use one id for different names.
    """
    ids: dict[str, int] = {}
    for data in splits:
        for name, id_ in zip(data.class_names, data.category_ids, strict=True):
            assert id_ is not None  # the classes are those of the files
            ids.setdefault(name, id_)
    if len(set(ids.values())) == len(ids):
        return ids
    return {name: id_ for id_, name in enumerate(sorted(ids), start=1)}
