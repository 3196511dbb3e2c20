"""Kinds of errors and the AP that each costs; docs/evaluation.md.

Source: TIDE, Bolya et al., ECCV 2020, sections 2.2 and 2.3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.coco_metrics import Judged, average_precision, mean_of_known
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.matching import MIN_IOU, best_of_each_image, find_candidates, match_detections
from detr_dist.evaluation.small_objects import by_class

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""The kinds of errors; `missed` are boxes, the others are detections."""
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))
BACKGROUND_IOU = 0.1
"""A detection whose IoU with every box is at most this is one of the background."""


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """The errors of an evaluation by kind, and the AP at IoU 0.5 that each kind costs."""

    detections: DetectionRecords
    """The D detections that count, by descending score."""
    kinds: NDArray[np.int64]
    """[D], the index of each detection's kind in `KINDS`; -1 for a true positive or an ignored one."""
    missed: NDArray[np.int64]
    """Rows of the boxes of the kind `missed`."""
    counts: NDArray[np.int64]
    """[C, K], errors of each class, that of the detection or the box, and kind."""
    dap: NDArray[np.float64]
    """[C, K], the AP at IoU 0.5 that each class gains if one kind is corrected; NaN without boxes."""

    def metrics(self, class_names: Sequence[str]) -> dict[str, float]:
        """Return `error_<kind>_dap`, the mean over the classes, and `<class>_error_<kind>_dap` of each."""
        columns = {f"error_{kind}_dap": each for kind, each in zip(KINDS, self.dap.T, strict=True)}
        means = {name: mean_of_known(each) for name, each in columns.items()}
        values = means | by_class(class_names, columns)
        return {name: value for name, value in values.items() if not np.isnan(value)}


def analyse_errors(data: CocoData, records: DetectionRecords) -> ErrorAnalysis:
    """Determine the kind of every error, and the AP that each kind costs.

    A false positive is of the first kind that applies: the background, localisation (it overlaps a box of its
    class by less than needed), classification (it overlaps a box of another class well), duplicate (its box
    is taken), both (it overlaps a box of another class by less than needed).
    """
    detections = best_of_each_image(data, records)
    matched = match_detections(data, detections, by_class=True)
    kinds, targets = _kinds_of_detections(data, detections, matched)
    is_free = ~data.iscrowd
    is_free[matched[matched >= 0]] = False
    targets = np.where((targets >= 0) & np.append(is_free, False)[targets], targets, -1)
    is_missed = is_free.copy()
    is_missed[targets[targets >= 0]] = False
    missed = np.flatnonzero(is_missed)

    is_fp = matched < 0
    is_tp = (matched >= 0) & ~np.append(data.iscrowd, False)[matched]
    num_truth = np.bincount(data.box_classes[~data.iscrowd], minlength=data.num_classes)
    judged = Judged(detections.labels, is_tp[None], is_fp[None], num_truth)
    ap = average_precision(judged)
    corrected = [average_precision(each) for each in _corrected(data, judged, kinds, targets)]
    num_missed = np.bincount(data.box_classes[missed], minlength=data.num_classes)
    without_missed = average_precision(replace(judged, num_truth=num_truth - num_missed))
    without_missed[(num_missed == num_truth) & (num_truth > 0)] = 1.0
    dap = (np.stack([*corrected, without_missed], axis=1) - ap[:, None]).clip(min=0)  # of rounding
    return ErrorAnalysis(detections, kinds, missed, _counts(data, detections, kinds, missed), dap)


def _kinds_of_detections(
    data: CocoData, detections: DetectionRecords, matched: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the kind of each detection, [D], and the box that it should have matched, [D]; -1 for none."""
    pairs = find_candidates(data, detections, by_class=False, least=BACKGROUND_IOU)
    rows = pairs.rows[pairs.positions]
    counts = (matched[rows] < 0) & ~data.iscrowd[pairs.boxes] & (pairs.closeness > BACKGROUND_IOU)
    rows, boxes, ious = rows[counts], pairs.boxes[counts], pairs.closeness[counts]
    is_same = detections.labels[rows] == data.box_classes[boxes]
    (box_of_class, iou_of_class), (other_box, other_iou) = (
        _closest(len(matched), rows[which], boxes[which], ious[which]) for which in (is_same, ~is_same)
    )
    is_localisation = (iou_of_class > 0) & (iou_of_class < MIN_IOU)
    is_classification = (other_iou >= MIN_IOU) & ~is_localisation
    rules = {
        -1: matched >= 0,
        BACKGROUND: (iou_of_class == 0) & (other_iou == 0),
        LOCALISATION: is_localisation,
        CLASSIFICATION: is_classification,
        DUPLICATE: iou_of_class >= MIN_IOU,
    }
    kinds = np.select(list(rules.values()), list(rules), default=BOTH)
    targets = np.select([is_localisation, is_classification], [box_of_class, other_box], default=-1)
    return kinds, targets


def _closest(
    num_detections: int, rows: NDArray[np.int64], boxes: NDArray[np.int64], ious: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the box with the highest IoU for each detection, the first of equal ones, and its IoU.

    They are -1 and 0 for a detection without pairs.
    """
    order = np.lexsort((-boxes, ious, rows))
    box, iou = np.full(num_detections, -1), np.zeros(num_detections)
    box[rows[order]], iou[rows[order]] = boxes[order], ious[order]  # the last one stays
    return box, iou


def _corrected(
    data: CocoData, judged: Judged, kinds: NDArray[np.int64], targets: NDArray[np.int64]
) -> Iterator[Judged]:
    """Yield the detections after the correction of each kind of false positive alone.

    With the right class or position, the best detection for a free box becomes a true positive. All other
    detections of the kind are removed.
    """
    for kind in (CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND):
        rows = np.flatnonzero(kinds == kind)
        labels, is_tp, is_fp = judged.labels.copy(), judged.is_tp.copy(), judged.is_fp.copy()
        is_fp[:, rows] = False
        boxes, first = np.unique(targets[rows], return_index=True)
        best = rows[first][boxes >= 0]
        labels[best] = data.box_classes[boxes[boxes >= 0]]
        is_tp[:, best] = True
        yield Judged(labels, is_tp, is_fp, judged.num_truth)


def _counts(
    data: CocoData, detections: DetectionRecords, kinds: NDArray[np.int64], missed: NDArray[np.int64]
) -> NDArray[np.int64]:
    is_error = kinds >= 0
    labels = np.concatenate([detections.labels[is_error], data.box_classes[missed]])
    all_kinds = np.concatenate([kinds[is_error], np.full(len(missed), MISSED)])
    cells = np.bincount(labels * len(KINDS) + all_kinds, minlength=data.num_classes * len(KINDS))
    return cells.reshape(data.num_classes, len(KINDS))
