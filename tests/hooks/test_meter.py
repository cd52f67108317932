"""What becoming dense costs, told from a sample."""
from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from residency.hooks.gguf_weights.dense import Meter

CPU = torch.device("cpu")


def use(meter: Meter, times: int, device: torch.device = CPU, seconds: float = 0.0, size: int = 100) -> None:
    for _ in range(times):
        mark = meter.start(device)
        time.sleep(seconds if mark is not None else 0)
        meter.stop(mark, size)


def test_all_bytes_are_counted_and_some_uses_are_timed() -> None:
    """The seconds are those of the sample, scaled up."""
    meter = Meter()
    use(meter, 130, seconds=0.01)
    size, seconds = meter.take()

    assert size == 13000
    assert seconds == pytest.approx(1.3, rel=0.5)
    assert meter.take() == (0, None)


def test_too_few_uses_have_no_time() -> None:
    meter = Meter()
    use(meter, 3)
    assert meter.take() == (300, None)


class Event:
    """A device's: done after a while, 2 ms after the one before."""

    done = True

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, other: Any) -> float:
        return 2.0


@pytest.mark.parametrize(("module", "seconds"), [(SimpleNamespace(Event=Event), 0.026), (SimpleNamespace(), None)],
                         ids=["a device with events", "one without"])
def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, module: Any, seconds: float | None) -> None:
    """Its own clock tells, where it has one."""
    monkeypatch.setattr(torch, "meta", module, raising=False)
    meter = Meter()
    use(meter, 13, torch.device("meta"))
    assert meter.take() == (1300, pytest.approx(seconds) if seconds else None)


def test_what_is_not_done_at_the_end_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "meta", SimpleNamespace(Event=Event), raising=False)
    monkeypatch.setattr(Event, "done", False)
    meter = Meter()
    use(meter, 13, torch.device("meta"))
    assert meter.take() == (1300, None)
