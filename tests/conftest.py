"""Loads the plugin as ComfyUI does, by its path, under the name `residency`; and ComfyUI's own modules for the CPU."""
from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSIONS = ("0.16.3", "0.18.2", "0.24.0", "0.30.0")
TREES = Path(os.environ.get("COMFYUI_TREES", ROOT / ".venv" / "comfyui"))
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or TREES / VERSIONS[-1])

if not (COMFYUI / "main.py").exists():
    raise pytest.UsageError(f"no ComfyUI in {COMFYUI}. Run `make setup`, or let COMFYUI_PATH name yours.")

os.environ["RESIDENCY_DISABLE"] = "1"  # unit tests want the parts, not a running plugin
sys.path.insert(0, str(COMFYUI))

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True


def _load_plugin() -> None:
    spec = importlib.util.spec_from_file_location("residency", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["residency"] = module
    spec.loader.exec_module(module)


_load_plugin()
del os.environ["RESIDENCY_DISABLE"]

from residency import telemetry  # noqa: E402
from residency.telemetry.sinks import Ring  # noqa: E402


@pytest.fixture
def ring() -> Iterator[Ring]:
    """What telemetry was told during the test."""
    sink = Ring()
    telemetry.attach(sink)
    yield sink
    telemetry.detach(sink)


@pytest.fixture(autouse=True)
def no_sink_stays() -> Iterator[None]:
    """A test leaves no sink behind."""
    before = list(telemetry._sinks)
    yield
    assert before == telemetry._sinks
