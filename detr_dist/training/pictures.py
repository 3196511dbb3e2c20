"""The pictures of an evaluation, for the output folder and MLflow."""

from collections.abc import Callable
from pathlib import Path

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.evaluate import Details
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.training.durable import failure_on_disk, new_folder


class PictureMaker:
    """Draws each evaluation of a run on `data`. Main process only.

    What cannot be drawn or kept is one line on the screen, and training goes on.
    """

    def __init__(
        self,
        data: CocoData,
        pictures_dir: Path,
        tracker: MLflowTracker | None,
        say: Callable[[str], None],
    ) -> None:
        self._data = data
        self._pictures_dir = pictures_dir
        self._tracker = tracker
        self._say = say

    def draw(self, details: Details, name: str) -> None:
        """Into the folder `name` of the run's pictures."""
        from detr_dist.evaluation.plots import draw_pictures  # matplotlib: training begins without it

        folder = self._pictures_dir / name
        try:
            with new_folder(folder) as partial:
                draw_pictures(partial, self._data, details)
            if self._tracker is not None:
                self._tracker.log_folder(folder, f"pictures/{name}")
        except Exception as error:  # a full disk, or a library's trouble: no reason to lose a run
            self._say(
                f"warning: {folder}: pictures could not be drawn "
                f"({failure_on_disk(error, self._pictures_dir.parent)}); training goes on"
            )
