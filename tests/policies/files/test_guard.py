"""The mapping that keeps a file in the page cache: real files, and the kernel's own numbers."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from residency.policies.files import guard as guard_module
from residency.policies.files import pages
from residency.policies.files.guard import Guard

MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="a guard holds nothing here")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(os.urandom(5 * MB + 123))
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
    return path


def drop(file: Path) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mapped(file: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]


def made(file: Path) -> Guard:
    guard = Guard.of(str(file))
    assert guard is not None
    return guard


@linux
def test_pages_stay_though_the_kernel_is_asked_to_drop_them(file: Path) -> None:
    """Without the guard they go, which is the negative control."""
    guard = made(file)
    assert guard.populate()
    drop(file)
    held = pages.cached_fraction(str(file))
    guard.close()
    drop(file)

    assert (held, guard.resident()) == (1.0, 0)
    assert (pages.cached_fraction(str(file)) or 0) < 0.1


@linux
def test_a_cold_file_is_read(file: Path) -> None:
    """In pieces, each whole."""
    drop(file)
    guard = made(file)
    guard_module.CHUNK, before = MB, guard_module.CHUNK
    try:
        assert guard.populate()
    finally:
        guard_module.CHUNK = before
    assert (guard.size, guard.resident()) == (file.stat().st_size, file.stat().st_size)
    assert all(" r--s " in line for line in mapped(file))
    guard.close()
    assert mapped(file) == []


@linux
def test_it_stops_between_pieces_and_goes_on_later(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run short, or the server end."""
    monkeypatch.setattr(guard_module, "CHUNK", MB)
    guard, turns = made(file), iter([True, True, False])
    assert not guard.populate(lambda: next(turns))
    assert (guard.size, guard.complete) == (2 * MB, False)
    assert guard.populate()
    guard.close()


@linux
@pytest.mark.parametrize("change", ["cut", "grown", "replaced"])
def test_a_file_that_is_another_one_now_is_not_held(file: Path, change: str) -> None:
    """What was kept of it is stale anyway; nothing faults."""
    guard = made(file)
    if change == "replaced":
        other = file.with_name("b")
        other.write_bytes(b"x" * 5 * MB)
        os.replace(other, file)
    else:
        os.truncate(file, MB if change == "cut" else 9 * MB)
    assert not guard.populate()
    assert guard.size == 0


@linux
def test_a_file_that_is_cut_short_under_it_does_not_fault(file: Path) -> None:
    """It never reads through the mapping."""
    guard = made(file)
    guard.populate()
    os.truncate(file, 0)
    assert guard.resident() is not None
    guard.close()


@linux
def test_closed_it_maps_nothing_more(file: Path) -> None:
    """Though another thread is filling it."""
    guard = made(file)
    guard.close()
    assert not guard.populate()
    assert mapped(file) == []


@linux
def test_a_file_that_is_gone_is_an_error(file: Path) -> None:
    """For the caller to shrug at."""
    guard = made(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        guard.populate()


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_elsewhere_there_is_none(file: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """Windows locks a mapped file, macOS does not drop pages on request."""
    monkeypatch.setattr(sys, "platform", system)
    assert Guard.of(str(file)) is None


def test_windows_does_not_tell_what_is_cached(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a file counts as cold."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert pages.cached_fraction(str(file)) is None


def test_an_empty_file_has_nothing_to_be_cached(tmp_path: Path) -> None:
    """It cannot be mapped."""
    (tmp_path / "none").touch()
    assert pages.cached_fraction(str(tmp_path / "none")) is None
