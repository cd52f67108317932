"""What happened. Standard library only; nothing leaves the machine.

`emit` hands one `Event` to every attached sink. A sink is any callable that takes an `Event`.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from .event import Event

Sink = Callable[[Event], None]

# Not __name__: ComfyUI imports the plugin under its folder's path, which would be the logger's name.
log = logging.getLogger("residency")
_sinks: list[Sink] = []


def attach(sink: Sink) -> Sink:
    """Adds a sink and returns it, to be given to `detach` later."""
    _sinks.append(sink)
    return sink


def detach(sink: Sink) -> None:
    """Removes a sink, and closes it if it can be closed. A sink that is not attached is ignored."""
    if sink in _sinks:
        _sinks.remove(sink)
        close = getattr(sink, "close", None)
        if close is not None:
            with suppress(OSError):  # a full disk: the last lines are lost, and nothing else
                close()


def replace(sinks: Iterable[Sink]) -> None:
    """Detaches all sinks and attaches these."""
    for sink in tuple(_sinks):
        detach(sink)
    for sink in sinks:
        attach(sink)


def emit(name: str, /, **fields: Any) -> None:
    """Tells every sink. A sink that raises is detached, and that is said once.

    Raises:
        ValueError: `name` is not a known event.
    """
    event = Event(name, fields)
    for sink in tuple(_sinks):
        try:
            sink(event)
        except Exception as error:  # a full disk must not stop an image
            if sink not in _sinks:  # another thread was here first
                continue
            detach(sink)
            log.warning("[residency] telemetry sink %s stopped: %s. The images are not affected.", sink, error)
