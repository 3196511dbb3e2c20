"""Train like `detr-dist train`, then write `left_<process>.json`.

It lists what this process has left behind and which hosts it has contacted.
"""

import json
import os
import sys
import threading
from pathlib import Path

import psutil

from detr_dist.cli import main as run_command

asked: list[str] = []


def note(event: str, arguments: tuple[object, ...]) -> None:
    """Record everything that Python opens and that may lead to MLflow."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        asked.append(f"port {arguments[1][1]}")
    elif event == "sqlite3.connect":
        asked.append(f"database {arguments[0]}")


def main() -> None:
    process, folder = psutil.Process(), str(Path.cwd())
    before = {connection.laddr for connection in process.net_connections()}
    sys.addaudithook(note)
    run_command(sys.argv[1:])
    left = {
        "asked": sorted(set(asked)),
        "threads": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
        "files": [file.path for file in process.open_files() if file.path.startswith(folder)],
        "sockets": [
            f"{connection.laddr} to {connection.raddr}"
            for connection in process.net_connections()
            if connection.laddr not in before
        ],
        "children": [child.name() for child in process.children(recursive=True)],
    }
    Path(f"left_{os.environ['RANK']}.json").write_text(json.dumps(left))


if __name__ == "__main__":
    main()
