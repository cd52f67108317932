"""What every shipped policy promises."""
from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
from residency import policies
from residency import settings as settings_module
from residency.policies import Tools
from residency.policies.policy import Policy, Unfit
from residency.policies.requests import Request
from residency.telemetry.sinks import Ring

NAMES = sorted(policies.tables())


class Stranger(Request):
    """A request that no policy knows."""


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(name: str, tools: Tools) -> Policy:
    module = importlib.import_module(f"residency.policies.{name}")
    made = module.create(module.Settings(), tools)
    assert isinstance(made, Policy)
    return made


def test_policies_are_shipped() -> None:
    """The list is found by looking, and the words are not on it."""
    assert "zero_copy" in NAMES
    assert not set(NAMES) & policies._VOCABULARY


def test_settings_are_frozen_and_have_defaults(name: str) -> None:
    """A table that is left out is the table of defaults."""
    kind = policies.tables()[name]
    assert dataclasses.is_dataclass(kind)
    made = kind()
    assert made == kind()
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))


def test_its_name_is_its_modules_name(name: str, policy: Policy) -> None:
    """And the name of its table."""
    assert policy.name == name
    assert policy.settings == policies.tables()[name]()


def test_it_answers_requests(policy: Policy) -> None:
    """Only kinds of request, and at least one."""
    assert policy.answers
    assert all(issubclass(kind, Request) for kind in policy.answers)


def test_it_has_no_opinion_on_what_it_does_not_know(policy: Policy) -> None:
    """A request of a later version passes it by."""
    assert policy.decide(Stranger()) is None


def test_it_may_be_ended_emptied_and_closed_at_any_time_and_twice(policy: Policy) -> None:
    """Before the first request too."""
    for _ in range(2):
        policy.prompt_ended()
        policy.emptied()
    for _ in range(2):
        policy.close()


def chosen(name: str, **changes: Any) -> settings_module.Settings:
    return settings_module.Settings(policies=(name,), tables={name: policies.tables()[name](**changes)})


def started(name: str, tools: Tools) -> list[Policy]:
    made = policies.load(chosen(name), tools)
    if not made:
        pytest.skip(f"{name} cannot run here")
    return made


def test_with_the_same_settings_it_is_kept(name: str, tools: Tools) -> None:
    """Settings are read again between prompts, mostly without a change."""
    running = started(name, tools)
    assert policies.load(chosen(name), tools, running)[0] is running[0]


def test_it_is_left_out_when_it_is_not_named_or_all_is_off(name: str, tools: Tools) -> None:
    """The user's word."""
    running = started(name, tools)
    off = dataclasses.replace(chosen(name), enabled=False)
    assert policies.load(off, tools, running) == []
    assert policies.load(dataclasses.replace(chosen(name), policies=()), tools, running) == []


def test_a_policy_that_is_unfit_is_left_out_and_says_why(name: str, tools: Tools, ring: Ring,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The others still run."""
    kind = type(importlib.import_module(f"residency.policies.{name}").create(policies.tables()[name](), tools))

    def start(self: Policy) -> None:
        raise Unfit("not here")

    monkeypatch.setattr(kind, "start", start)
    assert policies.load(chosen(name), tools) == []
    assert [event.fields for event in ring.named("policy.declined")] == [{"policy": name, "reason": "not here"}]
    assert policies.load(dataclasses.replace(chosen(name), policies=()), tools) == []


def test_other_settings_make_another_policy(tools: Tools) -> None:
    """And the limits of the ledger follow the settings."""
    running = policies.load(chosen("zero_copy"), tools)
    changed = dataclasses.replace(chosen("zero_copy", read_ahead=False),
                                  memory=settings_module.Memory(ram_gb=1, pinned_gb="auto", pad_gb=0))
    made = policies.load(changed, tools, running)
    assert made[0] is not running[0]
    assert tools.ledger.limits == policies.Limits(ram=2**30, pinned=None, pad=0)
