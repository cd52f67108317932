"""The same file, another one under its name, or the same with other bytes."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
from residency.policies.files.identity import Identity, overwritten


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "file"
    file.write_bytes(b"before")
    os.utime(file, ns=(0, 10**18))
    return str(file)


def test_a_file_that_nobody_touched_is_the_same(path: str) -> None:
    """Two looks give equal identities."""
    then = Identity.of(path)
    assert Identity.of(path) == then
    assert not overwritten(path, then)


def test_a_file_written_in_place_is_overwritten(path: str) -> None:
    """The same inode with other bytes shows through every mapping."""
    then = Identity.of(path)
    Path(path).write_bytes(b"after!")
    assert overwritten(path, then)


def test_a_file_that_was_cut_short_is_overwritten_though_its_time_says_nothing(path: str) -> None:
    """A mapping faults past the new end, so the size alone is enough."""
    then = Identity.of(path)
    os.truncate(path, 2)
    os.utime(path, ns=(0, 10**18))
    assert overwritten(path, then)


def test_a_file_that_was_touched_counts_as_overwritten(path: str) -> None:
    """Nobody can tell without reading it all, and loading again is only slow."""
    then = Identity.of(path)
    os.utime(path, ns=(0, 2 * 10**18))
    assert overwritten(path, then)


def test_a_file_that_was_replaced_is_another_and_the_old_mapping_stays_whole(path: str) -> None:
    """Downloaders write beside the file and rename."""
    then = Identity.of(path)
    new = Path(path + ".part")
    new.write_bytes(b"before")
    os.utime(new, ns=(0, 10**18))
    new.replace(path)
    assert Identity.of(path) != then
    assert not overwritten(path, then)


def test_a_file_that_is_gone_was_not_overwritten(path: str) -> None:
    """What was mapped stays whole until it is unmapped."""
    then = Identity.of(path)
    os.unlink(path)
    assert not overwritten(path, then)
    with pytest.raises(OSError):
        Identity.of(path)
