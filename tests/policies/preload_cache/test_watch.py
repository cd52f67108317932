"""When memory runs short: the numbers, and the thread that looks at them."""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from residency.policies import memory
from residency.policies.memory import Ledger, Limits, Pressure
from residency.policies.preload_cache import watch
from residency.policies.preload_cache.watch import Shortage, Watch
from support.loads import MB


@pytest.fixture
def shortage(ram: dict[str, int]) -> Shortage:
    return Shortage(Ledger(Limits(pad=500 * MB)))


@pytest.mark.parametrize(("available", "short"), [(8000, 0), (500, 0), (400, 100), (0, 500)])
def test_what_the_pad_lacks_is_short(shortage: Shortage, ram: dict[str, int], available: int, short: int) -> None:
    """In megabytes."""
    ram["available"] = available * MB
    assert shortage.look() == short * MB


@pytest.mark.parametrize(("told", "short"), [
    ([(0.0, 5), (0.05, 6)], 0), ([(0.0, 5), (0.2, 6)], watch.STEP), ([(7.0, 5), (7.05, 6)], 0), ([None, (0.9, 6)], 0),
    ([(0.0, 5), None], 0), ([(0.0, 5), (0.9, 5)], 0)])
def test_tasks_that_wait_for_memory_are_a_shortage(shortage: Shortage, monkeypatch: pytest.MonkeyPatch,
                                                   told: list[tuple[float, int] | None], short: int) -> None:
    """A tenth of a second in one second. Kernels without PSI do not tell, and where the kernel took nothing back meanwhile the
    tasks that waited are those of another container."""
    numbers, clock = iter([found and Pressure(*found) for found in told]), iter([1.0, 2.0])
    monkeypatch.setattr(watch, "pressure", lambda: next(numbers))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert [shortage.look(), shortage.look()] == [0, short]


PSI = "some avg10=1.00 avg60=0.50 avg300=0.10 total={some}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n"


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the system's folder of cgroups, with one for us."""
    folder = tmp_path / "ours"
    folder.mkdir()
    monkeypatch.setattr(memory, "_PRESSURE", tmp_path / "pressure")
    monkeypatch.setattr(memory, "_VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(memory, "_cgroup_folder", lambda: [(folder, "memory.max", "memory.current", "")])
    (tmp_path / "vmstat").write_text("nr_free_pages 9\npgscan_kswapd 30\npgscan_direct 12\npgscan_direct_throttle 5\n")
    (folder / "memory.stat").write_text("anon 4096\npgscan 7\npgscan_kswapd 4\n")
    yield folder


def test_the_containers_pressure_comes_before_the_machines(cgroups: Path, tmp_path: Path) -> None:
    """Seconds, of microseconds, and the pages that were looked at, of the same scope."""
    assert memory.pressure() is None
    (tmp_path / "pressure").write_text(PSI.format(some=2_500_000))
    assert memory.pressure() == Pressure(2.5, 42)
    (cgroups / "memory.pressure").write_text(PSI.format(some=4_000_000))
    assert memory.pressure() == Pressure(4.0, 7)


@pytest.mark.parametrize("text", ["", "\n", "some avg10=1.00\n", "\x00"])
def test_pressure_that_cannot_be_read_is_none(cgroups: Path, text: str) -> None:
    """A kernel that writes something else."""
    (cgroups / "memory.pressure").write_text(text)
    assert memory.pressure() is None
    (cgroups / "memory.pressure").write_text(PSI.format(some=1))
    (cgroups / "memory.stat").write_text(text)
    assert memory.pressure() is None


def test_the_thread_says_what_is_short_and_ends_when_nothing_is_kept(ram: dict[str, int]) -> None:
    """And starts again when it is woken."""
    ram["available"] = 400 * MB
    kept, said, called = [True], [], threading.Event()

    def short(size: int) -> None:
        said.append(size)
        called.set()

    one = Watch(Ledger(Limits(pad=500 * MB)), lambda: [] if kept else None, short, every=0.01)
    for _ in range(2):
        called.clear()
        one.wake()
        assert called.wait(10)
    assert set(said) == {100 * MB}
    kept.clear()
    assert one._thread is not None
    one._thread.join(10)
    assert not one._thread.is_alive()
    one.stop()
    one.wake()
    assert not one._thread.is_alive()
