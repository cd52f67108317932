"""What the system says of a mapping's pages, on real files."""
from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from residency.policies.files import pages

PAGE = mmap.PAGESIZE
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")


class Mapping:
    """A file of 16 pages, mapped copy-on-write."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        with open(path, "wb") as file:
            file.write(os.urandom(16 * PAGE))
            os.fsync(file.fileno())
        self.tensor = torch.from_file(self.path, shared=False, size=16 * PAGE, dtype=torch.uint8)
        self.start = self.tensor.data_ptr()
        self.end = self.start + 16 * PAGE
        self.where = (self.start, self.end, self.path)

    def drop(self) -> None:
        """Lets go of the mapping."""
        del self.tensor


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[Mapping]:
    yield Mapping(tmp_path / "weights.bin")


@linux
def test_a_mapping_is_mapped_until_its_tensor_is_gone(mapping: Mapping) -> None:
    """The last tensor takes the mapping with it."""
    assert pages.is_mapped(*mapping.where) is True
    mapping.drop()
    assert pages.is_mapped(*mapping.where) is False


@linux
def test_other_files_at_other_addresses_do_not_count(mapping: Mapping, tmp_path: Path) -> None:
    """Both the addresses and the name must be this file's."""
    assert pages.is_mapped(mapping.end + 2**30, mapping.end + 2**31, mapping.path) is False
    assert pages.is_mapped(mapping.start, mapping.end, str(tmp_path / "other.bin")) is False


@linux
def test_a_file_that_was_replaced_or_deleted_stays_mapped(mapping: Mapping) -> None:
    """The system lists it as deleted; its pages are still held."""
    os.unlink(mapping.path)
    assert pages.is_mapped(*mapping.where) is True


@linux
def test_reading_leaves_a_mapping_pristine_and_writing_does_not(mapping: Mapping) -> None:
    """A written page has become anonymous memory, and the file does not know of it."""
    mapping.tensor.sum()
    assert pages.is_pristine(*mapping.where) is True
    before = Path(mapping.path).read_bytes()
    mapping.tensor[5 * PAGE] += 1
    assert pages.is_pristine(*mapping.where) is False
    assert Path(mapping.path).read_bytes() == before


@linux
def test_nobody_knows_whether_a_mapping_that_is_gone_was_pristine(mapping: Mapping) -> None:
    """No regions, no answer."""
    mapping.drop()
    assert pages.is_pristine(*mapping.where) is None


def _regions(monkeypatch: pytest.MonkeyPatch, memory_maps: Any) -> None:
    process = SimpleNamespace(memory_maps=memory_maps) if memory_maps else SimpleNamespace()
    monkeypatch.setattr(pages.psutil, "Process", lambda: process)


def _refused(grouped: bool) -> Any:
    raise psutil.AccessDenied


@pytest.mark.parametrize("memory_maps", [None, _refused], ids=["macOS", "refused"])
def test_where_the_system_does_not_tell_the_answer_is_none(memory_maps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS lost the call, and containers may hide it."""
    _regions(monkeypatch, memory_maps)
    assert pages.is_mapped(0, PAGE, "file") is None
    assert pages.is_pristine(0, PAGE, "file") is None


def test_where_regions_have_no_end_the_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows lists one address for each region, which says neither yes nor no."""
    _regions(monkeypatch, lambda grouped: [SimpleNamespace(addr="0x7ff600000000", path="C:\\models\\file", perms="r", rss=1)])
    assert pages.is_mapped(0, PAGE, "file") is None
    assert pages.is_pristine(0, PAGE, "file") is None


def test_a_written_page_that_was_swapped_out_is_still_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anonymous memory in swap is no longer counted as anonymous."""
    region = SimpleNamespace(addr="1000-3000", path="/models/file", anonymous=0, swap=4096)
    _regions(monkeypatch, lambda grouped: [region])
    assert pages.is_pristine(0x1000, 0x3000, "/models/file") is False
    region.swap = 0
    assert pages.is_pristine(0x1000, 0x3000, "/models/file") is True


@linux
def test_a_file_that_was_dropped_from_the_page_cache_is_not_resident(tmp_path: Path) -> None:
    """After a drop little is left in RAM, and after reading all of it is."""
    mapping = Mapping(tmp_path / "cold.bin")
    assert pages.resident_fraction(*mapping.where) == 1.0
    with open(mapping.path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = pages.resident_fraction(*mapping.where)
    if cold == 1.0:
        pytest.skip("this filesystem keeps its pages")
    assert cold is not None
    assert cold < 0.5
    assert pages.read_ahead(mapping.path, 2**30, lambda done, total: None) == 16 * PAGE
    assert pages.resident_fraction(*mapping.where) == 1.0


@linux
def test_residency_counts_from_the_page_on_which_a_tensor_begins(mapping: Mapping) -> None:
    """Tensors do not start on page boundaries."""
    assert pages.resident_fraction(mapping.start + 100, mapping.end - 100, mapping.path) == 1.0


@linux
def test_addresses_that_are_not_mapped_have_no_fraction(mapping: Mapping) -> None:
    """The system refuses, and we say that we do not know."""
    mapping.drop()
    assert pages.resident_fraction(PAGE, 2 * PAGE, mapping.path) is None


def test_files_that_may_not_be_written_have_no_fraction(mapping: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    """For these Linux always answers "all", which would hide a cold file."""
    monkeypatch.setattr(pages.os, "access", lambda path, mode: False)
    assert pages.resident_fraction(*mapping.where) is None


def test_windows_has_no_fraction(mapping: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no mincore."""
    monkeypatch.setattr(pages, "sys", SimpleNamespace(platform="win32"))
    assert pages.resident_fraction(*mapping.where) is None


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "CHUNK", 1000)


