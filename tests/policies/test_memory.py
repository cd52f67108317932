"""Budgets, and what the system says of RAM."""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from residency.policies import memory
from residency.policies.memory import GB, Ledger, Limits, Residency

MAPPED, PINNED, HOST = Residency.MAPPED, Residency.PINNED, Residency.HOST
Ram = Callable[[float, float], None]


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> Ram:
    """Says how much RAM there is, in GB: in all, and free."""
    def set_to(total: float, available: float) -> None:
        monkeypatch.setattr(memory, "ram", lambda: (int(total * GB), int(available * GB)))
    return set_to


@pytest.mark.parametrize(("total", "pad"), [(64, 6.4), (20, 2), (16, 2), (8, 2), (4, 1), (2, 0.5), (0, 0)])
def test_the_pad_is_two_gigabytes_or_a_tenth_and_a_quarter_at_most(ram: Ram, total: float, pad: float) -> None:
    """Small machines keep 2 GB, large ones a tenth; a small container has room for models all the same."""
    ram(total, total)
    assert Ledger().pad() == int(pad * GB)


def test_the_users_pad_is_taken_whole(ram: Ram) -> None:
    """Even where it is all there is."""
    ram(2, 2)
    assert Ledger(Limits(pad=3 * GB)).pad() == 3 * GB
    assert Ledger(Limits(pad=3 * GB)).room("one", HOST) == 0
    assert Ledger().room("one", HOST) == 3 * GB // 2


def test_room_is_what_is_free_beyond_the_pad(ram: Ram) -> None:
    """With no limits, a policy may keep what the system has to spare."""
    ram(16, 10)
    assert Ledger().room("one", HOST) == 8 * GB


def test_no_room_is_zero_and_never_less(ram: Ram) -> None:
    """A machine that is short of memory does not owe us any."""
    ram(16, 1)
    for residency in Residency:
        assert Ledger().room("one", residency) == 0


def test_private_bytes_that_the_owner_keeps_count_as_free_again_and_mapped_ones_do_not(ram: Ram) -> None:
    """Mapped bytes are page cache, which is part of what is free already."""
    ram(16, 10)
    ledger = Ledger()
    ledger.book("one", HOST, 3 * GB)
    ledger.book("one", MAPPED, 5 * GB)
    assert ledger.room("one", HOST) == 11 * GB
    assert ledger.room("one", MAPPED) == 8 * GB
    assert ledger.room("two", HOST) == 8 * GB


def test_the_users_limit_is_shared_by_all_policies(ram: Ram) -> None:
    """What one policy keeps, another may not."""
    ram(64, 60)
    ledger = Ledger(Limits(ram=10 * GB, pad=0))
    ledger.book("one", HOST, 4 * GB)
    ledger.book("one", MAPPED, 1 * GB)
    assert ledger.room("two", MAPPED) == 5 * GB
    assert ledger.room("one", HOST) == 9 * GB
    ledger.book("one", HOST, 0)
    assert ledger.room("two", MAPPED) == 9 * GB


def test_pinned_room_is_half_of_what_is_free(ram: Ram) -> None:
    """Page-locked memory is the one kind that the system can never take back."""
    ram(16, 10)
    ledger = Ledger(Limits(pad=0))
    assert ledger.room("one", PINNED) == 5 * GB
    ledger.book("one", PINNED, 2 * GB)
    assert ledger.room("one", PINNED) == 6 * GB


def test_the_users_pinned_limit_is_taken_whole_and_shared(ram: Ram) -> None:
    """A number replaces the rule of half, within what is free."""
    ram(16, 10)
    ledger = Ledger(Limits(pinned=7 * GB, pad=0))
    assert ledger.room("one", PINNED) == 7 * GB
    ledger.book("two", PINNED, 3 * GB)
    assert ledger.room("one", PINNED) == 4 * GB
    ram(16, 1)
    assert ledger.room("one", PINNED) == 1 * GB


def test_pinned_zero_means_none_at_all(ram: Ram) -> None:
    """Zero is a number, not "auto"."""
    ram(64, 60)
    assert Ledger(Limits.from_gb("auto", 0, "auto")).room("one", PINNED) == 0
    assert Ledger(Limits.from_gb(0, "auto", "auto")).room("one", MAPPED) == 0


