"""The way into ComfyUI's attention functions, for calls that no override can see.

ComfyUI looks for an override in the `transformer_options` that a model passes to its attention, and some models pass none. A
worker's process is ours, so an entry stands before every attention function there, which shares what is called while a step is
computed. A call that is shared there is not shared again by an override below it.
"""
from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch

from .parallel import Parallel

# Of the step that is computed now; other threads of the process compute by themselves.
_current: ContextVar[Parallel | None] = ContextVar("sharing", default=None)

# ComfyUI's mark on the calls that its attention functions make themselves, when they hand over to another.
_INSIDE = "_inside_attn_wrapper"


@dataclass(frozen=True)
class Entry:
    """A name that held an attention function, and now holds the entry to it."""

    names: dict[str, Any]
    name: str
    original: Callable[..., torch.Tensor]
    shared: Callable[..., torch.Tensor]


@contextlib.contextmanager
def sharing(parallel: Parallel) -> Iterator[None]:
    """Attention is shared, in this thread, until the end of the `with`. An override that is in force is asked as before."""
    token = _current.set(parallel)
    try:
        yield
    finally:
        _current.reset(token)


def install() -> list[Entry]:
    """Puts an entry before ComfyUI's attention functions, wherever a module that is loaded holds one by its name.

    Modules that are loaded later import the entry itself. Called again it finds what came since. A release whose functions are
    not made by `wrap_attn` has none to be found, and its calls reach the override or are computed whole.
    """
    from comfy.ldm.modules import attention

    if not isinstance(getattr(attention, "wrap_attn", None), FunctionType):
        return []
    # All that `wrap_attn` makes is the same code around different functions, packs' own among them.
    code = attention.wrap_attn(_nothing).__code__
    spaces = [vars(module) for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    spaces.append(getattr(attention, "REGISTERED_ATTENTION_FUNCTIONS", {}))
    entries: dict[Any, Callable[..., torch.Tensor]] = {}
    found = []
    for names in spaces:
        for name, value in list(names.items()):
            if type(value) is FunctionType and value.__code__ is code:  # `isinstance` would ask objects that only pose as one
                shared = entries.setdefault(value, _entry(value))
                names[name] = shared
                found.append(Entry(names, name, value, shared))
    return found


def remove(entries: list[Entry]) -> None:
    """Puts back what `install` replaced, where nobody else did since."""
    for entry in entries:
        if entry.names.get(entry.name) is entry.shared:
            entry.names[entry.name] = entry.original


def _entry(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def shared(*args: Any, **kwargs: Any) -> torch.Tensor:
        current = _current.get()
        if current is None or _INSIDE in kwargs:
            return original(*args, **kwargs)
        return current.attention(original, *args, **kwargs)

    return shared


def _nothing() -> None: ...
