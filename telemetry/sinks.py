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
    "policy.ineffective", "weights.read_ahead", "gguf.read", "weights.mapped", "weights.restored", "weights.released",
    "file.changed", "file.unreadable", "model.placed", "prompt.finished", "plugin.started", "settings.changed",
    "memory.emptied", "cache.hit", "cache.evicted", "cache.preloaded", "cache.skipped", "cache.ready", "cache.stopped",
    "cache.imported", "snapshot.ready", "snapshot.restored", "split.planned", "split.insufficient", "split.capped",
    "split.moved", "donors.placed", "donors.refused", "donors.left", "pin.failed", "shard.started", "shard.broken",
    "shard.weights", "shard.demoted", "shard.finished", "worker.lost", "worker.replaced",
})
_WARNING = frozenset({"hook.failed", "policy.failed", "policy.ineffective", "file.changed", "file.unreadable", "hook.shadowed",
                      "cache.skipped", "split.insufficient", "donors.refused", "pin.failed", "shard.broken", "worker.lost"})

# What a line is about, in this order; then how it went, each with its preposition; and what comes last, after a colon.
_SUBJECTS = ("file", "model", "hook", "policy", "request", "prompt", "type")
_LINKS = {"bytes": "", "device": "on ", "by": "by ", "source": "from ", "seconds": "in "}
_REASONS = ("reason", "error")


def line(event: Event) -> str:
    """The event as one console line, for example
    `weights.mapped big_flux.safetensors 807 MB in 0.02 s, 0 MB copied`."""
    fields = dict(event.fields)
    head = [event.name, *(_value(key, fields.pop(key)) for key in _SUBJECTS if key in fields)]
    head += [link + _value(key, fields.pop(key)) for key, link in _LINKS.items() if key in fields]
    reasons = [_value(key, fields.pop(key)) for key in _REASONS if key in fields]
    tail = ", ".join(filter(None, (_part(key, value) for key, value in fields.items())))
    comma = ", " if len(head) > 1 else " "
    return ": ".join([" ".join(head) + (comma + tail if tail else ""), *reasons])


def _value(key: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("bytes") and isinstance(value, (int, float)):
        return f"{value / MB:.0f} MB"
    if key.endswith("seconds") and isinstance(value, (int, float)):
        return f"{value:.2f} s"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} ({_parts(inner)})" if isinstance(inner, Mapping) else f"{name} {_value(str(name), inner)}"
                         for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(key, item) for item in value) or "none"
    return " ".join(str(value).split())  # torch writes errors in several lines


def _part(key: str, value: Any) -> str:
    """A field with its name: `0 MB copied`, `1.80 s placing`, `12 MB on cuda:0`, `exercised: yes`."""
    if key.endswith("_gb_s"):
        return f"{value:.0f} GB/s {key.removesuffix('_gb_s')}"
    name, _, unit = key.rpartition("_")
    if unit not in ("bytes", "seconds") or not name:
        return f"{key.replace('_', ' ')}: {_value(key, value)}"
    if isinstance(value, Mapping):
        link = {"types": "in", "predicted": "predicted on", "observed": "observed on"}.get(name, "on")
        return ", ".join(f"{_value(unit, inner)} {link} {where}" for where, inner in value.items())
    return f"{_value(unit, value)} {name.replace('_', ' ')}"


def _parts(fields: Mapping[str, Any]) -> str:
    return ", ".join(_part(key, value) for key, value in fields.items()) or "none"


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
        # Not `emit`: `handle` takes the lock, and models are released in any thread.
        self._file.handle(logging.LogRecord("residency", logging.INFO, "", 0, text, None, None))

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
        except (OSError, ValueError) as error:  # ValueError: a path that no system takes, with a NUL in it
            log.warning("[residency] no telemetry file: %s cannot be written (%s). Set telemetry.file to another path, or "
                        "to \"\" for none.", path, getattr(error, "strerror", None) or error)
    return sinks


class Ring:
    """The last events, in memory."""

    def __init__(self, size: int = 10_000) -> None:
        self.events: deque[Event] = deque(maxlen=size)

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]
