"""Answers a load from what is kept, or keeps what the host makes."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ...telemetry import emit, log
from ..files import mounts, pages
from ..files.identity import Identity
from ..memory import Residency
from ..policy import Decision, Proceed
from ..requests import LoadModel
from . import keys
from .entries import NAME, Entries, Entry, label
from .learned import Learned
from .snapshot import Snapshot
from .wishes import Wish

if TYPE_CHECKING:
    from .. import Tools

WARM = 0.95  # of a file in the page cache; above, reading it ahead gains nothing


@dataclass
class Granted:
    """A wish that is being loaded, and what came of it."""

    wish: Wish
    entry: Entry | None = None
    problem: str = "it cannot be kept"


_granting: ContextVar[Granted | None] = ContextVar("residency_granting", default=None)


class Loads:
    """
    Args:
        mapped: called when a model is kept that is a file's mapping.

    Attributes:
        lock: guards the entries, and makes a model be built once.
        short: bytes that the watch wants back; given at the next moment at which models may go.
    """

    def __init__(self, tools: Tools, entries: Entries, snapshot: Snapshot | None, learned: Learned | None,
                 mapped: Callable[[], None]) -> None:
        self._tools, self.entries, self._snapshot, self.learned, self._mapped = tools, entries, snapshot, learned, mapped
        self.lock = threading.RLock()
        self.hits = self.misses = self.short = 0
        self.closed = False

    def decide(self, request: LoadModel) -> Decision | None:
        try:
            files = self._identities(request.paths)
        except OSError:
            return None  # the host says which file is not there
        return Decision("", partial(self._serve, request, files))

    @contextmanager
    def granting(self, wish: Wish) -> Iterator[Granted]:
        """Loads inside are a wish's."""
        granted = Granted(wish)
        token = _granting.set(granted)
        try:
            yield granted
        finally:
            _granting.reset(token)

    def relieve(self) -> None:
        """Gives back what the watch wants."""
        with self.lock:
            if self.short:
                size, self.short = self.short, 0
                self.entries.give_back(size, "memory pressure")

    def _identities(self, paths: tuple[str, ...]) -> tuple[Identity, ...]:
        return self._snapshot.identities(paths) if self._snapshot else keys.identities(paths)

    def _key(self, request: LoadModel, files: tuple[Identity, ...]) -> keys.Key:
        if self._snapshot is None:
            return keys.of(request, files)
        options = {name: value for name, value in request.options.items() if name != "devices"}  # they follow the host's
        marks = tuple(self._snapshot.mark(path, identity) for path, identity in zip(request.paths, files, strict=True))
        return keys.of(LoadModel(request.kind, request.paths, options, request.keep), marks)

    def _serve(self, request: LoadModel, files: tuple[Identity, ...], proceed: Proceed) -> Any:
        name = label(request.paths)
        with self.lock:
            started = time.perf_counter()
            if self.learned is not None and request.recipe is not None and _granting.get() is None:
                self.learned.used(request.recipe)
            try:
                key = self._key(request, files)
            except keys.Incomparable as reason:
                return self._miss(name, str(reason), proceed)
            entry = self.entries.find(key)
            altered = entry.kept.altered() if entry is not None else None
            if entry is not None and altered is None:
                answer = entry.kept.lend()
                self._hit(entry, time.perf_counter() - started)
                return answer
            if entry is not None and altered is not None:
                self.entries.evict([entry], altered)
            self._prepare(request, files)
            answer = self._miss(name, self.entries.why_not(key), proceed)
            return self._keep(key, name, request, files, answer)

    def _hit(self, entry: Entry, seconds: float) -> None:
        entry.hits, entry.used = entry.hits + 1, time.monotonic()
        self.hits += 1
        self._grant(entry)
        emit("cache.hit", model=entry.label, bytes=entry.file_bytes, seconds=seconds)

    def _miss(self, name: str, reason: str, proceed: Proceed) -> Any:
        self.misses += 1
        emit("cache.miss", model=name, reason=reason)
        return proceed()

    def _prepare(self, request: LoadModel, files: tuple[Identity, ...]) -> None:
        """Makes room, and reads files on slow mounts ahead."""
        self.entries.drop_changed()
        self.relieve()
        self.entries.make_room(sum(identity.size for identity in files))
        for path in request.paths:
            mount = mounts.slow(path)
            with suppress(OSError):  # the host meets the same error, and tells of it
                if mount is not None and (pages.cached_fraction(path) or 0) < WARM:
                    self._read_ahead(path, mount)

    def _read_ahead(self, path: str, mount: str) -> None:
        started = time.perf_counter()
        tell = pages.Reporter(lambda percent: log.info("[residency] reading %s (%s): %d %%", label((path,)), mount, percent))
        room = self._tools.ledger.room(NAME, Residency.MAPPED)

        def progress(done: int, total: int) -> None:
            self._tools.host.lifecycle.raise_if_cancelled()
            tell(done, total)

        size = pages.read_ahead(path, room, progress)
        emit("weights.read_ahead", file=label((path,)), bytes=size, seconds=time.perf_counter() - started)

    def _keep(self, key: keys.Key, name: str, request: LoadModel, files: tuple[Identity, ...], answer: Any) -> Any:
        kept = request.keep(answer) if not self.closed and self._unchanged(request, files) else None
        if kept is None:
            return answer
        entry = Entry(key, kept, name, request.kind, tuple(zip(request.paths, files, strict=True)), request.recipe)
        self._grant(entry)
        lent = kept.lend()
        reason = self.entries.add(entry)
        if reason is not None:
            granted = _granting.get()
            if granted is not None:
                granted.entry, granted.problem = None, reason
            emit("cache.evicted", model=name, bytes=entry.file_bytes, private_bytes=entry.private, reason=reason)
        elif self._snapshot is not None:
            self._snapshot.note(request.recipe, request.paths)
        elif entry.mapped:
            self._mapped()
        return lent

    @staticmethod
    def _grant(entry: Entry) -> None:
        granted = _granting.get()
        if granted is not None:
            entry.label, entry.keep = granted.wish.label, entry.keep or granted.wish.keep
            granted.entry = entry

    def _unchanged(self, request: LoadModel, files: tuple[Identity, ...]) -> bool:
        """Whether the files are what they were before they were read."""
        try:
            return self._identities(request.paths) == files
        except OSError:
            return False
