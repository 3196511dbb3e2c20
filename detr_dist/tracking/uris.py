"""What a tracking URI names: which kind of store, and where on this host.

MLflow takes plain paths for URL-encoded ones and puts the current folder into `file:` URIs as it is: a folder
with `%`, `#` or `?` in its name becomes another one. Hence absolute, encoded URIs wherever we choose.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sqlalchemy import make_url

from detr_dist.errors import UsageError

WHERE_SET = "--tracking-uri (of train: logging.mlflow_tracking_uri)"
"""What a message asks to correct when a tracking URI is wrong: it does not know which command asked."""

# Tracking URIs that look like paths.
_NAMES_OF_SERVERS = {"databricks", "databricks-uc", "uc"}

_DATABASES = {"mssql", "mysql", "postgresql", "sqlite"}


def is_file_store(uri: str) -> bool:
    """Return whether MLflow keeps this tracking URI as plain files: file:... or a path without a scheme."""
    return local_path(uri) is not None and uri not in _NAMES_OF_SERVERS


def is_database(uri: str) -> bool:
    """Return whether MLflow itself opens a database there, with or without the name of a driver."""
    return urlsplit(uri).scheme.partition("+")[0] in _DATABASES


def local_path(uri: str) -> Path | None:
    """Return the path that MLflow takes a `file:` URI or a plain path for; None for other URIs."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme else Path(url2pathname(uri))


def database_path(uri: str) -> Path | None:
    """Return the file of an SQLite database as SQLAlchemy finds it; None for other URIs."""
    if re.match(r"sqlite(\+\w+)?:///", uri) is None:
        return None
    url = make_url(uri)
    is_path = url.database not in (None, "", ":memory:") and "uri" not in url.query
    return Path(str(url.database)) if is_path else None


def check_escapes(uri: str) -> None:
    """Refuse a URI whose path MLflow would cut off at a `#` or `?`.

    Raises:
        UsageError: says how to write it.
    """
    if urlsplit(uri).scheme == "file" and not {"#", "?"}.isdisjoint(uri):
        raise UsageError(
            f"tracking URI {uri}: in a `file:` URI write # as %23 and ? as %3F; correct {WHERE_SET}"
        )
    query = uri.partition("?")[2]
    if database_path(uri) is not None and query and not re.fullmatch(r"([\w.-]+=[^?&]*(&|$))+", query):
        raise UsageError(
            f"tracking URI {uri}: after ? stands no name=value; in the path write ? as %3F; correct "
            f"{WHERE_SET}"
        )


def absolute_uri(uri: str) -> str:
    """Return a URI of the same store for a process that works in another folder."""
    if is_file_store(uri):
        return _encoded(Path(str(local_path(uri))))
    database = database_path(uri)
    if database is None:
        return uri
    database = database.absolute()
    absolute = f"sqlite:///{database}{''.join(uri.partition('?')[1:])}"
    if database_path(absolute) == database:
        return absolute
    # MLflow would make the folder that `sqlite:///` names unescaped; where the driver is named it makes none.
    url = make_url(uri).set(drivername="sqlite+pysqlite", database=str(database))
    absolute = url.render_as_string(hide_password=False)
    return absolute if database_path(absolute) == database else uri  # SQLAlchemy 2.0 knows no escapes


def client_uri(uri: str) -> str:
    """Return the URI for MLflow's client."""
    return absolute_uri(uri) if is_file_store(uri) else uri


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment keeps its artifacts; None where MLflow's own choice is right."""
    return local_location(Path("mlruns")) if is_database(uri) and _is_misread(Path("mlruns")) else None


def local_location(path: Path) -> str:
    """Return an absolute path that MLflow does not take for another: a `file:` URI where it would."""
    return _encoded(path) if _is_misread(path) else str(path.absolute())


def _is_misread(path: Path) -> bool:
    return not set("%#?;").isdisjoint(str(path.absolute()))


def _encoded(path: Path) -> str:
    return path.absolute().as_uri()
