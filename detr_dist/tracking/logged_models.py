"""The models of evaluated epochs as MLflow's LoggedModels, which its Models page compares.

The files of an epoch's model are artifacts of the run, `models/epoch_<N>`, and are uploaded once. Its
LoggedModel, named `epoch_<N>`, has the metrics and, at its own location, a model of a few kilobytes that
loads the one in the run: `mlflow.pyfunc.load_model("models:/<model id>")`.
"""

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException

from detr_dist.tracking.store import is_away, unless_busy

URI_TAG = "model_uri"
"""Tag of a LoggedModel with the URI of its files."""

_LOADER = '''"""Loads the model of an epoch from the artifacts of its run."""

from pathlib import Path

import mlflow.pyfunc


def _load_pyfunc(path):
    return mlflow.pyfunc.load_model(Path(path).read_text(encoding="utf-8"))
'''
_LOADER_NAME, _URI_FILE = "load_model_of_run", "model_uri.txt"

_SMALL_FILES = {"MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml"}


class LoggedModels:
    """The LoggedModels of one run, by the number of their epoch. Only one process may create them."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._ids: dict[str, str] | None = None  # by name; None: ask the server

    def forget(self) -> None:
        """Ask the server again, after an answer may have been lost."""
        self._ids = None

    def find(self, epoch: int) -> str | None:
        """Return the id of an epoch's model, if there is one."""
        return self._known().get(f"epoch_{epoch}")

    def _known(self) -> dict[str, str]:
        if self._ids is None:
            self._ids = {model.name: model.model_id for model in self._search()}
        return self._ids

    def find_or_create(self, epoch: int, step: int) -> str:
        """Return the id of an epoch's model."""
        found = self.find(epoch)
        if found is not None:
            return found
        name = f"epoch_{epoch}"
        created = unless_busy(
            lambda: self._client.create_logged_model(
                self._experiment_id(),
                name=name,
                source_run_id=self._run_id,
                tags={URI_TAG: f"runs:/{self._run_id}/models/{name}"},
                params={"epoch": str(epoch), "step": str(step)},
            )
        )
        self._known()[name] = str(created.model_id)
        return str(created.model_id)

    def complete(self, epoch: int, step: int) -> None:
        """Mark an epoch's model as ready, and as an output of the run, once its files are in the run."""
        artifact_path = f"models/epoch_{epoch}"
        there = {PurePosixPath(item.path).name for item in self._list(artifact_path)}
        if "MLmodel" not in there:  # deleted meanwhile
            return
        model_id = self.find_or_create(epoch, step)
        with tempfile.TemporaryDirectory() as scratch:
            files = [
                self._client.download_artifacts(self._run_id, f"{artifact_path}/{name}", scratch)
                for name in sorted(there & _SMALL_FILES)
            ]
            folder = Path(scratch, "redirected")
            _write_redirected([Path(file) for file in files], folder, self._run_id, epoch, model_id)
            self._client.log_model_artifacts(model_id, str(folder))
        outputs = self._client.get_run(self._run_id).outputs
        if model_id not in [each.model_id for each in (outputs.model_outputs if outputs else ())]:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])
        self._client.finalize_logged_model(model_id, "READY")

    def delete_missing(self, kept: Collection[str], *, newest: int | None = None) -> None:
        """Delete the models of epochs up to `newest` whose artifact path is not among `kept`.

        A server that does not have LoggedModels has none to delete.
        """
        try:
            for name, model_id in list(self._known().items()):
                match = re.fullmatch(r"epoch_(\d+)", name)
                if match and f"models/{name}" not in kept and (newest is None or int(match[1]) <= newest):
                    self._client.delete_logged_model(model_id)
                    del self._known()[name]
        except (MlflowException, NotImplementedError) as error:
            if isinstance(error, MlflowException) and is_away(error):
                raise

    def _list(self, artifact_path: str) -> list[Any]:
        return list(self._client.list_artifacts(self._run_id, artifact_path))

    def _experiment_id(self) -> str:
        return str(self._client.get_run(self._run_id).info.experiment_id)

    def _search(self) -> Iterator[LoggedModel]:
        experiment_ids, page = [self._experiment_id()], None
        while page is None or page:
            models = self._client.search_logged_models(
                experiment_ids, filter_string=f"source_run_id = '{self._run_id}'", page_token=page
            )
            yield from models
            page = models.token or ""


def _write_redirected(files: Sequence[Path], folder: Path, run_id: str, epoch: int, model_id: str) -> None:
    """Write a model with the facts of the one with these small files, which loads that one from its run."""
    (folder / "code").mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    document = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    own = document["flavors"].get("python_function", {})
    kept = {key: own[key] for key in ("env", "python_version") if key in own}
    flavor = kept | {"loader_module": _LOADER_NAME, "code": "code", "data": _URI_FILE}
    document |= {"flavors": {"python_function": flavor}, "run_id": run_id, "model_id": model_id}
    document.pop("saved_input_example_info", None)  # the example is in the run
    (folder / "MLmodel").write_text(yaml.safe_dump(document), encoding="utf-8")
    (folder / _URI_FILE).write_text(f"runs:/{run_id}/models/epoch_{epoch}", encoding="utf-8")
    (folder / "code" / f"{_LOADER_NAME}.py").write_text(_LOADER, encoding="utf-8")
