"""The models of evaluated epochs as MLflow's LoggedModels, which its Models page compares.

The files of an epoch's model are artifacts of the run, `models/epoch_<N>`, and are uploaded once. Its
LoggedModel, named `epoch_<N>`, has the metrics and, at its own location, a model of a few kilobytes that
loads the one in the run: `mlflow.pyfunc.load_model("models:/<model id>")`.
"""

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from detr_dist.tracking.store import is_away, unless_busy

URI_TAG = "model_uri"
"""Tag of a LoggedModel with the URI of its files."""

_LOADER = '''"""Loads the model of an epoch from the artifacts of its run."""

import mlflow.models
import mlflow.pyfunc


def _load_pyfunc(path):
    flavor = mlflow.models.Model.load(path).flavors["python_function"]
    return mlflow.pyfunc.load_model(flavor["model_uri"])
'''
_LOADER_NAME = "load_model_of_run"


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
        """Return the id of an epoch's model, if there is one and the server has LoggedModels at all."""
        try:
            return self._known().get(f"epoch_{epoch}")
        except (MlflowException, NotImplementedError) as error:
            if isinstance(error, MlflowException) and is_away(error):
                raise
            return None

    def _known(self) -> dict[str, str]:
        if self._ids is None:
            self._ids = {model.name: model.model_id for model in self._search()}
        return self._ids

    def find_or_create(self, epoch: int, step: int) -> str:
        """Return the id of an epoch's model."""
        name = f"epoch_{epoch}"
        if name in self._known():
            return self._known()[name]
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
        there = {item.path for item in self._client.list_artifacts(self._run_id, artifact_path)}
        mlmodel = f"{artifact_path}/MLmodel"
        if mlmodel not in there:  # deleted meanwhile
            return
        model_id = self.find_or_create(epoch, step)
        run = self._client.get_run(self._run_id)
        with tempfile.TemporaryDirectory() as scratch:
            store = get_artifact_repository(run.info.artifact_uri, tracking_uri=self._client.tracking_uri)
            facts = Path(store.download_artifacts(mlmodel, scratch))
            store.thread_pool.shutdown()  # the client's own download leaves its thread behind
            folder = Path(scratch, "redirected")
            ids = {"run_id": self._run_id, "model_id": model_id}
            _write_redirected(facts, folder, f"runs:/{self._run_id}/{artifact_path}", ids)
            self._client.log_model_artifacts(model_id, str(folder))
        outputs = run.outputs.model_outputs if run.outputs else ()
        if model_id not in [each.model_id for each in outputs]:
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


def _write_redirected(facts: Path, folder: Path, model_uri: str, ids: Mapping[str, str]) -> None:
    """Write a model with the facts of an `MLmodel` file, which loads the model at `model_uri`."""
    (folder / "code").mkdir(parents=True)
    document = yaml.safe_load(facts.read_text(encoding="utf-8"))
    flavor = {"loader_module": _LOADER_NAME, "code": "code", "data": "MLmodel", "model_uri": model_uri}
    document |= {"flavors": {"python_function": flavor}, **ids}
    document.pop("saved_input_example_info", None)  # the example is in the run
    (folder / "MLmodel").write_text(yaml.safe_dump(document), encoding="utf-8")
    (folder / "code" / f"{_LOADER_NAME}.py").write_text(_LOADER, encoding="utf-8")
