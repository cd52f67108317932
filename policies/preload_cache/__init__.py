"""No weight is read twice: what a loader made is kept, and lent again.

ComfyUI forgets the models of a workflow as soon as another one runs, and its reader tells the kernel to drop the file from
the page cache. Here a loader's answer is kept by the identity of its files and by its options, and the next loader that asks
for the same gets the host's own clone of it, which shares the weights. Models that are a file's mapping (`zero_copy`, dynamic
VRAM) cost no private RAM; a read-only mapping of ours keeps their pages in the page cache. Private copies count in full.

It pays for every switch between workflows and, with a preload list, for the first prompt. It costs RAM within the `[memory]`
budget, and two loaders of one file share one model, which changes its LoRA when they take turns.
"""
from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...telemetry import log
from ..files.guard import Guard
from ..policy import Decision, Policy, Proceed
from ..requests import FindFile, FreeMemory, ListFiles, LoadModel, ReadWeights, Request, RunPrompt
from . import status
from .entries import NAME, Entries, unchanged
from .learned import Learned
from .loads import Loads
from .preloader import Preloader
from .settings import Settings
from .snapshot import Snapshot
from .startup import Startup
from .watch import Watch

if TYPE_CHECKING:
    from .. import Tools

__all__ = ["PreloadCache", "Settings", "create"]
LEARNED = "learned.json"


def create(settings: Settings, tools: Tools) -> Policy:
    return PreloadCache(settings, tools)


class PreloadCache(Policy):
    """Answers loads from what it keeps.

    A prompt and a thread of ours that touches models take turns: the host's list of models has no lock of its own. Threads of
    packs do not, or a prompt that waits for one would wait for ever.
    """

    name = NAME

    def __init__(self, settings: Settings, tools: Tools) -> None:
        self.settings: Settings = settings
        self._tools = tools
        self._snapshot = Snapshot(tools.host.models, tools.bank) if settings.snapshot else None
        learned = Learned(Path(tools.host.server.folder()) / LEARNED) if settings.learn else None
        entries = Entries(tools.ledger, self._snapshot.same if self._snapshot else unchanged)
        # At once: what the host reads while the model is used is then in the page cache to stay, and read once.
        self._loads = Loads(tools, entries, self._snapshot, learned, lambda: self._watch.wake())
        self._turn = threading.RLock()
        self._prompting = False
        self._watch = Watch(tools.ledger, self._pending, self._shrink)
        self._preloader: Preloader | None = None
        self._rules: dict[type[Request], Any] = {
            LoadModel: self._loads.decide, RunPrompt: self._run_prompt, FreeMemory: self._free_memory}
        if self._snapshot is not None:
            self._rules |= {ReadWeights: self._snapshot.read, ListFiles: self._snapshot.list_files,
                            FindFile: self._snapshot.find_file}
        self.answers = frozenset(self._rules)

    def start(self) -> None:
        server = self._tools.host.server
        server.publish(status.PATH, self._status)
        startup = Startup(self.settings, self._tools, self._loads, self._snapshot)
        if startup.wishes or self._snapshot is not None:
            self._preloader = Preloader(self._tools, self._turn, lambda: not self._prompting, self._loads.entries.left,
                                        startup.grant)
            startup.begin(self._preloader)

    def decide(self, request: Request) -> Decision | None:
        rule = self._rules.get(type(request))
        found: Decision | None = rule(request) if rule else None
        return found

    def prompt_ended(self) -> None:
        self._loads.relieve()
        with self._loads.lock:
            self._loads.entries.fit()
            if list(self._loads.entries):
                self._watch.wake()
        try:
            if self._loads.learned is not None:
                self._loads.learned.save()
        except OSError as error:
            log.warning("[residency] what was used cannot be remembered: %s", error)

    def emptied(self) -> None:
        self._drop("ComfyUI was asked to forget everything")

    def close(self) -> None:
        self._watch.stop()
        self._loads.closed = True
        self._drop("the policy was turned off")

    def _drop(self, why: str) -> None:
        if self._preloader is not None:
            self._preloader.stop(why)
        with self._loads.lock:
            self._loads.entries.evict(self._loads.entries, why)

    def _run_prompt(self, request: RunPrompt) -> Decision:
        return Decision("", self._in_turn)

    def _in_turn(self, proceed: Proceed) -> Any:
        with self._turn:
            if self._snapshot is not None and self._snapshot.restored():
                for entry in self._loads.entries:
                    entry.kept.follow_devices()
            with self._loads.lock:
                self._loads.entries.drop_changed()
            self._prompting = True
            try:
                return proceed()
            finally:
                self._prompting = False

    def _free_memory(self, request: FreeMemory) -> Decision | None:
        """A moment at which models may go: the host is about to let go of some itself. Between prompts it takes its turn."""
        if not self._prompting:
            return Decision("", self._freed_in_turn)
        return Decision("", self._relieved) if self._loads.short else None

    def _freed_in_turn(self, proceed: Proceed) -> Any:
        with self._turn:
            return proceed()

    def _relieved(self, proceed: Proceed) -> Any:
        self._loads.relieve()
        return proceed()

    def _pending(self) -> list[Guard] | None:
        with self._loads.lock:
            return None if self._loads.closed or not list(self._loads.entries) else self._loads.entries.guards()

    def _shrink(self, size: int) -> None:
        """Called by the watch: at once between prompts, else at the next moment at which models may go."""
        self._loads.short = size
        if self._turn.acquire(blocking=False):
            try:
                self._loads.relieve()
            finally:
                self._turn.release()

    def _status(self) -> dict[str, Any] | None:
        if self._loads.closed:
            return None
        preloading = self._preloader is not None and self._preloader.busy.is_set()
        return status.of(self._loads, self._tools.ledger, preloading)
