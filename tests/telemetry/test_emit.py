"""Events reach every sink, and a sink that fails harms nobody."""
from __future__ import annotations

import logging
from typing import Any

import pytest
from residency import telemetry
from residency.telemetry import emit
from residency.telemetry.event import Event
from residency.telemetry.sinks import Ring


class Broken:
    """A sink that raises, and counts how often it was asked and closed."""

    def __init__(self, on_close: Exception | None = None) -> None:
        self.asked = self.closed = 0
        self._on_close = on_close

    def __call__(self, event: Event) -> None:
        self.asked += 1
        raise RuntimeError("out of paper")

    def close(self) -> None:
        self.closed += 1
        if self._on_close:
            raise self._on_close

    def __repr__(self) -> str:
        return "the printer"


def test_event_reaches_every_sink_with_its_fields(ring: Ring) -> None:
    """All sinks get the same frozen fact, in the order in which they were attached."""
    second = telemetry.attach(Ring())
    emit("memory.freed", device="cuda:0", models=2)
    telemetry.detach(second)
    assert ring.events == second.events
    assert [(event.name, event.fields) for event in ring.events] == [("memory.freed", {"device": "cuda:0", "models": 2})]


def test_a_field_may_be_called_name(ring: Ring) -> None:
    """The event's name is positional only, so it takes no word from the fields."""
    emit("memory.freed", name="x")
    assert ring.events[0].fields == {"name": "x"}


def test_unknown_event_raises_before_any_sink_hears(ring: Ring) -> None:
    """A typo in a name is found by the first test that runs the line."""
    with pytest.raises(ValueError, match=r"unknown event 'weights\.maped'"):
        emit("weights.maped")
    assert list(ring.events) == []


def test_event_as_dict_has_time_name_and_fields() -> None:
    """This is what a line of the file holds."""
    written = Event("memory.emptied", {"seconds": 2.0}, 1.2346).as_dict()
    assert written == {"at": 1.235, "event": "memory.emptied", "seconds": 2.0}


@pytest.mark.parametrize("on_close", [None, OSError(28, "No space left on device")])
def test_raising_sink_is_detached_and_said_once(on_close: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    """The others still get this event and the next ones, even where the sink cannot even be closed."""
    broken, other = telemetry.attach(Broken(on_close)), telemetry.attach(Ring())
    with caplog.at_level(logging.WARNING, "residency"):
        emit("memory.emptied", seconds=1.0)
        emit("memory.emptied", seconds=2.0)
    telemetry.detach(other)
    assert (broken.asked, broken.closed) == (1, 1)
    assert [event.fields["seconds"] for event in other.events] == [1.0, 2.0]
    assert [record.getMessage() for record in caplog.records] == \
        ["[residency] telemetry sink the printer stopped: out of paper. The images are not affected."]


def test_sink_that_detaches_itself_and_raises_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    """It left of its own accord, or another thread saw it fail first."""

    def fickle(event: Event) -> None:
        telemetry.detach(fickle)
        raise RuntimeError("bye")

    telemetry.attach(fickle)
    emit("memory.emptied", seconds=0.0)
    assert caplog.records == []


def test_detach_ignores_a_stranger() -> None:
    """Detaching twice is no error."""
    sink = telemetry.attach(Ring())
    telemetry.detach(sink)
    telemetry.detach(sink)


def test_detach_closes_what_can_be_closed() -> None:
    """A file must not stay open when the settings choose another."""
    broken = telemetry.attach(Broken())
    telemetry.detach(broken)
    assert broken.closed == 1


def test_replace_puts_new_sinks_in_place_of_all() -> None:
    """After a change of the settings, nothing of the old choice is left."""
    old, new = Broken(), Ring()
    telemetry.attach(old)
    telemetry.replace([new])
    emit("memory.emptied", seconds=0.0)
    telemetry.replace([])
    emit("memory.emptied", seconds=0.0)
    assert (old.asked, old.closed, len(new.events)) == (0, 1, 1)


def test_fields_may_hold_anything_that_json_takes(ring: Ring) -> None:
    """Nested tables are handed on as they are."""
    policies: dict[str, Any] = {"zero_copy": {"predicted_bytes": 1}}
    emit("prompt.finished", policies=policies)
    assert ring.events[0].fields["policies"] == policies
