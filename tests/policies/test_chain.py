"""Who is asked, in which order, and what happens when somebody fails."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from residency import telemetry
from residency.policies.chain import PolicyChain
from residency.policies.policy import Decision, Effect, OutOfMemory, Policy, Proceed, Refusal
from residency.policies.requests import EmptyMemory, Request
from residency.telemetry.sinks import Ring

Act = Callable[[Proceed], Any]


@dataclass(frozen=True)
class Question(Request):
    """A request that nobody but these tests knows."""

    text: str = "?"


class Opinion(Policy):
    """Acts as it is told, and remembers what it was asked."""

    answers = frozenset({Question})

    def __init__(self, name: str, act: Act | None = None, decide: Callable[[Request], Decision | None] | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self.asked: list[Request] = []
        self.closed = 0
        self._act, self._decide = act, decide

    def decide(self, request: Request) -> Decision | None:
        self.asked.append(request)
        if self._decide is not None:
            return self._decide(request)
        return Decision(f"{self.name} knows", self._act) if self._act else None

    def close(self) -> None:
        self.closed += 1


class Host:
    """The host's own answer, counted."""

    def __init__(self, answer: Callable[[Request], Any] = lambda request: "host") -> None:
        self.requests: list[Request] = []
        self._answer = answer

    def __call__(self, request: Request) -> Any:
        self.requests.append(request)
        return self._answer(request)


class Cancel(BaseException):
    """As ComfyUI's own: not an Exception."""


def raises(error: BaseException) -> Callable[..., Any]:
    def act(*_: Any) -> Any:
        raise error
    return act


def wraps(name: str) -> Act:
    return lambda proceed: f"{name}({proceed()})"


def after(error: BaseException) -> Act:
    def act(proceed: Proceed) -> Any:
        proceed()
        raise error
    return act


def test_without_policies_the_host_answers() -> None:
    """An empty chain is ComfyUI alone."""
    assert PolicyChain().answer(Question(), Host()) == "host"


def test_no_opinion_leaves_the_answer_to_the_host() -> None:
    """A policy that returns None was asked and changes nothing."""
    policy = Opinion("silent")
    assert PolicyChain([policy]).answer(Question(), Host()) == "host"
    assert policy.asked == [Question()]


def test_a_decision_replaces_the_hosts_answer() -> None:
    """A policy that does not proceed keeps the host from running."""
    host = Host()
    assert PolicyChain([Opinion("own", lambda proceed: "mine")]).answer(Question(), host) == "mine"
    assert host.requests == []


def test_decisions_nest_in_the_order_of_the_settings() -> None:
    """The first policy acts around the second, the second around the host."""
    chain = PolicyChain([Opinion("first", wraps("first")), Opinion("none"), Opinion("second", wraps("second"))])
    assert chain.answer(Question(), Host()) == "first(second(host))"
    assert chain.names() == ["first", "none", "second"]


def test_a_policy_behind_one_that_does_not_proceed_is_not_asked() -> None:
    """Who answers alone decides alone."""
    second = Opinion("second", wraps("second"))
    PolicyChain([Opinion("own", lambda proceed: "mine"), second]).answer(Question(), Host())
    assert second.asked == []


def test_an_amended_request_reaches_the_next_policy_and_the_host() -> None:
    """What a policy changes is what everybody behind it sees."""
    first = Opinion("first", decide=lambda request: Decision("", lambda proceed: proceed(replace(request, text="new"))))
    second, host = Opinion("second", wraps("second")), Host()
    assert PolicyChain([first, second]).answer(Question("old"), host) == "second(host)"
    assert second.asked == [Question("new")]
    assert host.requests == [Question("new")]


def test_proceeding_twice_is_an_error_and_the_host_runs_once() -> None:
    """The host's function is never run a second time."""
    host = Host()
    with pytest.raises(RuntimeError, match="once"):
        PolicyChain([Opinion("twice", lambda proceed: (proceed(), proceed()))]).answer(Question(), host)
    assert len(host.requests) == 1


def test_a_decision_with_a_reason_is_recorded_and_one_without_is_not(ring: Ring) -> None:
    """Decisions that come once per module would drown the log."""
    quiet = Opinion("quiet", decide=lambda request: Decision("", lambda proceed: proceed()))
    PolicyChain([Opinion("loud", wraps("loud")), quiet]).answer(Question(), Host())
    fields = [event.fields for event in ring.named("policy.decided")]
    assert fields == [{"policy": "loud", "request": "Question", "reason": "loud knows"}]


