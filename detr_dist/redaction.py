"""Keeps credentials out of what leaves the process: files, tags, parameters, messages.

User information and secret query parameters are removed from an address instead of being masked, so that
nobody connects with a placeholder as the password. The value of a variable or setting becomes `***`.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

_HIDDEN = "***"

_SECRET = (
    r"(?:pass(?:word|wd|phrase)|pwd|token|secret|credentials?"
    r"|(?:access|account|api|auth|private|secret|shared)[_-]?key)"
)
_SECRET_NAME = re.compile(rf".*{_SECRET}", re.IGNORECASE)

# Which characters an unescaped password may contain depends on the reader: for SQLAlchemy all but `@`.
_USER_INFO = re.compile(
    r"""
    (\b[a-z][a-z0-9+.-]*://)
    (?:
        # user:password@, if it is neither host:port nor the end of an address in a sentence
        [^\s/?\#:\[]* : (?! \s | \d+ (?: [/?\#\s,;)\]}'"] | [:.](?:\s|$) | $ ) ) [^\n@]*@ (?:\S*@)?
        # the same for schemes where a password may begin like a port
        | (?<!http://) (?<!https://) [^\s/?\#:\[]* : \S+@
        # token@, except for stores whose addresses have a container or a profile there
        | (?<!abfs://) (?<!abfss://) (?<!wasb://) (?<!wasbs://) (?<!dbfs://) [^\s/?\#]*@
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)

# ODBC's connection string is encoded, including its password. MLflow's links name a view of a table by a key.
_PARAMETER = rf"(?!viewStateShareKey=)[^=&\s]*(?:{_SECRET}|key|sig|signature|pass|odbc_connect)=[^&\s]*"
_PARAMETERS = re.compile(rf"([?&])(?:{_PARAMETER}&)*{_PARAMETER}(&?)", re.IGNORECASE)

_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_ASSIGNMENT = re.compile(
    rf"({_SECRET}\s*=\s*|\bAuthorization:\s*(?:Basic|Bearer)\s+)(?:{_QUOTED}|\S+)", re.IGNORECASE
)

# An entry of a mapping in YAML, JSON or Python. Numbers and the like are no secrets.
_ENTRY = re.compile(
    rf"({_SECRET}[\"']?\s*:\s*)(?:{_QUOTED}|(?!(?:[\d.]+|null|none|true|false)[\s,}}])[^\s\"'{{\[,}}]+)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return `text` without the credentials of the addresses, variables and settings in it."""
    text = _USER_INFO.sub(r"\1", text)
    text = _PARAMETERS.sub(lambda match: match[1] if match[2] else "", text)
    return _ENTRY.sub(rf"\1{_HIDDEN}", _ASSIGNMENT.sub(rf"\1{_HIDDEN}", text))


def redact_value(value: Any) -> Any:
    """Return a setting, an argument, or a tree of them, without credentials."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            key: _HIDDEN if isinstance(each, str) and _SECRET_NAME.fullmatch(str(key)) else redact_value(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [redact_value(each) for each in value]
    return value


class _RedactedStream:
    """A text stream that removes credentials from everything written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def redacted_output() -> Iterator[None]:
    """Remove credentials from everything that is printed within the block, by any library."""
    stdout, stderr = (cast(TextIO, _RedactedStream(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(stdout), redirect_stderr(stderr):
        yield
