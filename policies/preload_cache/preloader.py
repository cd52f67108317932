"""Loads a list of models in a thread of ours, one at a time, between prompts.

The slow part, reading a cold file, holds nobody up; building a model waits for a running prompt to end, and a prompt that
comes meanwhile waits for that one model.
"""
from __future__ import annotations

import difflib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ...settings import nearest
from ...telemetry import emit, log
from ..files import pages
from .wishes import Wish

if TYPE_CHECKING:
    from .. import Tools

WARM = 0.95


class Stopped(Exception):
    """The rest of the list is not wanted any more. The message says why."""


class Preloader:
    """
    Args:
        turn: the right to touch the host's models, had while one is built.
        idle: whether no prompt runs.
        room: bytes that may still be kept.
        load: loads a wish and keeps it; gives why it is not kept, None if it is.
    """

    def __init__(self, tools: Tools, turn: AbstractContextManager[object], idle: Callable[[], bool], room: Callable[[], int],
                 load: Callable[[Wish], str | None]) -> None:
        self._tools, self._turn, self._idle, self._room, self._load = tools, turn, idle, room, load
        self._why = ""
        self.busy = threading.Event()

    def stop(self, why: str) -> None:
        self._why = why

    def run(self, wishes: Sequence[Wish]) -> None:
        """Loads them in order. Says of each that cannot be loaded why, and goes on."""
        started, total, done = time.perf_counter(), 0, 0
        self.busy.set()
        try:
            for number, wish in enumerate(wishes, 1):
                size = self._one(wish, f"{number} of {len(wishes)}")
                total, done = total + (size or 0), done + (size is not None)
        except Stopped as stopped:
            emit("cache.stopped", reason=str(stopped))
        except BaseException as error:
            if self._tools.host.lifecycle.is_cancel(error):
                emit("cache.stopped", reason="it was cancelled")
                return
            raise
        finally:
            self.busy.clear()
        emit("cache.ready", models=done, bytes=total, seconds=time.perf_counter() - started, skipped=len(wishes) - done)

    def _one(self, wish: Wish, place: str) -> int | None:
        """Loads one; gives its bytes, or None where it was skipped."""
        started = time.perf_counter()
        size = 0
        try:
            problem = self._problem(wish)
            if problem is None:
                paths = self._tools.host.models.paths(wish.recipe)
                size = sum(map(os.path.getsize, paths))
                problem = self._fetch(wish, paths, size, place)
        except Stopped:
            raise
        except Exception as error:  # a damaged file, or one that the host cannot use, costs its model and not the start
            if self._tools.host.lifecycle.is_cancel(error):
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            seconds = time.perf_counter() - started
            emit("cache.preloaded", model=wish.label, bytes=size, seconds=seconds, description=wish.description)
            return size
        if not wish.learned:  # nobody asked for what was learned
            emit("cache.skipped", model=wish.label, reason=problem)
        return None

    def _fetch(self, wish: Wish, paths: Sequence[str], size: int, place: str) -> str | None:
        room = self._room()
        if size > room:
            return f"it is {size >> 20} MB, and the budget leaves {room >> 20} MB"
        log.info("[residency] preloading %s: %s, %d MB", place, wish.label, size >> 20)
        for path in paths:
            self._read(path)
        self._go_on()
        with self._turn:
            return self._load(wish)

    def _problem(self, wish: Wish) -> str | None:
        """What is wrong with a wish, with the nearest thing that would be right."""
        recipe, models = wish.recipe, self._tools.host.models
        if not 1 <= len(recipe.names) <= 4:
            return f"it names {len(recipe.names)} files, text encoders are one to four"
        known = models.choices(recipe.kind)
        for name in recipe.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, cutoff=0.4)
                return f"there is no '{name}' among the {recipe.kind.replace('_', ' ')}" + (
                    f"; the nearest are {', '.join(near)}" if near else "")
        for option in ("type", "device", "weight_dtype"):
            value = getattr(recipe, option)
            if value not in models.options(option):
                return f"{option} '{value}' is unknown{nearest(value, models.options(option))}"
        return None

    def _read(self, path: str) -> None:
        if (pages.cached_fraction(path) or 0) >= WARM:
            return
        tell = pages.Reporter(lambda percent: log.info("[residency] reading %s: %d %%", os.path.basename(path), percent))

        def progress(done: int, total: int) -> None:
            self._go_on()
            tell(done, total)

        pages.read_ahead(path, self._room(), progress)

    def _go_on(self) -> None:
        if self._idle():
            self._tools.host.lifecycle.raise_if_cancelled()
        if self._why:
            raise Stopped(self._why)
