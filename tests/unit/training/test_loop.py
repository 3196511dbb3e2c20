"""The progress of a run: its best evaluation, and whether it is over."""

from dataclasses import replace

import pytest

from detr_dist.training.loop import Training, TrainState


def test_the_best_evaluation_is_kept_and_later_ones_are_counted() -> None:
    state = TrainState()
    found = []
    for step, val_map in ((10, 0.0), (20, 0.3), (30, 0.3), (40, 0.1), (50, 0.31), (60, 0.2)):
        state.step = step
        is_best = state.evaluated({"val_map": val_map, "val_ball_map": 0.5})
        found.append((is_best, state.best_map, state.best_step, state.evaluations_since_best))
    assert found == [
        (True, 0.0, 10, 0),  # the first is the best so far, whatever it is
        (True, 0.3, 20, 0),
        (False, 0.3, 20, 1),  # equal is not better
        (False, 0.3, 20, 2),
        (True, 0.31, 50, 0),
        (False, 0.31, 50, 1),
    ]
    assert state.metrics == {"val_map": 0.2, "val_ball_map": 0.5}


def test_on_other_data_the_best_is_reset_and_the_progress_kept() -> None:
    state = TrainState(20, 20, best_map=0.9, best_step=10, evaluations_since_best=3, metrics={"val_map": 0.5})
    reset = state.without_best()
    assert reset == TrainState(20, 20, metrics={"val_map": 0.5})
    assert reset.evaluated({"val_map": 0.1})
    assert state.best_map == 0.9


def test_an_evaluation_without_a_map_counts_as_zero() -> None:
    state = TrainState(step=10)
    assert state.evaluated({})
    assert (state.best_map, state.best_step) == (0.0, 10)
    assert not state.evaluated({})


@pytest.mark.parametrize(
    ("step", "closed_step", "over"), [(19, 10, False), (20, 10, False), (20, 20, True), (25, 25, True)]
)
def test_a_run_is_over_when_its_last_epoch_is_closed(
    training: Training, step: int, closed_step: int, over: bool
) -> None:
    assert training.is_over(TrainState(step, closed_step)) is over


@pytest.mark.parametrize(
    ("patience", "evaluations", "over"), [(0, 100, False), (3, 2, False), (3, 3, True), (3, 4, True)]
)
def test_a_run_is_over_when_its_patience_is_exhausted(
    training: Training, patience: int, evaluations: int, over: bool
) -> None:
    state = TrainState(10, 10, evaluations_since_best=evaluations)
    assert replace(training, patience=patience).is_over(state) is over
