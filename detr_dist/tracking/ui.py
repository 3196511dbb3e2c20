"""Opens MLflow's pages: finds the tracking store and a free port, then becomes `mlflow ui`.

`scripts/start_mlflow_ui.sh` runs this file and documents the order in which it looks for the store.
"""

import argparse
import errno
import http.client
import os
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from detr_dist.config import load_config
from detr_dist.console import make_robust
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.redaction import redact
from detr_dist.tracking.uris import client_uri, is_file_store, store_path

_NUM_PORTS_TO_TRY = 100

# Seconds that a server may take to answer.
_TIMEOUT_S = 5


def main() -> None:
    """Find the store, then replace this process by `mlflow ui`."""
    make_robust()
    parser = argparse.ArgumentParser(
        prog="start_mlflow_ui.sh",
        usage="%(prog)s [TRACKING_URI] [--config FILE] [--port N] [option of `mlflow ui` ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--backend-store-uri", dest="uri", metavar="TRACKING_URI", help="the same as the first"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="open what this configuration tracks to")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: %(default)s)")
    parser.add_argument(
        "-p", "--port", type=int, default=5000, help="or the next free one (default: %(default)s)"
    )
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--backend-store-uri")
    known, others = parser.parse_known_args(arguments)
    try:
        uri = find_tracking_uri(known.uri, known.config)
        if uri.startswith(("http://", "https://")):
            address = newest_page(uri, server_address(uri))
            print(f"{redact(uri)} is a server with pages of its own: open {address} in a browser")
        else:
            serve(uri, known.host, known.port, others)
    except DetrDistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def find_tracking_uri(uri: str | None, config_path: Path | None) -> str:
    """Return the requested store, or else the one in the current folder.

    Raises:
        UsageError: there is none.
    """
    source = "tracking URI"
    if uri is None and config_path is not None:
        uri, source = load_config(config_path).logging.mlflow_tracking_uri, f"{config_path}: tracking URI"
    elif uri is None:
        uri, source = os.environ.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI"
    if uri and not _is_there(uri):
        raise UsageError(
            f"{source} {uri}: no runs of MLflow in {store_path(uri)}; run this where you trained, or give "
            "the tracking URI that the training printed"
        )
    for each in (uri, _uri_of_this_project(), "sqlite:///mlflow.db", "file:./mlruns"):
        if each and _is_there(each):
            return each
    raise UsageError(
        f"no runs of MLflow in {Path.cwd()}, neither in mlflow.db nor in mlruns; run this where you trained, "
        "or give the tracking URI that the training printed"
    )


def _uri_of_this_project() -> str | None:
    path = Path("configs/training.yaml")
    try:
        return load_config(path).logging.mlflow_tracking_uri if path.is_file() else None
    except UsageError:  # an unfinished file, or another program's: show the runs in the current folder
        return None


def _is_there(uri: str) -> bool:
    """Return whether there is anything to show.

    A folder must hold an experiment: an `mlruns` that contains only artifacts belongs to a database, and
    MLflow would make a second, empty store of it.
    """
    path = store_path(uri)
    if path is None:
        return True
    return any(path.glob("*/meta.yaml")) if is_file_store(uri) else path.is_file()


def server_address(uri: str) -> str:
    """Check that a tracking server answers, and return its address without the password in `uri`.

    Raises:
        DetrDistError: it does not answer.
    """
    address = redact(uri)
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # an error is an answer too: the server may require a password
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DetrDistError(
            f"{address}: the MLflow server does not answer ({reason}); is it running?"
        ) from None
    return address


def newest_page(uri: str, address: str) -> str:
    """Return the link to the runs of the experiment that trained last, or `address` if none is found."""
    from detr_dist.tracking.pages import newest_view, run_table_link  # imports MLflow, which is slow
    from detr_dist.tracking.store import open_client, patience

    try:
        with patience(_TIMEOUT_S):
            client = open_client(uri)
            ids = [each.experiment_id for each in client.search_experiments()]
            newest = client.search_runs(ids, order_by=["attributes.start_time DESC"], max_results=1)
            experiment = client.get_experiment(newest[0].info.experiment_id)
            return run_table_link(address, experiment.experiment_id, newest_view(experiment.tags))
    except Exception:  # an empty store, or one that MLflow's own pages explain better
        return address


def serve(uri: str, host: str, port: int, options: list[str]) -> None:
    """Replace this process by `mlflow ui`, at the first free port from `port` on.

    Signals are then sent to MLflow itself, which ends its workers.
    """
    free_port = find_free_port(host, port)
    if free_port != port != 0:
        print(f"port {port} is busy, taking {free_port}")
    shown = store_path(uri) or "the database"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow 3.13 and later refuse folders without it
    address = newest_page(uri, f"http://{host}:{free_port}")
    print(f"MLflow's pages of {shown}: open {address} (Ctrl-C ends them)", flush=True)
    # Jobs are for evaluating language models; without them it starts faster. One person needs one worker.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    where = ("--host", host, "--port", str(free_port))
    os.environ["MLFLOW_BACKEND_STORE_URI"] = client_uri(
        uri
    )  # not an argument, which all users of the host can see
    command = (sys.executable, "-m", "mlflow", "ui", *where, "--workers", "1")
    os.execv(sys.executable, (*command, *options))


def find_free_port(host: str, first: int) -> int:
    """Return the first port from `first` on at which nothing listens.

    Raises:
        UsageError: none is free, or `host` is not an address of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, first + _NUM_PORTS_TO_TRY):
        try:
            with socket.create_server((host, port), family=family) as free:
                return int(free.getsockname()[1])  # differs from the request only for port 0, which means any
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                raise UsageError(
                    f"cannot serve at {host}, port {first} ({error}); give another --host or --port"
                ) from None
    raise UsageError(
        f"ports {first} to {first + _NUM_PORTS_TO_TRY - 1} of {host} are all busy; give another --port"
    )


if __name__ == "__main__":
    main()
