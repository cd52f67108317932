"""Every test sees the plugin's parts as `residency`, beside ComfyUI's own modules."""
from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from support.loading import COMFYUI, ROOT, TREES, VERSIONS, load

__all__ = ["COMFYUI", "ROOT", "TREES", "VERSIONS"]

try:
    load()
except FileNotFoundError as error:
    raise pytest.UsageError(str(error)) from None

from residency import telemetry
from residency.telemetry.sinks import Ring
from support.fixtures import build_simulated_npu, no_simulated_npu

gc.disable()  # until all tests are collected: nearly everything that is made by then stays


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs no server goes first: a mistake shows early, and no server idles beside it."""
    items.sort(key=lambda item: "e2e" in item.path.parts)


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from support.processes import ByServers

    return ByServers(config, log)


@pytest.fixture(scope="session")
def simulated_npu() -> None:
    reason = no_simulated_npu()
    if reason:
        pytest.skip(reason)
    build_simulated_npu()


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Collecting garbage is what ends a model's life in many tests; what was there before need not be searched each time."""
    gc.collect()
    gc.freeze()


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
