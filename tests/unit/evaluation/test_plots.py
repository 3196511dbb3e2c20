"""The plots of an evaluation show its metrics, and nothing in them is cut off."""

import warnings
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.calibration import calibration_of
from detr_dist.evaluation.coco_metrics import SIZES, compute_coco_metrics
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.error_analysis import KINDS, analyse_errors
from detr_dist.evaluation.evaluator import Details
from detr_dist.evaluation.plots import (
    calibration_figure,
    confusion_figure,
    error_figure,
    f1_figure,
    figure_style,
    precision_recall_figure,
    size_figure,
    write_plots,
)
from detr_dist.evaluation.thresholds import operating_points, pooled
from detr_dist.tracking.tracker import Trackers
from detr_dist.training.plot_writer import PlotWriter

Scene = tuple[CocoData, DetectionRecords]
FILES = ["precision_recall.png", "f1_threshold.png", "confusion_matrix.png", "ap_by_size.png"]
FILES += ["calibration.png", "errors.png", "worst_images.jpg"]


def details(data: CocoData, records: DetectionRecords) -> Details:
    points = operating_points(data, records, "auto")
    return Details(data, records, compute_coco_metrics(data, records), points)


def figures(scene: Scene, *, drawn: bool = False) -> list[Figure]:
    """Return the plots; only after drawing are the positions of texts known."""
    data, found = scene[0], details(*scene)
    points = found.operating_points
    with figure_style():
        made = [
            precision_recall_figure(data.class_names, points.classes),
            f1_figure(data.class_names, points.classes),
            confusion_figure(data.class_names, points.confusion),
            size_figure(data, found.coco),
            calibration_figure(data.class_names, points.classes),
            error_figure(data.class_names, found.errors),
        ]
        for figure in made if drawn else []:
            FigureCanvasAgg(figure).draw()
    return made


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def classes_scene(new_scene, class_names: list[str]) -> Scene:
    """Return boxes of every class and size: true and false positives, false negatives, misclassified."""
    num_classes = len(class_names)
    boxes, detections = [], []
    for label in range(num_classes):
        for image, side in enumerate((20, 60, 200)):
            boxes.append((image, label, (5 * (label % 30), 2 * label, side, side), False))
            left, top, right, bottom = 5 * (label % 30), 2 * label, side, side
            corners = (left + 1, top, left + right, top + bottom)
            other = (label + (label % 5 == image)) % num_classes
            detections.append((image, other, 0.3 + 0.2 * image + label / 400, corners))
        detections.append((0, label, 0.35, (300, 300, 390, 320)))
    return new_scene(3, class_names, boxes, detections)


@pytest.mark.parametrize("name", ["x", "WWW {} a long name with wide letters WWWWWW"], ids=["short", "long"])
@pytest.mark.parametrize("num_classes", [1, 3, 90])
def test_no_text_is_cut_off(num_classes: int, name: str, new_scene) -> None:
    names = [name.format(index) for index in range(num_classes)]
    for figure in figures(classes_scene(new_scene, names), drawn=True):
        width, height = figure.canvas.get_width_height()
        for text in texts(figure):
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.y0 >= 0, text
            assert box.x1 <= width, text
            assert box.y1 <= height, text


@pytest.mark.parametrize("num_classes", [3, 80])
def test_class_labels_do_not_overlap(num_classes: int, new_scene) -> None:
    names = [f"class number {index}" for index in range(num_classes)]
    _, _, confusion, sizes, *_ = figures(classes_scene(new_scene, names), drawn=True)
    for labels in (
        confusion.axes[0].get_yticklabels(),
        confusion.axes[0].get_xticklabels(),
        sizes.axes[1].get_yticklabels(),
    ):
        assert {label.get_text() for label in labels} >= set(names)
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


@pytest.mark.parametrize("num_classes", [1, 80])
def test_the_plots_fit_on_a_screen(num_classes: int, new_scene, tmp_path: Path) -> None:
    data, records = classes_scene(new_scene, [f"class {index}" for index in range(num_classes)])
    assert write_plots(tmp_path / "plots", data, details(data, records)) == []
    for name in FILES:
        with Image.open(tmp_path / "plots" / name) as plot:
            assert plot.size == plot.convert("L").size
            assert 300 <= min(plot.size) <= max(plot.size) <= 2600


def settings() -> dict[str, object]:
    """Return all settings but the backend, which is unset until first use."""
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


