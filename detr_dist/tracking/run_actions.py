"""What is logged to a run besides values: files, images, data sets, models, its note and its status.

Every action may be repeated: a crash or a lost answer must not log anything twice.
"""

import json
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_LOGGED_IMAGES,
    MLFLOW_RUN_NOTE,
)
from PIL import Image

from detr_dist.storage import link_or_copy
from detr_dist.tracking.artifacts import delete_artifacts
from detr_dist.tracking.logged_models import LoggedModels
from detr_dist.tracking.outbox import outdated
from detr_dist.tracking.registry import register_best
from detr_dist.tracking.run_note import is_ours
from detr_dist.tracking.store import acceptable
from detr_dist.tracking.uris import local_path

IMAGES = "images"
"""Folder of the run's artifacts in which MLflow's UI looks for images with steps."""

_PREVIEW_SIZE_PX = 512


class RunActions:
    """Logs to one run. For use by one thread."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._artifact_uri: str | None = None
        self._image_stems: dict[str, str] | None = None  # by key and step; None: ask the server
        self._has_images_tag = False
        self._listed_tables: set[str] = set()
        self.models = LoggedModels(client, run_id)
        self.of_files: dict[str, Callable[..., None]] = {
            "folder": self.upload,
            "image": lambda folder, **facts: self.log_image(*folder.iterdir(), **facts),
            "table": self.log_table,
        }
        """Actions by kind of record, which take a folder of files first."""
        self.others: dict[str, Callable[..., None]] = {
            "dataset": self.log_dataset,
            "model": self.models.complete,
            "note": self._set_note,
            "registration": self._register,
            "retention": self._delete_outdated,
            "resumption": self._note_resumption,
            "status": self._set_status,
        }

    def upload(self, folder: Path, artifact_path: str, last: str | None = None) -> None:
        """Upload file by file, the one named `last` at the end; link files into a store on this host."""
        if self._artifact_uri is None:
            self._artifact_uri = str(self._client.get_run(self._run_id).info.artifact_uri)
        store = local_path(self._artifact_uri)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: (path.name == last, path)):
            target = Path(artifact_path) / path.relative_to(folder)
            if store is not None:
                (store / target).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, store / target)
            else:
                into = str(target.parent) if target.parent != Path() else None
                self._client.log_artifact(self._run_id, str(path), into)

    def log_image(self, source: Path, key: str, step: int, at_ms: int) -> None:
        """Log a file as the image `key` of a step, in place of an earlier one.

        The file names are those of `MlflowClient.log_image`, but the same for each repetition. A PNG file
        stays as it is; a photo becomes WebP, because the UI shows no JPEG here.
        """
        stem = self._stem_of_image(key, step, at_ms)
        with tempfile.TemporaryDirectory() as scratch, Image.open(source) as image:
            if source.suffix == ".png":
                link_or_copy(source, Path(scratch, f"{stem}.png"))
            else:
                image.save(Path(scratch, f"{stem}.webp"), quality=88)
            preview = image.convert("RGB")
            preview.thumbnail((_PREVIEW_SIZE_PX, _PREVIEW_SIZE_PX))
            preview.save(Path(scratch, f"{stem}+compressed.webp"))
            self.upload(Path(scratch), IMAGES)
        if not self._has_images_tag:
            self._client.set_tag(self._run_id, MLFLOW_LOGGED_IMAGES, "True")
            self._has_images_tag = True

    def _stem_of_image(self, key: str, step: int, at_ms: int) -> str:
        """Return the name of an image's files without endings, that of an image which is there already."""
        if self._image_stems is None:
            names = [Path(item.path).stem for item in self._client.list_artifacts(self._run_id, IMAGES)]
            stems = {name.removesuffix("+compressed") for name in names}
            self._image_stems = {_without_time(stem): stem for stem in stems}
        prefix = f"{key}+step+{step}"
        unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._run_id}/{prefix}")
        return self._image_stems.setdefault(prefix, f"{prefix}+timestamp+{at_ms}+{unique}")

    def log_table(self, folder: Path, artifact_file: str) -> None:
        """Upload a table in the format of `mlflow.log_table`, in place of the earlier one."""
        self.upload(folder, "")
        if artifact_file in self._listed_tables:
            return
        listed = json.loads(self._tags().get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": artifact_file, "type": "table"}
        if entry not in listed:
            self._client.set_tag(self._run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))
        self._listed_tables.add(artifact_file)

    def log_dataset(
        self, context: str, name: str, digest: str, source: str, profile: Any, schema: Any = None
    ) -> None:
        """Log a data set as an input of the run; records of earlier versions have no schema."""
        where = json.dumps({"uri": acceptable(source)})
        columns = None if schema is None else json.dumps(schema)
        dataset = Dataset(
            acceptable(name), digest, "local", where, schema=columns, profile=json.dumps(profile)
        )
        self._client.log_inputs(
            self._run_id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])]
        )

    def _delete_outdated(self, parent: str, newest: int, keep: int) -> None:
        there = [item.path for item in self._client.list_artifacts(self._run_id, parent)]
        past = outdated(there, parent, keep=keep, newest=newest)
        for artifact_path in past:
            delete_artifacts(self._client, self._run_id, artifact_path)
        if parent == "models":
            self.models.delete_missing(set(there) - set(past), newest=newest)

    def _register(self, name: str, **facts: Any) -> None:
        epoch = facts.get("epoch")
        model_id = self.models.find(epoch) if epoch is not None else None
        register_best(self._client, name, self._run_id, facts | {"model_id": model_id})

    def _set_note(self, text: str) -> None:
        """Write the note of the run, unless a person has written or changed it."""
        current = self._tags().get(MLFLOW_RUN_NOTE)
        if current is None or is_ours(current):
            self._client.set_tag(self._run_id, MLFLOW_RUN_NOTE, text)

    def _note_resumption(self, step: int, changes: list[str]) -> None:
        tags = self._tags()
        lines = {
            "resumed_at_steps": [str(step)],
            "resumed_with": [f"step {step}: {change}" for change in changes],
        }
        for name, new in lines.items():
            noted = [line for line in tags.get(name, "").split("; ") if line]
            if not set(new) <= set(noted):  # delivered before a crash, but not noted
                self._client.set_tag(self._run_id, name, acceptable("; ".join(noted + new)))
        if "error" in tags:
            self._client.delete_tag(self._run_id, "error")
        self._client.update_run(self._run_id, status="RUNNING")

    def _set_status(self, status: str, error: str | None = None) -> None:
        if error is not None:
            self._client.set_tag(self._run_id, "error", acceptable(error))
        self._client.set_terminated(self._run_id, status)

    def _tags(self) -> Mapping[str, str]:
        tags: Mapping[str, str] = self._client.get_run(self._run_id).data.tags
        return tags


def _without_time(stem: str) -> str:
    """Return key and step of an image from the name of its files."""
    return stem.partition("+timestamp+")[0]