def test_when_decide_raises_the_next_is_asked(ring: Ring) -> None:
    """A policy that cannot make up its mind is passed over, and that is recorded."""
    chain = PolicyChain([Opinion("broken", decide=raises(KeyError("oops"))), Opinion("next", wraps("next"))])
    assert chain.answer(Question(), Host()) == "next(host)"
    fields = [event.fields for event in ring.named("policy.failed")]
    assert fields == [{"policy": "broken", "request": "Question", "error": "KeyError: 'oops'"}]


def test_when_act_raises_before_the_host_ran_the_rest_of_the_chain_answers(ring: Ring) -> None:
    """The next policies and the host answer as if the broken one were not there."""
    host = Host()
    chain = PolicyChain([Opinion("broken", raises(ValueError("early"))), Opinion("next", wraps("next"))])
    assert chain.answer(Question(), host) == "next(host)"
    assert len(host.requests) == 1
    assert [event.fields["error"] for event in ring.named("policy.failed")] == ["ValueError: early"]


def test_when_act_raises_after_the_host_ran_the_error_goes_up(ring: Ring) -> None:
    """The host is not run again to hide a policy's failure."""
    host, error = Host(), ValueError("late")
    with pytest.raises(ValueError) as raised:
        PolicyChain([Opinion("broken", after(error))]).answer(Question(), host)
    assert raised.value is error
    assert len(host.requests) == 1
    assert [event.fields["policy"] for event in ring.named("policy.failed")] == ["broken"]


def test_a_late_failure_is_blamed_on_one_policy_only(ring: Ring) -> None:
    """An outer policy passes an inner policy's error on and is not reported for it."""
    error = ValueError("late")
    with pytest.raises(ValueError) as raised:
        PolicyChain([Opinion("outer", wraps("outer")), Opinion("inner", after(error))]).answer(Question(), Host())
    assert raised.value is error
    assert [event.fields["policy"] for event in ring.named("policy.failed")] == ["inner"]


def test_the_hosts_own_error_goes_up_as_the_same_object(ring: Ring) -> None:
    """The host's failure is nobody's fault here, and runs through two policies untouched."""
    error = RuntimeError("out of memory")
    host = Host(raises(error))
    with pytest.raises(RuntimeError) as raised:
        PolicyChain([Opinion("first", wraps("first")), Opinion("second", wraps("second"))]).answer(Question(), host)
    assert raised.value is error
    assert len(host.requests) == 1
    assert ring.named("policy.failed") == []


def test_a_policy_may_answer_in_place_of_the_hosts_error() -> None:
    """What a policy catches inside `act` is its own affair."""
    def act(proceed: Proceed) -> Any:
        try:
            return proceed()
        except RuntimeError:
            return "rescued"

    assert PolicyChain([Opinion("rescuer", act)]).answer(Question(), Host(raises(RuntimeError("oom")))) == "rescued"


@pytest.mark.parametrize("where", ["in act", "in the host", "in decide"])
def test_cancel_goes_up_untouched(where: str, ring: Ring) -> None:
    """ComfyUI's Cancel is no Exception, and no reason to try anything else."""
    cancel = Cancel()
    policy = Opinion("decides", decide=raises(cancel)) if where == "in decide" else Opinion(
        "acts", raises(cancel) if where == "in act" else wraps("acts"))
    host = Host(raises(cancel) if where == "in the host" else lambda request: "host")
    with pytest.raises(Cancel) as raised:
        PolicyChain([policy]).answer(Question(), host)
    assert raised.value is cancel
    assert len(host.requests) == (1 if where == "in the host" else 0)
    assert ring.named("policy.failed") == []


def test_a_cancel_that_is_an_ordinary_exception_is_recognised(ring: Ring) -> None:
    """Older hosts raise Cancel as an Exception; `is_cancel` tells it from a policy's failure."""
    cancel, host = InterruptedError("stop"), Host()
    chain = PolicyChain([Opinion("acts", raises(cancel))], is_cancel=lambda error: isinstance(error, InterruptedError))
    with pytest.raises(InterruptedError) as raised:
        chain.answer(Question(), host)
    assert raised.value is cancel
    assert host.requests == []
    assert ring.named("policy.failed") == []


def test_a_refusal_goes_up_and_the_host_does_not_run(ring: Ring) -> None:
    """Going on would make a wrong image, so the user gets to read why not."""
    host = Host()
    with pytest.raises(Refusal, match="overwritten"):
        PolicyChain([Opinion("refuses", raises(Refusal("overwritten")))]).answer(Question(), host)
    assert host.requests == []
    assert ring.named("policy.failed") == []


def test_a_policy_is_not_asked_about_what_it_caused_itself() -> None:
    """Inside `act` the others are asked, the acting policy is not."""
    chain = PolicyChain()
    builder = Opinion("builder", lambda proceed: (chain.answer(Question("inner"), Host()), proceed()))
    other = Opinion("other", wraps("other"))
    chain.switch([builder, other])
    assert chain.answer(Question("outer"), Host()) == ("other(host)", "other(host)")
    assert builder.asked == [Question("outer")]
    assert other.asked == [Question("inner"), Question("outer")]


