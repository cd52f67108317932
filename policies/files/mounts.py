"""Is a file on a slow mount? There, one long sequential read beats the small reads of page faults by an order of magnitude."""
from __future__ import annotations

import os
import sys
from pathlib import Path

_NETWORK = ("nfs", "cifs", "smb", "9p", "drvfs", "ceph", "glusterfs", "lustre", "afs", "fuse.", "davfs", "beegfs", "vboxsf",
            "virtiofs")
_MOUNTS = Path("/proc/self/mountinfo")
_BLOCKS = Path("/sys/dev/block")


def slow(path: str) -> str | None:
    """Why a file's mount is slow ("nfs4", "spinning disk"); None for a fast one or where the system does not tell."""
    if sys.platform != "linux":
        return None
    try:
        device = os.stat(path).st_dev
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        left, _, right = line.partition(" - ")
        if left.split()[2] == number and right.split()[0].startswith(_NETWORK):
            return right.split()[0]
    return "spinning disk" if _spins(number) else None


def _spins(number: str) -> bool:
    """Whether a block device turns; a partition asks the disk that it is on."""
    try:
        folder = (_BLOCKS / number).resolve(strict=True)
        for candidate in (folder, folder.parent):
            file = candidate / "queue" / "rotational"
            if file.exists():
                return file.read_text().strip() == "1"
    except OSError:
        pass
    return False