def test_read_ahead_reads_all_and_says_how_far_it_is(small_chunks: None, tmp_path: Path) -> None:
    """In pieces, the last one being shorter."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2500))
    said: list[tuple[int, int]] = []
    assert pages.read_ahead(str(path), 10**6, lambda *both: said.append(both)) == 2500
    assert said == [(1000, 2500), (2000, 2500), (2500, 2500)]


def test_read_ahead_stops_at_its_limit(small_chunks: None, tmp_path: Path) -> None:
    """What does not fit into RAM would only push out what was read before."""
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    said: list[tuple[int, int]] = []
    assert pages.read_ahead(str(path), 1500, lambda *both: said.append(both)) == 1500
    assert said == [(1000, 1500), (1500, 1500)]
    assert pages.read_ahead(str(path), 0, lambda *both: said.append(both)) == 0


def test_read_ahead_ends_with_the_file(small_chunks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that shrinks meanwhile does not hold it up."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1500))
    monkeypatch.setattr(pages.os.path, "getsize", lambda path: 4000)
    assert pages.read_ahead(str(path), 10**6, lambda done, total: None) == 1500


def test_what_progress_raises_stops_the_reading(small_chunks: None, tmp_path: Path) -> None:
    """A user who cancels does not wait for a cold disk."""
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    said: list[int] = []

    def progress(done: int, total: int) -> None:
        said.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pages.read_ahead(str(path), 10**6, progress)
    assert said == [1000]


def test_read_ahead_works_where_the_system_takes_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS have no posix_fadvise."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    monkeypatch.delattr(pages.os, "posix_fadvise", raising=False)
    assert pages.read_ahead(str(path), 10**6, lambda done, total: None) == 100


def test_a_reporter_speaks_every_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast read says nothing, a slow one is seen to move."""
    now = [100.0]
    monkeypatch.setattr(pages, "time", SimpleNamespace(monotonic=lambda: now[0]))
    said: list[int] = []
    report = pages.Reporter(said.append)
    for seconds, done in ((0, 1), (1.9, 10), (2, 25), (3.9, 40), (4, 50), (9, 100)):
        now[0] = 100.0 + seconds
        report(done, 100)
    assert said == [25, 50, 100]
    now[0] = 200.0
    report(0, 0)
    assert said == [25, 50, 100, 0]


@pytest.mark.parametrize(("size", "expected"), [(40, True), (60, False)])
def test_windows_maps_only_what_fits_into_half_of_what_is_left(size: int, expected: bool,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy-on-write view is charged to the commit limit in full."""
    windows = SimpleNamespace(name="nt", path=SimpleNamespace(getsize=lambda path: size))
    monkeypatch.setattr(pages, "os", windows)
    monkeypatch.setattr(pages.psutil, "virtual_memory", lambda: SimpleNamespace(available=70))
    monkeypatch.setattr(pages.psutil, "swap_memory", lambda: SimpleNamespace(free=30))
    assert pages.may_map("file") is expected


def test_windows_does_not_map_what_it_cannot_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host says what is wrong with the file."""
    monkeypatch.setattr(pages, "os", SimpleNamespace(name="nt", path=os.path))
    assert pages.may_map("no such file") is False
    monkeypatch.undo()
    assert pages.may_map("no such file") is (os.name != "nt")


@linux
def test_mapped_files_are_listed_with_their_addresses(mapping: Mapping, tmp_path: Path) -> None:
    """Until they are replaced: what lies under the name then is another file."""
    def found() -> list[tuple[int, int]]:
        return [(region.start, region.end) for region in pages.mapped_files() if region.path == mapping.path]

    assert [(mapping.start, mapping.end)] == found()
    regions = pages.mapped_files()
    assert regions == sorted(regions)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    os.replace(other, mapping.path)
    assert found() == []


def test_where_the_system_has_no_list_there_are_no_mapped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS."""
    def gone(*args: Any, **options: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", gone)
    assert pages.mapped_files() == []
