"""URIs of tracking stores, runs and artifacts, and their paths on this host. Imports no MLflow.

MLflow treats ordinary paths as URL-encoded, and puts the current folder into `file:` URIs without encoding: a
folder with `%`, `#` or `?` in its name becomes a different one. Hence we use absolute, encoded URIs.
"""

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from detr_dist.errors import UsageError
from detr_dist.redaction import redact

WHERE_SET = "--tracking-uri (of train: logging.mlflow_tracking_uri)"
"""Where to set the tracking URI; messages about a wrong URI do not know which command is running."""

# Tracking URIs that look like paths.
_NAMES_OF_SERVERS = {"databricks", "databricks-uc", "uc"}

_DATABASES = {"mssql", "mysql", "postgresql", "sqlite"}


def is_run_id(text: str) -> bool:
    """Return whether a text has the form of an MLflow run id."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def is_artifact_uri(text: str) -> bool:
    """Return whether a text names something in MLflow or in an artifact store, instead of a local path."""
    return re.match(r"[a-z0-9+.-]+:/", text) is not None


def is_file_store(uri: str) -> bool:
    """Return whether MLflow keeps this tracking URI as plain files: file:... or a path without a scheme."""
    return local_path(uri) is not None and uri not in _NAMES_OF_SERVERS


def is_database(uri: str) -> bool:
    """Return whether MLflow opens a tracking URI as a database, with or without the name of a driver."""
    return urlsplit(uri).scheme.partition("+")[0] in _DATABASES


def local_path(uri: str) -> Path | None:
    """Return the path that MLflow uses for a `file:` URI or a path; None for other URIs."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme else Path(url2pathname(uri))


def database_path(uri: str) -> Path | None:
    """Return the file of an SQLite database as SQLAlchemy finds it; None for other URIs."""
    if re.match(r"sqlite(\+\w+)?:///", uri) is None:
        return None
    from sqlalchemy import make_url  # installed with MLflow, and slow to import

    url = make_url(uri)
    is_path = url.database not in (None, "", ":memory:") and "uri" not in url.query
    return Path(str(url.database)) if is_path else None


def store_path(uri: str) -> Path | None:
    """Return the absolute path of a store on this host, a database file or a folder; None for others."""
    path = local_path(uri) if is_file_store(uri) else database_path(uri)
    return path and path.absolute()


def check_escapes(uri: str) -> None:
    """Refuse a URI whose path MLflow would cut off at a `#` or `?`.

    Raises:
        UsageError: with the correct spelling.
    """
    if urlsplit(uri).scheme == "file" and not {"#", "?"}.isdisjoint(uri):
        raise UsageError(
            f"tracking URI {uri}: in a `file:` URI write # as %23 and ? as %3F; correct {WHERE_SET}"
        )
    query = uri.partition("?")[2]
    if database_path(uri) is not None and query and not re.fullmatch(r"([\w.-]+=[^?&]*(&|$))+", query):
        raise UsageError(
            f"tracking URI {uri}: there is no name=value after ?; in the path write ? as %3F; correct "
            f"{WHERE_SET}"
        )


def absolute_uri(uri: str) -> str:
    """Return a URI of the same store for a process in another working directory."""
    path = store_path(uri)
    if path is None:
        return uri
    if is_file_store(uri):
        return path.as_uri()
    absolute = f"sqlite:///{path}{''.join(uri.partition('?')[1:])}"
    if database_path(absolute) == path:
        return absolute
    from sqlalchemy import make_url

    # MLflow would create the folder of `sqlite:///` unescaped; with a driver in the URI it creates none.
    url = make_url(uri).set(drivername="sqlite+pysqlite", database=str(path))
    absolute = url.render_as_string(hide_password=False)
    return absolute if database_path(absolute) == path else uri  # SQLAlchemy 2.0 supports no escapes


def client_uri(uri: str) -> str:
    """Return the URI for MLflow's client."""
    return absolute_uri(uri) if is_file_store(uri) else uri


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment should keep its artifacts; None if MLflow's default is right."""
    return local_location(Path("mlruns")) if is_database(uri) and _is_misread(Path("mlruns")) else None


def local_location(path: Path) -> str:
    """Return an absolute path, or a `file:` URI if MLflow would misread the path."""
    return path.absolute().as_uri() if _is_misread(path) else str(path.absolute())


def _is_misread(path: Path) -> bool:
    return not set("%#?;").isdisjoint(str(path.absolute()))


def way_to_see(uri: str) -> str:
    """Return the address or the command for viewing the runs of a store."""
    shown = redact(uri)
    if is_database(uri):
        credentials = " with its credentials" if shown != uri else ""
        return f"with: mlflow ui --backend-store-uri {shlex.quote(shown)}{credentials}"
    if is_file_store(uri):
        return f"with: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return f"at {shown}"