def test_matplotlib_settings_are_unchanged(new_scene, tmp_path: Path) -> None:
    data, records = classes_scene(new_scene, ["ball"])
    with matplotlib.rc_context({"font.size": 33, "axes.facecolor": "red"}):
        before = settings()
        write_plots(tmp_path / "plots", data, details(data, records))
        assert settings() == before
    with Image.open(tmp_path / "plots" / FILES[0]) as plot:
        assert (255, 0, 0) not in {colour for _, colour in plot.getcolors(2**24)}  # nor are they used


def test_a_plot_that_fails_does_not_prevent_the_others(
    new_scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_dist.evaluation.plots.confusion_figure", lambda *_: 1 / 0)
    data, records = classes_scene(new_scene, ["ball"])
    (failure,) = write_plots(tmp_path / "plots", data, details(data, records))
    assert failure == f"{tmp_path / 'plots' / 'confusion_matrix.png'}: ZeroDivisionError: division by zero"
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {*FILES} - {"confusion_matrix.png"}


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_drawing_failure_ends_no_run_and_is_reported_once(
    error: type[Exception],
    new_scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error("of a library")

    monkeypatch.setattr("detr_dist.evaluation.plots._save", fail)
    data, records = classes_scene(new_scene, ["ball"])
    writer = PlotWriter(data, tmp_path, Trackers())
    for epoch in (1, 2):
        writer.write(details(data, records), f"epoch_{epoch}", 10 * epoch)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert "of a library" in line


def test_unusual_class_names_are_drawn_unchanged_without_a_warning(new_scene) -> None:
    names = ["$x_1$", "_hidden", "サッカー", "50% {a} \\b", "\ud800\0\u202e", "crowd\nof people"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves, _, confusion, *_ = figures(classes_scene(new_scene, names), drawn=True)
    shown = [label.get_text() for label in confusion.axes[0].get_yticklabels()]
    assert shown == ["$x_1$", "_hidden", "class 2", "50% {a} \\b", "class 4", "crowdof people", "background"]
    legend = [text.get_text() for text in curves.legends[0].get_texts()]
    assert any(text.startswith("_hidden: ") for text in legend)
    assert not any(text.get_parse_math() for text in texts(confusion))


@pytest.mark.parametrize("boxes", [[], [(0, 0, (10, 10, 20, 20), False)]], ids=["no truth", "truth"])
@pytest.mark.parametrize("detections", [[], [(0, 0, 0.9, (10, 10, 30, 30))]], ids=["nothing found", "found"])
def test_plots_are_written_without_boxes_or_detections(boxes, detections, new_scene, tmp_path: Path) -> None:
    scene = new_scene(1, ["player", "ball"], boxes, detections)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_plots(tmp_path / "plots", scene[0], details(*scene))
    shown = [{text.get_text() for text in texts(figure)} for figure in figures(scene)]
    assert [("no boxes to find" in each) for each in shown] == [not boxes] * 6
    assert ("player: no detections" in shown[0]) == (bool(boxes) and not detections)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(FILES)


def test_a_class_without_boxes_is_in_no_curve_and_no_table(scene: Scene) -> None:
    for figure in figures(scene):
        shown = " ".join(text.get_text() for text in texts(figure))
        assert "goal post" in shown
        assert "never seen" not in shown
        assert "crowds only" not in shown


def test_the_best_and_worst_of_many_classes_are_labelled(new_scene) -> None:
    names = [f"class {index}" for index in range(30)]
    data, records = classes_scene(new_scene, names)
    classes = operating_points(data, records, "auto").classes
    order = sorted(range(30), key=lambda label: -classes[label].counts.f1)
    legend = [text.get_text().split(":")[0] for text in figures((data, records))[0].legends[0].get_texts()]
    best, worst = ([names[label] for label in some] for some in (order[:5], order[-5:]))
    assert legend == ["all, at one threshold", *best, "20 classes between", *worst]


def test_the_f1_curve_covers_every_threshold(scene: Scene) -> None:
    data, records = scene
    points = operating_points(data, records, "auto").classes[:3]
    curves = [point.curve for point in points]
    f1 = f1_figure(data.class_names, [*points, None, None]).axes[0]
    drawn = sorted((line.get_xydata() for line in f1.lines if len(line.get_xydata()) > 1), key=len)
    expected = sorted((*curves, pooled(curves)), key=lambda curve: len(curve.thresholds))
    assert [len(xy) for xy in drawn] == [2 * len(curve.thresholds) + 2 for curve in expected]
    for xy, curve in zip(drawn, expected, strict=True):
        for threshold in np.linspace(0.013, 0.987, 30):
            after = np.flatnonzero(xy[:, 0] >= threshold)[-1]  # from 1 down to 0
            assert xy[after, 1] == xy[after + 1, 1] == curve.at(threshold).f1


def test_the_overall_curve_uses_the_sum_of_class_counts(scene: Scene) -> None:
    curves = [point.curve for point in operating_points(*scene, "auto").classes[:3]]
    together = pooled(curves)
    assert together.thresholds.tolist() == sorted({t for curve in curves for t in curve.thresholds})[::-1]
    for threshold in together.thresholds:
        each = [curve.at(threshold) for curve in curves]
        counts = together.at(threshold)
        assert counts.tp == sum(one.tp for one in each)
        assert counts.fp == sum(one.fp for one in each)
        assert counts.fn == sum(one.fn for one in each)


def test_operating_points_lie_where_their_counts_place_them(scene: Scene) -> None:
    points = operating_points(*scene, "auto").classes[:3]
    precision_recall, f1 = (
        figure(scene[0].class_names, [*points, None, None]) for figure in (precision_recall_figure, f1_figure)
    )
    for figure, expected in (
        (precision_recall, {(point.counts.recall, point.counts.precision) for point in points}),
        (f1, {(point.threshold, point.counts.f1) for point in points}),
    ):
        dots = {tuple(line.get_xydata()[0]) for line in figure.axes[0].lines if line.get_marker() == "o"}
        assert dots >= expected
        assert len(dots) == 4  # and all together


def test_the_confusion_matrix_shows_every_count(scene: Scene) -> None:
    confusion = operating_points(*scene, "auto").confusion
    kept = confusion[np.ix_([0, 1, 2, 5], [0, 1, 2, 5])]
    axes = confusion_figure(scene[0].class_names, confusion).axes[0]
    shown = np.zeros_like(kept)
    for text in axes.texts:
        column, row = text.get_position()
        shown[row, column] = int(text.get_text())
    assert np.array_equal(shown, kept)


def test_the_size_plot_shows_ap_and_number_of_boxes(scene: Scene) -> None:
    data, records = scene
    coco = compute_coco_metrics(data, records)
    bars, table = size_figure(data, coco).axes
    limits = ((0, 1024), (1024, 9216), (9216, np.inf))
    for column, (size, (least, most)) in enumerate(zip(SIZES, limits, strict=True)):
        counted = [
            sum(least <= area <= most for area in data.areas[(data.box_classes == label) & ~data.iscrowd])
            for label in range(3)
        ]
        ap = coco.metrics[f"map_{size}"]
        assert bars.texts[column].get_text() == f"{ap:.2f}\n{sum(counted):,} boxes"
        assert bars.patches[column].get_height() == ap
        cells = [text.get_text() for text in table.texts if text.get_position()[0] == column]
        of_classes = zip(coco.ap_by_size[:3, column], counted, strict=True)
        assert cells == [f"{ap:.2f}  ({number})" for ap, number in of_classes if number]


def test_the_calibration_plot_shows_precision_over_score(scene: Scene) -> None:
    classes = operating_points(*scene, "auto").classes
    figure = calibration_figure(scene[0].class_names, classes)
    drawn = [line.get_xydata() for line in figure.axes[0].lines]
    for point in classes[:3]:
        found = calibration_of(point.curve)
        expected = np.stack([found.scores, found.precision], axis=1)
        assert any(np.array_equal(each, expected) for each in drawn)
        captions = [text.get_text().split(": ")[1] for text in figure.legends[0].get_texts()]
        assert f"{found.error:.2f}" in captions


def test_the_error_plot_shows_the_cost_and_number_of_each_kind(scene: Scene) -> None:
    errors = analyse_errors(*scene)
    bars, table = error_figure(scene[0].class_names, errors).axes
    for column in range(len(KINDS)):
        mean, number = float(np.mean(errors.dap[:3, column])), int(errors.counts[:, column].sum())
        assert bars.texts[column].get_text() == f"{mean:.2f}\n{number:,} errors"
        cells = [text.get_text() for text in table.texts if text.get_position()[0] == column]
        of_classes = zip(errors.dap[:3, column], errors.counts[:3, column], strict=True)
        assert cells == [f"{dap:.2f}  ({count})" for dap, count in of_classes]
