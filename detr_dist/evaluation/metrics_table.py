"""The metrics of an evaluation as tables for a terminal, with a line for each class."""

from collections.abc import Iterator, Mapping, Sequence

from detr_dist.evaluation.coco_metrics import METRICS_OF_CLASS, metric_names
from detr_dist.evaluation.error_analysis import KINDS
from detr_dist.evaluation.small_objects import bands


def class_tables(size_bands: Sequence[int]) -> dict[str, dict[str, str]]:
    """Return the metrics of a class in tables, by title, with the headings of their columns."""
    return {
        "class": {"map": "AP", **{name: name for name in METRICS_OF_CLASS[1:]}},
        "small objects": {
            "map_25": "AP 0.25",
            "center_map": "centre AP",
            "recall_p95": "recall_p95",
            "threshold_p95": "thr_p95",
            "calibration_error": "calib.err.",
        },
        "AP by side, px": {f"map_{name}": name for name, _ in bands(size_bands)},
        "AP 0.50 lost to": {f"error_{kind}_dap": kind for kind in KINDS},
    }


def metrics_table(
    metrics: Mapping[str, float],
    class_names: Sequence[str],
    boxes_per_class: Sequence[int],
    size_bands: Sequence[int],
) -> Iterator[str]:
    """Yield tables with a line for each class and one for all, then the other metrics.

    Args:
        metrics: Values by their names in a run, such as `val_ball_map`.
        class_names: Names of the classes.
        boxes_per_class: Number of annotated boxes of each class, without crowds.
        size_bands: The setting `evaluation.size_bands`.
    """
    names = (*class_names, "all classes")
    boxes = (*boxes_per_class, sum(boxes_per_class))
    prefixes = (*(f"val_{key}_" for key in metric_names(class_names)), "val_")
    tables = class_tables(size_bands)
    width, shown = max(map(len, (*names, *tables))), set[str]()
    for title, columns in tables.items():
        if not columns:
            continue
        yield f"{title:<{width}} {'boxes':>9}" + "".join(f"{heading:>15}" for heading in columns.values())
        for name, num_boxes, prefix in zip(names, boxes, prefixes, strict=True):
            keys = [prefix + metric for metric in columns]
            if prefix == "val_":
                keys = ["val_map_center" if key == "val_center_map" else key for key in keys]
            cells = (f"{metrics[key]:>15.4f}" if key in metrics else f"{'-':>15}" for key in keys)
            yield f"{name:<{width}} {num_boxes:>9}{''.join(cells)}"
            shown.update(keys)
    yield "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in shown)
