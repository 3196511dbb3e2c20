"""The metrics of an evaluation as tables for a terminal."""

from detr_dist.evaluation.metrics_table import metrics_table

METRICS = {
    "val_map": 0.5,
    "val_map_center": 0.75,
    "val_player_map": 0.875,
    "val_ball_map": 0.125,
    "val_ball_center_map": 0.625,
    "val_ball_map_lt8": 0.0625,
    "val_error_missed_dap": 0.25,
    "val_loss": 2.0,
    "val_own": 3.0,
}


def test_each_metric_is_in_the_line_of_its_class_or_at_the_end() -> None:
    *lines, rest = [line.split() for line in metrics_table(METRICS, ["Player", "ball"], [40, 2], [8])]
    assert len(lines) == 4 * 4
    by_class, small, by_side, errors = (lines[first : first + 4] for first in range(0, 16, 4))
    assert by_class[0] == ["class", "boxes", "AP", "precision", "recall", "f1", "threshold"]
    assert by_class[1] == ["Player", "40", "0.8750", *"----"]
    assert by_class[3] == ["all", "classes", "42", "0.5000", *"----"]
    assert small[2] == ["ball", "2", "-", "0.6250", *"---"]
    assert small[3] == ["all", "classes", "42", "-", "0.7500", *"---"]
    assert by_side[2] == ["ball", "2", "0.0625", "-"]
    assert errors[3] == ["all", "classes", "42", *"-----", "0.2500"]
    assert rest == ["val_loss", "2.0000", "val_own", "3.0000"]


def test_without_bands_there_is_no_table_of_sides() -> None:
    assert not any("side" in line for line in metrics_table(METRICS, ["player", "ball"], [40, 2], []))
