"""MLflow's pages of an experiment: their workspace, a view of the run table, and links that open both.

MLflow's UI documents neither: tags and parameters of links are those that its own pages write and read.
"""

import base64
import hashlib
import json
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from mlflow import MlflowClient

from detr_dist.redaction import redact
from detr_dist.text import one_line, shorten
from detr_dist.tracking.store import EXPERIMENT_KIND, unless_busy
from detr_dist.tracking.uris import is_database, is_file_store, way_to_see

_VIEW_TAG = "mlflow.sharedViewState."
_OWN_KEY = "detr_dist_"

# Where `mlflow ui` serves a local store unless its port is busy.
LOCAL_SERVER = "http://127.0.0.1:5000"

# The most that MLflow 3.10 accepts.
_MAX_TAG_LENGTH = 5000

_logger = logging.getLogger(__name__)


def view_tag(metrics: Sequence[str]) -> tuple[str, str]:
    """Return name and value of the experiment's tag that saves a view of its run table.

    The view shows a column for each metric, and the runs with the highest value of the first one on top. Its
    name depends on the metrics alone. Metrics that do not fit into the tag are left out.
    """
    digest = hashlib.sha256(json.dumps(metrics).encode()).hexdigest()
    for num_columns in range(len(metrics), 0, -1):
        value = _view(metrics[:num_columns])
        if len(value) <= _MAX_TAG_LENGTH:
            break
    return f"{_VIEW_TAG}{_OWN_KEY}{digest[:8]}", value


def _view(metrics: Sequence[str]) -> str:
    """Return the JSON of a view: its state for MLflow 3.10, and the same in an envelope for later ones."""
    columns = [f"metrics.`{name}`" for name in metrics]
    state = {
        "searchFilter": "",
        "orderByKey": columns[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*columns, "attributes.`Duration`", "attributes.`Dataset`"],
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    now_ms = int(time.time() * 1000)
    name = shorten(f"Best {', '.join(metrics)}", 80)
    envelope = {"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": _compressed(state)}
    return json.dumps(state | envelope)


def _compressed(state: Mapping[str, object]) -> str:
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode()))
    return f"deflate;{packed.decode()}"


def prepare_experiment(client: MlflowClient, experiment_id: str, metrics: Sequence[str]) -> str | None:
    """Give an experiment its kind and a view of its run table, unless it has them, and return the view's key.

    Nothing that is there is changed: a person may have chosen it. A refusal is a warning, and gives None.
    """
    name, value = view_tag(metrics)
    tags = {**EXPERIMENT_KIND, name: value}
    for is_second in (False, True):  # another run may set the same tags at the same time
        try:
            there = unless_busy(lambda: client.get_experiment(experiment_id)).tags
            for tag in tags.keys() - there.keys():
                client.set_experiment_tag(experiment_id, tag, tags[tag])
            return name.removeprefix(_VIEW_TAG)
        except Exception as error:  # each kind of store raises its own types
            if is_second:
                _logger.warning(
                    f"the experiment in MLflow gets no view with the metrics of this run "
                    f"({one_line(error)}); all else is logged"
                )
    return None


def newest_view(tags: Mapping[str, str]) -> str | None:
    """Return the key of the newest view among the tags of an experiment, if this package made one."""
    prefix = f"{_VIEW_TAG}{_OWN_KEY}"
    made_at = {
        name: json.loads(value)["createdAt"] for name, value in tags.items() if name.startswith(prefix)
    }
    return max(made_at, key=made_at.__getitem__).removeprefix(_VIEW_TAG) if made_at else None


def run_table_link(server: str, experiment_id: str, view: str | None) -> str:
    """Return the link to the run table of an experiment, with one of its views."""
    shown = {"viewStateShareKey": view} if view is not None else {}
    return _training_link(server, f"experiments/{experiment_id}/runs", shown)


def run_link(server: str, experiment_id: str, run_id: str) -> str:
    """Return the link to the page of a run."""
    return _training_link(server, f"experiments/{experiment_id}/runs/{run_id}", {})


def ways_to_see(uri: str, experiment_id: str | None, run_id: str, view: str | None) -> list[str]:
    """Return lines on how to open a run, and all runs of its experiment; links only if that is known."""
    way = f"see it {way_to_see(uri)}"
    if uri.startswith(("http://", "https://")):
        server = redact(uri)
    elif is_database(uri) or is_file_store(uri):
        server = LOCAL_SERVER
    else:
        return [way]
    if experiment_id is None:
        return [way]
    run, runs = run_link(server, experiment_id, run_id), run_table_link(server, experiment_id, view)
    return [way, f"this run: {run}", f"all runs, best first: {runs}"]


def _training_link(server: str, page: str, parameters: Mapping[str, str]) -> str:
    """Return a link that opens a page in the workspace for training; MLflow's default is that for agents."""
    query = urlencode({**parameters, "workflowType": "machine_learning"})
    return f"{server.rstrip('/')}/#/{page}?{query}"
