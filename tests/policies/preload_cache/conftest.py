"""The policy on a machine whose memory the test sets."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from residency.policies import Tools, memory
from residency.policies.files import mounts
from residency.policies.preload_cache import PreloadCache, Settings
from support.loads import MB, Loader


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The machine: what it has and what is free, in bytes. Its disks are fast, and nobody waits for memory."""
    machine = {"total": 16 * 2**30, "available": 8 * 2**30}

    def numbers() -> tuple[int, int]:
        return machine["total"], machine["available"]

    from residency.policies.preload_cache import entries, status, watch

    for module in (memory, entries, watch, status):
        monkeypatch.setattr(module, "ram", numbers)
    monkeypatch.setattr(watch, "pressure", lambda: None)
    monkeypatch.setattr(mounts, "slow", lambda path: None)
    return machine


@pytest.fixture
def policy(tools: Tools, ram: dict[str, int]) -> Any:
    made = PreloadCache(Settings(), tools)
    made._watch.wake = lambda: None  # type: ignore[method-assign]  # no thread
    yield made
    made.close()


@pytest.fixture
def loader(policy: PreloadCache) -> Loader:
    return Loader(policy)


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Makes a file of some megabytes, sparse."""

    def make(name: str = "a.safetensors", megabytes: int = 1) -> Path:
        path = tmp_path / name
        with path.open("wb") as opened:
            opened.truncate(megabytes * MB)
        return path

    return make
