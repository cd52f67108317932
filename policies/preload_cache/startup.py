"""What happens at the start: the lists are read, and loaded before the port opens or in the background."""
from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...settings import SettingsError
from ...telemetry import emit, log
from ..memory import trim
from . import wishes
from .loads import Loads
from .preloader import Preloader
from .settings import Settings
from .snapshot import Snapshot
from .wishes import Wish

if TYPE_CHECKING:
    from .. import Tools


class Startup:
    """
    Attributes:
        preloader: None where there is nothing to load.
    """

    def __init__(self, settings: Settings, tools: Tools, loads: Loads, snapshot: Snapshot | None) -> None:
        self._settings, self._tools, self._loads, self._snapshot = settings, tools, loads, snapshot
        self._place = settings.auto_gpu_load
        self.wishes = self._gather()
        if self._place and snapshot is not None:
            log.warning("[residency] auto_gpu_load is left out: a snapshot is taken before anything is on the device")
            self._place = False

    def begin(self, preloader: Preloader) -> None:
        """Has them loaded when every pack is there."""

        def work() -> None:
            preloader.run(self.wishes)
            if self._snapshot is not None:
                gc.collect()
                trim()  # what was freed would be in the snapshot too
                self._snapshot.remember_devices()

        self._tools.host.server.at_start(self._settings.when == "before", work)

    def grant(self, wish: Wish) -> str | None:
        """Loads one wish, by the host's own loader; why it is not kept, None if it is."""
        with self._loads.granting(wish) as granted:
            self._tools.host.models.load(wish.recipe)
        entry = granted.entry
        if entry is None:
            return granted.problem
        if self._place:
            entry.kept.place()
        with self._loads.lock:
            guards = self._loads.entries.guards()
        for guard in guards:
            with suppress(OSError):  # it is loaded all the same
                guard.populate()
        return None

    def _gather(self) -> list[Wish]:
        found = wishes.listed(self._settings)
        if self._settings.import_:
            found += self._imported(Path(self._tools.host.server.folder()) / self._settings.import_)
        found, again = wishes.without_duplicates(found)
        for wish in again:
            log.info("[residency] %s is listed more than once, and loaded once", wish.label)
        if self._loads.learned is not None:
            found, _ = wishes.without_duplicates([*found, *self._loads.learned.most_used()])
        return found

    def _imported(self, file: Path) -> list[Wish]:
        try:
            imported = wishes.read(file)
        except SettingsError as error:
            log.warning("[residency] %s", error)
            return []
        self._place = self._place or imported.auto_gpu_load
        emit("cache.imported", file=str(file), wishes=[wish.label for wish in imported.wishes],
             auto_gpu_load=imported.auto_gpu_load, skipped=list(imported.skipped))
        return list(imported.wishes)
