"""Starts the ranks of a group, each a process of its own that prints what it found as JSON."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from residency.policies.ray_shard.worker.ports import open_port

from .loading import ROOT


def ranks_of(module: str, count: int, groups: int, seconds: float = 240) -> list[Any]:
    """What `support.<module>.main()` prints in each of so many processes; they get their rank and a port for each group.

    Raises:
        AssertionError: one of them fails; with what it says.
        subprocess.TimeoutExpired: one does not end in time.
    """
    program = f"from support import loading; loading.load(); from support import {module}; {module}.main()"
    ports = [str(open_port()) for _ in range(groups)]
    started = [subprocess.Popen([sys.executable, "-c", program, str(rank), *ports], cwd=ROOT / "tests", text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
               for rank in range(count)]
    try:
        said = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(errors for _, errors in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]
