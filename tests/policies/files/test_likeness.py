"""By what a file is known on another machine: what is taken for the same, and what is not."""
from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
from residency.policies.files.identity import Identity
from residency.policies.files.likeness import PAGE, Likeness
from residency.policies.files.maps import Maps
from residency.policies.files.provenance import FileChanged

SIZE = 64 * PAGE
PLACES = [(100, 20 * PAGE), (100 + 20 * PAGE, 1000), (25 * PAGE, 30 * PAGE)]  # a tensor, a small one, and another


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(numpy.random.default_rng(1).integers(0, 256, SIZE, numpy.uint8).tobytes())
    return path


def of(path: Path) -> Likeness:
    return Likeness.of(str(path), Identity.of(str(path)), PLACES)


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def test_a_copy_is_alike(file: Path) -> None:
    """Another inode, another time."""
    known, copy = of(file), file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(1, 1))
    os.replace(copy, file)
    assert known.here() == Identity.of(str(file))


@pytest.mark.parametrize("offset", [100, 100 + 10 * PAGE, 100 + 20 * PAGE - 1, 100 + 20 * PAGE, 25 * PAGE, 55 * PAGE - 1])
def test_a_tensor_that_was_computed_anew_is_seen(file: Path, offset: int) -> None:
    """Each tensor at its ends and in its middle; a single byte tells."""
    known, before = of(file), file.read_bytes()
    write(file, offset, bytes([before[offset] ^ 1]))
    assert known.here() is None


def test_a_longer_file_is_another_one(file: Path) -> None:
    """Whatever is in it."""
    known = of(file)
    with file.open("ab") as opened:
        opened.write(b"x")
    assert known.here() is None


@pytest.mark.parametrize("end", ["gone", "short", "folder"])
def test_what_is_no_such_file(file: Path, end: str) -> None:
    """It is nothing to stumble over."""
    known = of(file)
    if end == "short":
        os.truncate(file, 10)
    else:
        file.unlink()
    if end == "folder":
        file.mkdir()
    assert known.here() is None


def test_a_file_that_is_not_the_one_any_more_is_known_by_nothing(file: Path) -> None:
    """What was mapped of it is not what is in it."""
    before = Identity.of(str(file))
    write(file, 0, b"other")
    os.utime(file, ns=(1, 1))
    with pytest.raises(FileChanged, match="weights"):
        Likeness.of(str(file), before, PLACES)
    file.unlink()
    with pytest.raises(FileChanged):
        Likeness.of(str(file), before, PLACES)


def test_what_was_accepted_is_mapped_under_the_other_machines_identity(file: Path) -> None:
    """Until it is refused."""
    maps, there, known = Maps(), Identity(1, 2, SIZE, 3), of(file)
    with pytest.raises(FileChanged):
        maps.file(str(file), there)
    assert maps.accept(there, known)
    storage = maps.file(str(file), there)
    assert storage.nbytes() == SIZE
    assert maps.file(str(file), Identity.of(str(file))).data_ptr() == storage.data_ptr()
    write(file, 100, b"another")
    assert not maps.accept(there, known)
    with pytest.raises(FileChanged):
        maps.file(str(file), there)