def test_a_policy_is_asked_about_what_the_host_causes_inside_proceed() -> None:
    """A read inside the host's build was not caused by the policy that decided on the build."""
    policy = Opinion("policy", wraps("policy"))
    chain = PolicyChain([policy])
    host = Host(lambda request: chain.answer(Question("inner"), Host()))
    assert chain.answer(Question("outer"), host) == "policy(policy(host))"
    assert policy.asked == [Question("outer"), Question("inner")]


def test_what_the_host_causes_for_a_policy_that_acts_further_out_is_still_that_policys() -> None:
    """An inner policy's `proceed` gives back the outer situation, not an empty one."""
    chain = PolicyChain()
    outer = Opinion("outer")
    outer._act = lambda proceed: chain.answer(Question("inner"), Host(lambda r: chain.answer(Question("deep"), Host())))
    other = Opinion("other", wraps("other"))
    chain.switch([outer, other])
    chain.answer(Question("first"), Host())
    assert outer.asked == [Question("first")]
    assert other.asked == [Question("inner"), Question("deep")]


def test_a_policy_that_failed_is_asked_the_next_time() -> None:
    """Nobody stays marked as acting after an error."""
    policy = Opinion("broken", raises(ValueError("early")))
    chain = PolicyChain([policy])
    chain.answer(Question("one"), Host())
    chain.answer(Question("two"), Host())
    assert policy.asked == [Question("one"), Question("two")]


def test_a_policy_is_asked_only_what_it_answers() -> None:
    """Requests that are not in `answers` pass it by."""
    policy = Opinion("policy", wraps("policy"))
    assert PolicyChain([policy]).answer(EmptyMemory(), Host()) == "host"
    assert policy.asked == []


def test_wanted_is_the_union_of_all_answers() -> None:
    """Hooks that nobody needs are not installed."""
    assert PolicyChain().wanted() == frozenset()
    other = Opinion("other")
    other.answers = frozenset({EmptyMemory})
    assert PolicyChain([Opinion("one"), other]).wanted() == {Question, EmptyMemory}


def test_switching_closes_those_that_are_gone(ring: Ring) -> None:
    """A policy that stays is left alone; one that cannot be closed is not in the way."""
    stays, goes, broken = Opinion("stays"), Opinion("goes"), Opinion("broken")
    broken.close = raises(OSError("stuck"))  # type: ignore[method-assign]
    broken.close.__name__ = "close"
    chain = PolicyChain([broken, stays, goes])
    chain.switch([stays, Opinion("new")])
    assert (stays.closed, goes.closed) == (0, 1)
    assert chain.names() == ["stays", "new"]
    assert [event.fields["policy"] for event in ring.named("policy.failed")] == ["broken"]


def test_a_request_under_way_keeps_the_policies_it_started_with_or_their_successors() -> None:
    """Switching inside `act` neither crashes nor runs the host twice."""
    chain, host = PolicyChain(), Host()
    policy = Opinion("first", lambda proceed: (chain.switch([]), proceed())[1])
    chain.switch([policy, Opinion("second", wraps("second"))])
    assert chain.answer(Question(), host) == "host"
    assert len(host.requests) == 1


class Reporting(Opinion):
    """Has something to say at the end of a prompt."""

    def __init__(self, name: str, end: Callable[[], Effect | None]) -> None:
        super().__init__(name)
        self._end = end
        self.emptied_times = 0

    def prompt_ended(self) -> Effect | None:
        return self._end()

    def emptied(self) -> None:
        self.emptied_times += 1
        self._end()


def test_the_end_of_a_prompt_collects_the_effects_that_are_reported(ring: Ring) -> None:
    """None is no report, and one policy's failure does not hide another's."""
    effect = Effect(10, 9)
    chain = PolicyChain([Reporting("raises", raises(ValueError("x"))), Reporting("says", lambda: effect),
                         Reporting("silent", lambda: None)])
    assert chain.prompt_ended() == {"says": effect}
    assert [event.fields["policy"] for event in ring.named("policy.failed")] == ["raises"]
    assert [event.fields["request"] for event in ring.named("policy.failed")] == ["prompt_ended"]


def test_every_policy_hears_that_memory_was_emptied(ring: Ring) -> None:
    """`POST /free` reaches the second policy though the first one fails."""
    first, second = Reporting("first", raises(ValueError("x"))), Reporting("second", lambda: None)
    PolicyChain([first, second]).emptied()
    assert (first.emptied_times, second.emptied_times) == (1, 1)
    assert [event.fields["policy"] for event in ring.named("policy.failed")] == ["first"]


