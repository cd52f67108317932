"""What `GET /residency/status` tells: names and bytes, no paths."""
from __future__ import annotations

import os
import time
from typing import Any

from ..memory import Ledger, Residency, ram
from .entries import NAME, Entries, Entry
from .loads import Loads

PATH = "/residency/status"


def of(loads: Loads, ledger: Ledger, preloading: bool) -> dict[str, Any]:
    """The state of the cache, in plain values."""
    with loads.lock:
        entries = [_entry(loads.entries, entry) for entry in loads.entries]
        total, available = ram()
        return {
            "policy": NAME, "hits": loads.hits, "misses": loads.misses, "preloading": preloading,
            "budget": {"total_bytes": total, "available_bytes": available, "pad_bytes": ledger.pad(),
                       "limit_bytes": ledger.limits.ram, "private_room_bytes": ledger.room(NAME, Residency.HOST),
                       "mapped_room_bytes": ledger.room(NAME, Residency.MAPPED)},
            "bytes": {kind: sum(entry["bytes"][kind] or 0 for entry in entries)
                      for kind in ("device", "pinned", "page_cache", "anonymous")},
            "entries": entries,
        }


def _entry(entries: Entries, entry: Entry) -> dict[str, Any]:
    entry.measure()
    return {
        "name": entry.label, "kind": entry.kind, "files": [os.path.basename(path) for path, _ in entry.files],
        "file_bytes": entry.file_bytes,
        "bytes": {"device": entry.where.get(Residency.DEVICE, 0), "pinned": entry.where.get(Residency.PINNED, 0),
                  "page_cache": entries.cached_bytes(entry) if entry.mapped else 0,
                  "anonymous": entry.where.get(Residency.HOST, 0)},
        "hits": entry.hits, "in_use": entry.kept.in_use(), "keep": entry.keep,
        "idle_seconds": round(time.monotonic() - entry.used, 1),
    }
