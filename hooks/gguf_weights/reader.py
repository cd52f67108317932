"""`gguf.GGUFReader` made lazy, for the packs that read GGUF files by themselves: its header costs them half a minute.

It is a class that people subclass and test for, so it is replaced by a subclass of itself, in the modules that define and
export it. Packs that imported the name before us keep the slow one.
"""
from __future__ import annotations

import sys
from typing import Any

import wrapt

from ...policies.files.gguf_lazy_reader import lazy_reader

_MODULES = ("gguf", "gguf.gguf_reader")


class LazyReader:
    """Turned on and off; the package is not imported for it."""

    def __init__(self) -> None:
        self._wanted = self._waiting = False
        self._original: Any = None
        self._lazy: Any = None

    def turn(self, on: bool) -> None:
        self._wanted = on
        if not on:
            self._put(self._lazy, self._original)
        elif not self._waiting:
            self._waiting = True
            wrapt.register_post_import_hook(lambda module: self._replace(), "gguf")  # at once, if it is imported already
        elif "gguf" in sys.modules:
            self._replace()

    def _replace(self) -> None:
        if not self._wanted or (self._lazy is not None and sys.modules["gguf"].GGUFReader is self._lazy):
            return
        self._original = sys.modules["gguf"].GGUFReader
        self._lazy = lazy_reader(self._original)
        self._put(self._original, self._lazy)

    @staticmethod
    def _put(old: Any, new: Any) -> None:
        """Where somebody else replaced it meanwhile, it is theirs."""
        for name in _MODULES:
            module = sys.modules.get(name)
            if module is not None and old is not None and getattr(module, "GGUFReader", None) is old:
                setattr(module, "GGUFReader", new)  # noqa: B010  a module has no such attribute for mypy
