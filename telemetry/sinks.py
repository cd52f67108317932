"""Where events go: a console line, a JSON-lines file, a ring in memory (what the tests read)."""
from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Protocol

from . import Sink, log
from .event import Event

MB = 2**20

# What the console shows at "info"; everything else needs "debug".
_INFO = frozenset({
    "hook.declined", "hook.retired", "hook.shadowed", "hook.failed", "policy.declined", "policy.failed",
    "policy.ineffective", "weights.read_ahead", "weights.mapped", "weights.restored", "weights.released",
    "file.changed", "model.placed", "prompt.finished", "plugin.started", "settings.changed", "memory.emptied",
})
_WARNING = frozenset({"hook.failed", "policy.failed", "policy.ineffective", "file.changed", "hook.shadowed"})


def _value(key: str, value: Any) -> str:
    if key.endswith("bytes") and isinstance(value, (int, float)):
        return f"{value / MB:.0f} MB"
    if key.endswith("seconds") and isinstance(value, (int, float)):
        return f"{value:.2f} s"
    if isinstance(value, Mapping):
        return " ".join(f"{k} {_value(key, v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def line(event: Event) -> str:
    """The event as one console line, for example
    `weights.mapped big_flux.safetensors 807 MB in 0.02 s, 0 MB copied`."""
    fields = {key: _value(key, value) for key, value in event.fields.items()}
    subject = " ".join(fields.pop(key) for key in ("file", "model", "hook", "policy", "prompt") if key in fields)
    if "bytes" in fields:
        subject += " " + fields.pop("bytes")
    if "seconds" in fields:
        subject += " in " + fields.pop("seconds")
    tail = [f"{value} {key[:-6].replace('_', ' ')}" if key.endswith("_bytes") else f"{key.replace('_', ' ')}: {value}"
            for key, value in fields.items()]
    return ", ".join([f"{event.name} {subject}".strip(), *tail])


class Console:
    """One line an event, through the logger `residency`. At "info" only what a user acts on."""

    def __init__(self, level: str) -> None:
        self.everything = level == "debug"

    def __call__(self, event: Event) -> None:
        if self.everything or event.name in _INFO:
            level = logging.WARNING if event.name in _WARNING else logging.INFO
            log.log(level, "[residency] %s", line(event))


class _Rotating(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise  # noqa: PLE0704  logging calls this inside its except block; `emit` then detaches us


class JsonLines:
    """One JSON object a line, in a file that is rotated.

    Args:
        path: the file; its folder is made.
        max_mb: a file's size before it is rotated.
        keep: how many rotated files stay.

    Raises:
        OSError: the folder or the file cannot be written.
    """

    def __init__(self, path: Path, max_mb: float, keep: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = _Rotating(path, maxBytes=int(max_mb * MB), backupCount=keep, encoding="utf-8")

    def __call__(self, event: Event) -> None:
        text = json.dumps(event.as_dict(), default=str)
        self._file.emit(logging.LogRecord("residency", logging.INFO, "", 0, text, None, None))

    def close(self) -> None:
        self._file.close()

    def __repr__(self) -> str:
        return str(self.path)


class Choices(Protocol):
    """The `[telemetry]` table."""

    @property
    def console(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def max_mb(self) -> float: ...
    @property
    def keep(self) -> int: ...


def open_all(choices: Choices, folder: Path) -> list[Sink]:
    """The sinks that the settings choose. A file that cannot be written is left out, with a line that names it."""
    sinks: list[Sink] = [] if choices.console == "off" else [Console(choices.console)]
    if choices.file:
        path = folder / choices.file  # a full path replaces the folder
        try:
            sinks.append(JsonLines(path, choices.max_mb, choices.keep))
        except OSError as error:
            log.warning("[residency] no telemetry file: %s cannot be written (%s). Set telemetry.file to another path, or "
                        "to \"\" for none.", path, error.strerror)
    return sinks


class Ring:
    """The last events, in memory."""

    def __init__(self, size: int = 10_000) -> None:
        self.events: deque[Event] = deque(maxlen=size)

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]
