"""What happened, as events: one JSON object a line for reports and plots, and a log line each."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drafttrain.outputs import make_folder, writing

_log = logging.getLogger(__name__)


class EventLog:
    """An append-only file of events; each has ``time`` (Unix seconds) and ``event`` (its kind)."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self.path = path

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Write one event; returns it.

        Raises:
            CheckpointError: it cannot be written.
        """
        record = {"time": time.time(), "event": event, **fields}
        # One write of a short line in append mode: a reader or a kill never leaves two mixed.
        with writing(self.path, "file"), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        _log.info("%s  %s", event, "  ".join(f"{k} {_short(v)}" for k, v in fields.items()))
        return record

    def read(self) -> Iterator[dict[str, Any]]:
        """All events so far, oldest first; a last line cut short by a kill is passed over."""
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
