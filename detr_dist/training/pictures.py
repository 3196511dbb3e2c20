"""The pictures of an evaluation, for the output folder and MLflow."""

import logging
from pathlib import Path

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.evaluate import Details
from detr_dist.storage import describe_disk_error, new_folder
from detr_dist.tracking.tracker import Tracker

_logger = logging.getLogger(__name__)


def draw_folder(folder: Path, data: CocoData, details: Details) -> list[str]:
    """Draw an evaluation on `data` into a new folder, whatever happens.

    Returns:
        What could not be drawn, with the reason, a line each.
    """
    try:
        from detr_dist.evaluation.plots import draw_pictures  # matplotlib: training begins without it

        with new_folder(folder) as partial:
            failures = draw_pictures(partial, data, details)
    except Exception as error:  # a full disk, or a library's trouble: no reason to lose a run
        return [f"{folder}: {describe_disk_error(error, folder.parent)}"]
    return [f"{folder / failure}" for failure in failures]


class PictureMaker:
    """Draws each evaluation of a run on `data`. Main process only.

    What cannot be drawn or kept is one line on the screen, and training goes on.
    """

    def __init__(
        self,
        data: CocoData,
        pictures_dir: Path,
        tracker: Tracker | None,
    ) -> None:
        self._data = data
        self._pictures_dir = pictures_dir
        self._tracker = tracker
        self._has_warned = False

    def draw(self, details: Details, name: str) -> None:
        """Into the folder `name` of the run's pictures."""
        folder = self._pictures_dir / name
        failures = draw_folder(folder, self._data, details)
        if self._tracker is not None and folder.exists():
            try:
                self._tracker.log_folder(folder, f"pictures/{name}")
            except Exception as error:  # as above
                failures.append(f"{folder}: {describe_disk_error(error, self._pictures_dir.parent)}")
        if failures and not self._has_warned:
            self._has_warned = True
            more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
            _logger.warning(
                f"pictures could not be drawn ({failures[0]}{more}); training goes on, and does not "
                "say so again"
            )