BEHAVIOURS: dict[str, Callable[[str], Opinion]] = {
    "none": lambda name: Opinion(name),
    "decide raises": lambda name: Opinion(name, decide=raises(ValueError(name))),
    "act raises before": lambda name: Opinion(name, raises(ValueError(name))),
    "passes through": lambda name: Opinion(name, lambda proceed: proceed()),
    "act raises after": lambda name: Opinion(name, after(ValueError(name))),
}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(sorted(BEHAVIOURS)), max_size=6))
def test_whatever_policies_do_the_host_runs_once_and_its_answer_survives(behaviours: list[str]) -> None:
    """Only a failure after the host ran can keep its answer from the caller, and each failure is recorded once."""
    policies = [BEHAVIOURS[kind](f"{index}") for index, kind in enumerate(behaviours)]
    host, sink = Host(), telemetry.attach(Ring())
    try:
        answer = PolicyChain(policies).answer(Question(), host)
    except ValueError as error:
        late = [index for index, kind in enumerate(behaviours) if kind == "act raises after"]
        assert str(error) == f"{late[-1]}"
    else:
        assert "act raises after" not in behaviours
        assert answer == "host"
    finally:
        telemetry.detach(sink)
    assert len(host.requests) == 1
    failed = [int(event.fields["policy"]) for event in sink.named("policy.failed")]
    reached = [index for index, kind in enumerate(behaviours) if "before" in kind or "decide" in kind]
    assert set(reached) <= set(failed)
    assert len(failed) == len(set(failed))


class Repeatable(Question):
    """One that the host may be asked again."""

    repeats = 2


class DeviceFull(RuntimeError):
    """As torch's own."""


def full(error: BaseException) -> bool:
    return isinstance(error, DeviceFull)


def tries(times: int, request: Request | None = None) -> Act:
    """Asks so many times, and lets go of every error but the last."""
    def act(proceed: Proceed) -> Any:
        for _ in range(times - 1):
            try:
                return proceed(request)
            except RuntimeError:
                pass
        return proceed(request)
    return act


def repeating(policy_tries: int, request: Request, *errors: BaseException) -> tuple[Any, Host, BaseException | None]:
    """(answer, host, error) of a policy that tries so often, of a host that fails so."""
    pending = list(errors)

    def answer(_: Request) -> str:
        if pending:
            raise pending.pop(0)
        return "host"

    policy, host = Opinion("tries", tries(policy_tries)), Host(answer)
    policy.answers = frozenset({Question, Repeatable})
    try:
        return PolicyChain([policy], is_oom=full).answer(request, host), host, None
    except RuntimeError as error:
        return None, host, error


def test_the_host_is_asked_again_after_its_out_of_memory() -> None:
    """As often as the request says."""
    answer, host, _ = repeating(3, Repeatable(), DeviceFull("1"), DeviceFull("2"))
    assert (answer, len(host.requests)) == ("host", 3)


def test_it_is_not_asked_once_more_than_the_request_says(ring: Ring) -> None:
    """A policy that goes on is stopped."""
    _, host, error = repeating(5, Repeatable(), *(DeviceFull(str(number)) for number in range(9)))
    assert len(host.requests) == 3
    assert "once" in str(error)


@pytest.mark.parametrize(("request_", "error"), [(Repeatable(), RuntimeError("shapes")), (Question(), DeviceFull("1"))])
def test_no_other_request_and_no_other_error_is_repeated(request_: Request, error: BaseException) -> None:
    """The host runs once."""
    _, host, found = repeating(2, request_, error)
    assert len(host.requests) == 1
    assert "once" in str(found)


def test_a_refusal_for_lack_of_memory_counts_as_the_hosts() -> None:
    """The host never raised, and would have gone on in another way."""
    answer, host, _ = repeating(2, Repeatable(), OutOfMemory("tiles"))
    assert (answer, len(host.requests)) == ("host", 2)


def test_the_last_error_of_the_host_goes_up_as_the_same_object(ring: Ring) -> None:
    """And nobody is blamed for it."""
    errors = [DeviceFull(str(number)) for number in range(3)]
    _, _, found = repeating(3, Repeatable(), *errors)
    assert found is errors[2]
    assert ring.named("policy.failed") == []


def test_those_behind_are_asked_at_each_attempt() -> None:
    """They may answer otherwise, now that there is more room."""
    host = Host(raises(DeviceFull("full")))
    first, second = Opinion("first", tries(2)), Opinion("second", lambda proceed: proceed())
    first.answers = second.answers = frozenset({Repeatable})
    with pytest.raises(DeviceFull):
        PolicyChain([first, second], is_oom=full).answer(Repeatable(), host)
    assert (len(second.asked), len(host.requests)) == (2, 2)
