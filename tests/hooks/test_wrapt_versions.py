"""The same life of a hook on wrapt 1, which some environments still hold."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.loading import ROOT

WRAPT_1 = Path(os.environ.get("WRAPT1_PATH") or Path(sys.prefix) / "wrapt1")

_RUN = """
import sys, wrapt, pytest
assert wrapt.__version__.startswith("1."), wrapt.__version__
sys.exit(pytest.main(["tests/hooks/test_registry.py", "-p", "no:cacheprovider"]))
"""


@pytest.mark.skipif(not (WRAPT_1 / "wrapt").is_dir(), reason=f"no wrapt 1 in {WRAPT_1}; WRAPT1_PATH may name another folder")
def test_hooks_live_the_same_on_wrapt_1() -> None:
    """The lifecycle matrix passes with wrapt 1 first on the path."""
    path = os.pathsep.join(filter(None, (str(WRAPT_1), os.environ.get("PYTHONPATH"))))

    run = subprocess.run([sys.executable, "-c", _RUN], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)

    assert run.returncode == 0, run.stdout[-4000:]