def test_limits_turn_gigabytes_into_bytes_and_auto_into_none() -> None:
    """The `[memory]` table as numbers."""
    assert Limits.from_gb("auto", 1.5, 0) == Limits(ram=None, pinned=3 * GB // 2, pad=0)


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A tree of control groups on a machine with 64 GB, 32 GB of them free; says which group this process is in."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(memory, "_CGROUPS", root)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=32 * GB))
    read = Path.read_text

    def member(lines: str) -> Path:
        def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
            return lines if str(path) == "/proc/self/cgroup" else read(path, *args, **kwargs)
        monkeypatch.setattr(Path, "read_text", read_text)
        return root
    return member


def v2(folder: Path, limit: object, used: int = 0, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def v1(folder: Path, limit: object, used: int = 0, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_without_a_limit_the_machine_counts(cgroup: Callable[[str], Path]) -> None:
    """`max`, no files and a group that is not there all mean no limit."""
    root = cgroup("0::/user\n")
    assert memory.ram() == (64 * GB, 32 * GB)
    v2(root / "user", "max", 5 * GB)
    assert memory.ram() == (64 * GB, 32 * GB)


def test_a_v2_limit_holds(cgroup: Callable[[str], Path]) -> None:
    """The group's limit is the total, and what it does not use is free."""
    v2(cgroup("0::/box\n") / "box", 16 * GB, 6 * GB, f"anon {6 * GB}\ninactive_file 0\n")
    assert memory.ram() == (16 * GB, 10 * GB)


def test_page_cache_inside_a_limit_is_free(cgroup: Callable[[str], Path]) -> None:
    """The page cache is charged to the group and given back before anything is refused, read once or often."""
    v2(cgroup("0::/box\n") / "box", 16 * GB, 14 * GB, f"anon {2 * GB}\ninactive_file {5 * GB}\nactive_file {7 * GB}\n")
    assert memory.ram() == (16 * GB, 14 * GB)


def test_the_tightest_group_on_the_way_up_wins(cgroup: Callable[[str], Path]) -> None:
    """A parent may be narrower than the group itself, and `max` on the way is passed over."""
    root = cgroup("0::/slice/service/leaf\n")
    v2(root / "slice", 8 * GB, 7 * GB)
    v2(root / "slice" / "service", "max", 1 * GB)
    v2(root / "slice" / "service" / "leaf", 12 * GB, 1 * GB)
    assert memory.ram() == (8 * GB, 1 * GB)


def test_a_container_that_sees_only_its_own_root_uses_that(cgroup: Callable[[str], Path]) -> None:
    """The path in /proc may name a folder that only the host has."""
    root = cgroup("0::/docker/abcdef\n")
    v2(root, 4 * GB, 1 * GB)
    assert memory.ram() == (4 * GB, 3 * GB)


def test_a_v1_limit_holds(cgroup: Callable[[str], Path]) -> None:
    """The older layout: one tree per controller, other names."""
    root = cgroup("12:cpu,cpuacct:/box\n7:memory:/box\n1:name=systemd:/box\n0::/box\n")
    v1(root / "memory" / "box", 16 * GB, 6 * GB, f"inactive_file 1\ntotal_inactive_file {1 * GB}\ntotal_active_file {2 * GB}\n")
    assert memory.ram() == (16 * GB, 13 * GB)


def test_v1_without_a_limit_is_a_huge_number(cgroup: Callable[[str], Path]) -> None:
    """What v1 says for "none" is larger than any machine."""
    v1(cgroup("7:memory:/\n") / "memory", 9223372036854771712, 60 * GB)
    assert memory.ram() == (64 * GB, 32 * GB)


def test_more_in_use_than_the_limit_leaves_nothing(cgroup: Callable[[str], Path]) -> None:
    """A limit that was lowered under a running process is not a negative number."""
    v2(cgroup("0::/box\n") / "box", 2 * GB, 3 * GB)
    assert memory.ram() == (2 * GB, 0)


def test_without_proc_there_are_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS."""
    monkeypatch.setattr(Path, "read_text", _no_proc)
    assert memory._cgroup_folder() == []
    assert memory.ram()[0] == psutil.virtual_memory().total


def _no_proc(*_: Any, **__: Any) -> str:
    raise FileNotFoundError("no /proc here")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_this_process_has_private_and_file_backed_memory() -> None:
    """Linux tells them apart."""
    held = memory.process_memory()
    assert held.private > 0
    assert held.file > 0
    assert held.storage_read >= 0


def test_without_proc_all_memory_counts_as_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS tell only the sum."""
    monkeypatch.setattr(Path, "read_text", _no_proc)
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(
        memory_info=lambda: SimpleNamespace(rss=5 * GB), io_counters=lambda: SimpleNamespace(read_bytes=7)))
    assert memory.process_memory() == memory.ProcessMemory(private=5 * GB, file=0, storage_read=7)


def _hidden() -> Any:
    raise psutil.AccessDenied


@pytest.mark.parametrize("process", [
    {}, {"io_counters": _hidden}, {"io_counters": lambda: SimpleNamespace()},
], ids=["no counters", "hidden counters", "counters without bytes"])
def test_bytes_read_are_zero_where_they_are_not_told(process: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no counters, and some containers hide them."""
    memory_info = {"memory_info": lambda: SimpleNamespace(rss=1)}
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(**memory_info, **process))
    assert memory.process_memory().storage_read == 0


def test_trimming_gives_back_what_was_freed_between_blocks_that_live() -> None:
    """Pages of small blocks, which the C library keeps for later; harmless where it cannot be asked."""
    blocks = [bytes(60_000) for _ in range(2000)]
    kept = blocks[::50]
    blocks.clear()
    before = memory.process_memory().private
    memory.trim()
    assert memory.process_memory().private <= before
    assert len(kept) == 40


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_elsewhere_nothing_is_trimmed(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no such call, and no C library of that name to open."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", None)
    memory.trim()
