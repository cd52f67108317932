"""A small process of its own, which ends what is left of Ray when ComfyUI ends, however that happens.

Most of Ray's processes end with the one that started them, but its agents look for a Ray that is gone for half a minute. Run as
`python undertaker.py PID STARTED`, with the process to outlive; it imports nothing of the plugin.
"""
from __future__ import annotations

import sys
import time

import psutil

_LOOK = 0.5  # seconds
_GRACE = 2.0  # seconds for processes to end by themselves


def rays(host: psutil.Process) -> set[psutil.Process]:
    """Ray's daemons that a process started, and everything that these started."""
    found: set[psutil.Process] = set()
    for child in host.children():
        try:
            if any("ray" in word.replace("\\", "/").split("/") for word in child.cmdline()[:3]):
                found |= {child, *child.children(recursive=True)}
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def outlive(pid: int, started: float) -> None:
    """Waits for a process to end, and ends its Ray."""
    known: set[psutil.Process] = set()
    try:
        host = psutil.Process(pid)
        while abs(host.create_time() - started) < 2 and host.status() != psutil.STATUS_ZOMBIE:
            known = rays(host)
            time.sleep(_LOOK)
    except psutil.NoSuchProcess:
        pass
    _, left = psutil.wait_procs(known, timeout=_GRACE)
    for process in left:
        try:
            process.kill()  # psutil knows a number that is another process's by now
        except psutil.Error:
            continue


if __name__ == "__main__":
    outlive(int(sys.argv[1]), float(sys.argv[2]))
