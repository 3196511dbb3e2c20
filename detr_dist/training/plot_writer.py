"""The images of a run: plots of every evaluation, and augmented training images with their boxes."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import Sample
from detr_dist.errors import as_one_line
from detr_dist.evaluation.evaluator import Details
from detr_dist.storage import describe_disk_error
from detr_dist.tracking.tracker import Trackers

MAX_SAMPLES = 12
"""Training images on their sheet."""

LOGGED_PLOTS = {"precision_recall", "confusion_matrix", "worst_images"}
"""Plots that are logged as images with steps as well: each costs two uploads."""

_logger = logging.getLogger(__name__)


class PlotWriter:
    """Draws each evaluation of a run on `data`, for the output folder and trackers. Main process only.

    If plots cannot be drawn or uploaded, that is one warning, and training continues.
    """

    def __init__(self, data: CocoData, plots_dir: Path, trackers: Trackers) -> None:
        self._data = data
        self._plots_dir = plots_dir
        self._trackers = trackers
        self._has_warned = False

    def write(self, details: Details, name: str, step: int) -> None:
        """Draw into the folder `name` of the run's plots, and log some of them as images of the step."""
        from detr_dist.evaluation.plots import write_plots  # imports matplotlib, which is slow

        folder = self._plots_dir / name
        failures = write_plots(folder, self._data, details)
        if folder.exists():
            try:
                self._trackers.log_folder(folder, f"pictures/{name}")
                for path in sorted(folder.iterdir()):
                    if path.stem in LOGGED_PLOTS:
                        self._trackers.log_image(path, f"val_{path.stem}", step)
            except Exception as error:  # the run continues
                failures.append(f"{folder}: {describe_disk_error(error, self._plots_dir.parent)}")
        self._warn_of(failures)

    def write_batch(
        self, samples: Callable[[int], list[Sample]], step: int, class_names: Sequence[str]
    ) -> None:
        """Log the first augmented training images from `step` on, with their boxes, as an image."""
        from detr_dist.evaluation.contact_sheet import sample_sheet  # needs matplotlib, which is slow

        try:
            drawn = samples(MAX_SAMPLES)
            if not drawn:  # nothing is left to train
                return
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch, "train_batch.jpg")
                sample_sheet(drawn, class_names).save(path, quality=88)
                self._trackers.log_image(path, path.stem, step)
        except Exception as error:  # the run continues; training itself reports samples that fail
            self._warn_of([f"the training images: {as_one_line(error)}"])

    def _warn_of(self, failures: Sequence[str]) -> None:
        if failures and not self._has_warned:
            self._has_warned = True
            more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
            _logger.warning(
                f"plots could not be drawn ({failures[0]}{more}); training continues, "
                "and this is not reported again"
            )
