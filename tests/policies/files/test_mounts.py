"""Which mounts are slow, from tables as Linux writes them."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from residency.policies.files import mounts

LINE = "36 35 {number} / {point} rw,noatime shared:1 - {kind} {source} rw\n"


@pytest.fixture
def number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the folder, with tables of our own in place of the system's."""
    device = os.stat(tmp_path).st_dev
    monkeypatch.setattr(mounts, "_MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(mounts, "_BLOCKS", tmp_path / "blocks")
    monkeypatch.setattr(sys, "platform", "linux")
    return f"{os.major(device)}:{os.minor(device)}"


@pytest.mark.parametrize(("kind", "expected"), [
    ("nfs4", "nfs4"), ("cifs", "cifs"), ("9p", "9p"), ("fuse.s3fs", "fuse.s3fs"), ("virtiofs", "virtiofs"), ("ext4", None),
    ("fuseblk", None), ("overlay", None)])
def test_network_file_systems_are_slow(tmp_path: Path, number: str, kind: str, expected: str | None) -> None:
    """NTFS on a local disk is none, though it goes through FUSE."""
    (tmp_path / "mountinfo").write_text(
        LINE.format(number="0:999", point="/other", kind="nfs", source="s:/") +
        LINE.format(number=number, point="/models", kind=kind, source="server:/models"))
    assert mounts.slow(str(tmp_path)) == expected


@pytest.mark.parametrize(("rotational", "expected"), [("1\n", "spinning disk"), ("0\n", None)])
@pytest.mark.parametrize("partition", [False, True])
def test_disks_that_turn_are_slow(tmp_path: Path, number: str, rotational: str, expected: str | None, partition: bool) -> None:
    """A partition is on the disk above it."""
    (tmp_path / "mountinfo").write_text(LINE.format(number=number, point="/", kind="ext4", source="/dev/sda1"))
    disk = tmp_path / "sda"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "rotational").write_text(rotational)
    (disk / "sda1").mkdir()
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / number).symlink_to(disk / "sda1" if partition else disk)
    assert mounts.slow(str(tmp_path)) == expected


def test_a_system_that_does_not_tell_has_no_slow_mounts(tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tables, no file, no Linux."""
    assert mounts.slow(str(tmp_path)) is None
    (tmp_path / "mountinfo").write_text("")
    assert mounts.slow(str(tmp_path / "none")) is None
    for system in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        assert mounts.slow(str(tmp_path)) is None
