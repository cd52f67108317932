"""Is this still the same file?"""
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True)
class Identity:
    """A file at a moment: device, inode, size in bytes, modification time in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | IO[bytes]) -> Identity:
        """Of what is under a path, or of an open file.

        Raises:
            OSError: there is no such file, or it may not be looked at.
        """
        stat = os.stat(path if isinstance(path, str) else path.fileno())
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def overwritten_by(self, now: Identity) -> bool:
        """The same inode with other contents: a mapping of it shows new bytes, or faults past its new end.

        A file that was *replaced* (another inode under the name) leaves mappings of the old one whole.
        """
        return (self.device, self.inode) == (now.device, now.inode) and self != now


def overwritten(path: str, then: Identity) -> bool:
    """Whether the file that was mapped has been written to since. A file that is gone was not."""
    try:
        return then.overwritten_by(Identity.of(path))
    except OSError:
        return False
