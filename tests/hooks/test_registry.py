"""The life of a hook: one matrix for every hook, on ComfyUI's own functions and on a small host made here."""
from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import wrapt
from residency.hooks import HookRegistry, all_hooks
from residency.hooks.registry import Hook
from residency.hooks.seam import Seam, Site
from residency.policies.files.bank import Bank
from residency.policies.requests import Request
from residency.telemetry.sinks import Ring
from support.answers import Policies


class Asked(Request):
    """What the hooks of this file ask."""


class Listener:
    """Who real hooks tell of prompts; no prompt runs here."""

    chain = None

    def prompt_starts(self) -> None: ...


REAL = all_hooks(Bank(), Listener())
FAKE = (
    Hook(Seam("fake_host", "read", ("path",), ("fake_copy:read", "fake_late:read")), Asked, lambda call: Asked()),
    Hook(Seam("fake_host", "Thing.fill", ("size",)), Asked, lambda call: Asked()),
)


def let_host(request: Request, host: Callable[[Request], Any]) -> Any:
    return host(request)


@dataclass
class Subject:
    """A hook whose translation is a plain one, and the function that it watches."""

    hook: Hook
    site: Site

    def __post_init__(self) -> None:
        self.policies = Policies()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.outcome: Any = object()
        owner = self.site.owner
        self.instance: Any = None
        if inspect.isclass(owner):
            self.instance = object.__new__(type("Double", (owner,), {"__del__": lambda self: None}))

    @property
    def name(self) -> str:
        return self.hook.name

    @property
    def now(self) -> Any:
        """What the owner holds, without binding it."""
        return vars(self.site.owner).get(self.site.name)

    @now.setter
    def now(self, function: Any) -> None:
        setattr(self.site.owner, self.site.name, function)

    @property
    def seen(self) -> Any:
        """What most neighbours find, and wrap: `module.function`, `Class.method`."""
        return getattr(self.site.owner, self.site.name)

    def registry(self, **changes: Any) -> HookRegistry:
        return HookRegistry([replace(self.hook, **changes)], self.policies)

    def installed(self, **changes: Any) -> HookRegistry:
        registry = self.registry(**changes)
        registry.sync({Asked})
        assert "installed" == state(registry)
        return registry

    def copies(self) -> list[Any]:
        return [getattr(module, name) for module, name in self.hook.seam.copies()]

    def arguments(self) -> tuple[Any, ...]:
        """What a caller must pass."""
        return tuple(object() for parameter in self.site.signature.parameters.values()
                     if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)

    def call(self, *args: Any) -> Any:
        """As the host's caller does: a function by its module's name, a method on an instance."""
        function = self.now
        if inspect.isclass(self.site.owner):
            function = function.__get__(self.instance, type(self.instance))
        return function(*args)

    def answers(self) -> None:
        """Checks that one call reaches the host once, as it was made, and that its answer comes back."""
        self.calls.clear()
        args = self.arguments()
        answer = self.call(*args)
        bound = (self.instance, *args) if inspect.isclass(self.site.owner) else args
        assert [(bound, {})] == self.calls
        assert self.outcome is answer


def state(registry: HookRegistry) -> str:
    (line,) = registry.report()
    return line[1]


@pytest.fixture(params=FAKE + REAL, ids=lambda hook: hook.name)
def subject(request: pytest.FixtureRequest, fake_host: ModuleType) -> Iterator[Subject]:
    """A hook on the function that is there, which is put back whatever a test leaves."""
    hook: Hook = replace(request.param, asks=Asked, translate=lambda call: Asked(), amend=None, report=None)
    site = hook.seam.resolve()
    copies = {(module, name): getattr(module, name) for module, name in hook.seam.copies()}
    assert all(copy is site.original for copy in copies.values())
    yield Subject(hook, site)
    setattr(site.owner, site.name, site.original)
    for (module, name), copy in copies.items():
        setattr(module, name, copy)


@pytest.fixture
def played(subject: Subject) -> Subject:
    """A hook on a stand-in of the same shape, which can be called without a model."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        subject.calls.append((args, kwargs))
        if isinstance(subject.outcome, BaseException):
            raise subject.outcome
        return subject.outcome

    stand_in.__signature__ = inspect.signature(subject.site.original)
    copies = list(subject.hook.seam.copies())
    for owner, name in ((subject.site.owner, subject.site.name), *copies):
        setattr(owner, name, stand_in)
    subject.site = subject.hook.seam.resolve()
    assert stand_in is subject.site.original
    return subject


def with_functools(function: Any) -> Any:
    @functools.wraps(function)
    def foreign(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return foreign


def with_closure(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)


def with_wrapt(function: Any) -> Any:
    return wrapt.FunctionWrapper(function, lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs))


polite = pytest.mark.parametrize("foreign", [with_functools, with_wrapt])
any_neighbour = pytest.mark.parametrize("foreign", [with_functools, with_wrapt, with_closure])
either_way = pytest.mark.parametrize("found", ["seen", "now"])


class TestInstalling:
    def test_replaces_the_function_and_its_copies(self, subject: Subject) -> None:
        """The owner and the modules that imported the name hold one and the same wrapper."""
        registry = subject.installed()

        wrapper = registry.entries[subject.name].wrapper
        assert wrapper is subject.now
        assert subject.site.original is wrapper.__wrapped__
        assert all(copy is wrapper for copy in subject.copies())

    def test_twice_wraps_once(self, subject: Subject) -> None:
        """A second sync, or the next prompt's, changes nothing."""
        registry = subject.installed()
        wrapper = subject.now

        registry.sync({Asked})

        assert wrapper is subject.now
        assert subject.site.original is wrapper.__wrapped__

    def test_keeps_what_the_function_looks_like(self, subject: Subject) -> None:
        """Signature, name and kind are the host's: others inspect them."""
        original = subject.site.original
        subject.installed()

        assert inspect.signature(original) == inspect.signature(subject.now)
        assert (original.__name__, original.__qualname__, original.__module__, original.__doc__) == (
            subject.now.__name__, subject.now.__qualname__, subject.now.__module__, subject.now.__doc__)
        assert inspect.isfunction(subject.now)
        assert inspect.isfunction(original) is inspect.isfunction(getattr(subject.site.owner, subject.site.name))
        assert original.__code__ is subject.now.__code__

    def test_again_after_removal(self, subject: Subject) -> None:
        """Install, remove, install wraps once; and then it can be removed again."""
        registry = subject.installed()
        registry.remove_all()

        registry.sync({Asked})

        assert "installed" == state(registry)
        assert subject.site.original is subject.now.__wrapped__
        registry.remove_all()
        assert subject.site.original is subject.now

    def test_declines_where_the_function_is_gone(self, subject: Subject, ring: Ring) -> None:
        """A host that moved costs the hook, with a reason, and nothing appears where nothing was."""
        delattr(subject.site.owner, subject.site.name)
        registry = subject.registry()

        registry.sync({Asked})
        registry.sync({Asked})

        assert "declined" == state(registry)
        assert subject.now is None
        if subject.hook.seam.optional:  # older hosts have none, which is no news
            assert ring.named("hook.declined") == []
            return
        (event,) = ring.named("hook.declined")
        assert subject.name == event.fields["hook"]
        assert "of its own" in event.fields["reason"]

    def test_declines_where_a_parameter_is_gone(self, subject: Subject, ring: Ring) -> None:
        """A host whose function changed its shape keeps its function."""
        seam = replace(subject.hook.seam, needs=(*subject.hook.seam.needs, "gone"))
        registry = subject.registry(seam=seam)

        registry.sync({Asked})

        assert "declined" == state(registry)
        assert subject.site.original is subject.now
        assert "no parameter gone" in ring.named("hook.declined")[0].fields["reason"]

    def test_declines_where_a_second_copy_of_the_plugin_did(self, subject: Subject, ring: Ring) -> None:
        """Of two copies in `custom_nodes` one works; the other says so and leaves no trace."""
        first = subject.installed()
        wrapper = subject.now
        second = subject.registry()

        second.sync({Asked})
        second.remove_all()

        assert ("installed", "declined") == (state(first), state(second))
        assert wrapper is subject.now
        assert "second copy" in ring.named("hook.declined")[0].fields["reason"]

    @polite
    @either_way
    def test_declines_where_a_second_copy_is_under_a_neighbour(
            self, subject: Subject, foreign: Callable[..., Any], found: str) -> None:
        """A pack that wrapped between the two copies does not hide the first."""
        subject.installed()
        subject.now = foreign(getattr(subject, found))
        second = subject.registry()

        second.sync({Asked})

        assert "declined" == state(second)


class TestRemoving:
    @pytest.mark.parametrize("remove", [HookRegistry.remove_all, lambda registry: registry.sync(None),
                                        lambda registry: registry.sync(())], ids=["all", "sync none", "sync unwanted"])
    def test_puts_the_original_back(self, subject: Subject, remove: Callable[[HookRegistry], None]) -> None:
        """The very same object, in the same place, with nothing added to it or beside it."""
        beside, on_it = set(vars(subject.site.owner)), dict(vars(subject.site.original))
        registry = subject.installed()

        remove(registry)

        assert "removed" == state(registry)
        assert subject.site.original is subject.now
        assert all(copy is subject.site.original for copy in subject.copies())
        assert beside == set(vars(subject.site.owner))
        assert on_it == vars(subject.site.original)

    def test_twice_is_once(self, subject: Subject) -> None:
        """Removing what is not there does nothing."""
        registry = subject.installed()

        registry.remove_all()
        registry.remove_all()
        registry.sync(None)

        assert subject.site.original is subject.now

    def test_never_installed_is_nothing_to_remove(self, subject: Subject, ring: Ring) -> None:
        """A plugin that is turned off in its settings touches nothing."""
        registry = subject.registry()

        registry.sync(None)
        registry.remove_all()

        assert "new" == state(registry)
        assert subject.site.original is subject.now
        assert not ring.events

    def test_leaves_a_copy_that_somebody_replaced(self, subject: Subject) -> None:
        """A neighbour's own function in a module that had imported ours stays."""
        registry = subject.installed()
        theirs = object()
        for module, name in subject.hook.seam.copies():
            setattr(module, name, theirs)

        registry.remove_all()

        assert all(copy is theirs for copy in subject.copies())


class TestCalls:
    def test_reach_the_host_as_they_were_made(self, played: Subject) -> None:
        """A policy without an opinion changes nothing: same arguments, same answer, one call, one question."""
        registry = played.installed()

        played.answers()

        assert 1 == len(played.policies.asked)
        assert 1 == registry.entries[played.name].hits

    def test_after_removal_ask_nobody(self, played: Subject) -> None:
        """Install, use, remove: the host is alone again."""
        registry = played.installed()
        played.answers()
        registry.remove_all()

        played.answers()

        assert 1 == len(played.policies.asked)

    def test_through_a_reference_kept_over_removal_ask_nobody(self, played: Subject) -> None:
        """Somebody who kept our wrapper has a plain pass-through."""
        registry = played.installed()
        kept = played.now
        registry.remove_all()
        played.now = kept

        played.answers()

        assert not played.policies.asked

    def test_with_nothing_to_ask_go_to_the_host(self, played: Subject) -> None:
        """A translator that finds no question leaves the call alone, and reports nothing."""
        reports: list[Any] = []
        played.installed(translate=lambda call: None, report=lambda *report: reports.append(report))

        played.answers()

        assert not played.policies.asked
        assert not reports

    @pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=["error", "cancel"])
    def test_raise_the_hosts_own_error(self, played: Subject, ring: Ring, error: BaseException) -> None:
        """The same object goes up, the host is not asked again, and the hook is none the worse."""
        reports: list[Any] = []
        registry = played.installed(report=lambda *report: reports.append(report))
        played.outcome = error

        with pytest.raises(type(error)) as caught:
            played.call(*played.arguments())

        assert error is caught.value
        assert 1 == len(played.calls)
        assert "installed" == state(registry)
        assert not reports
        assert not ring.named("hook.failed")

    def test_whose_translation_fails_go_to_the_host(self, played: Subject, ring: Ring) -> None:
        """The host answers, the hook disarms itself and says so once; no later sync tries it again."""

        def translate(call: Any) -> Request:
            raise KeyError("budget")

        registry = played.installed(translate=translate)

        played.answers()
        played.answers()
        registry.sync({Asked})
        played.answers()

        assert ("declined", "KeyError: 'budget'") == registry.report()[0][1:]
        assert not played.policies.asked
        (event,) = ring.named("hook.failed")
        assert (played.name, "KeyError: 'budget'") == (event.fields["hook"], event.fields["error"])

    def test_whose_report_fails_keep_the_hosts_answer(self, played: Subject, ring: Ring) -> None:
        """Only the log line is lost: the host's answer is returned and the host is not asked twice."""

        def report(*args: Any) -> None:
            raise ValueError("no bytes")

        registry = played.installed(report=report)

        played.answers()
        played.answers()

        assert "declined" == state(registry)
        assert 1 == len(played.policies.asked)
        assert 1 == len(ring.named("hook.failed"))

    def test_are_reported_after_the_host_answered(self, played: Subject) -> None:
        """The report gets the question, the answer and the seconds."""
        reports: list[Any] = []
        played.installed(report=lambda *report: reports.append(report))

        played.answers()

        ((call, request, answer, seconds),) = reports
        assert call.spent
        assert [request] == played.policies.asked
        assert played.outcome is answer
        assert 0 <= seconds < 10

    def test_while_probing_are_counted_and_nothing_else(self, played: Subject, ring: Ring) -> None:
        """The self-test sees that a hook fires; nobody is asked and nothing is reported."""
        registry = played.installed(report=lambda *report: played.policies.asked.append(report[1]))

        with registry.probing():
            played.answers()

        assert 1 == registry.entries[played.name].hits
        assert not played.policies.asked
        assert not ring.events
        registry.tell()
        (event,) = ring.named("hook.installed")
        assert {"hook": played.name, "exercised": True} == event.fields

    def test_are_asked_again_after_probing_failed(self, played: Subject) -> None:
        """A self-test that raises does not leave the hooks deaf."""
        registry = played.installed()
        with pytest.raises(OSError, match="disk full"), registry.probing():
            raise OSError("disk full")

        played.answers()

        assert 1 == len(played.policies.asked)

    def test_answered_by_a_policy_do_not_reach_the_host(self, played: Subject) -> None:
        """The policy's answer is what the caller gets."""
        registry = HookRegistry([played.hook], lambda request, host: "mapped")
        registry.sync({Asked})

        assert "mapped" == played.call(*played.arguments())
        assert not played.calls


class TestAFailedHook:
    def test_is_taken_out_when_the_plugin_is_turned_off(self, played: Subject) -> None:
        """A disarmed wrapper is not left behind, and the hook is not tried again when the plugin is turned on."""
        registry = played.installed(translate=lambda call: call["gone"])
        played.answers()

        registry.sync(None)

        assert played.site.original is played.now
        assert all(copy is played.site.original for copy in played.copies())
        registry.sync({Asked})
        assert "declined" == state(registry)
        assert played.site.original is played.now


class TestNeighbours:
    @any_neighbour
    @either_way
    def test_on_top_stays_when_we_go(self, played: Subject, ring: Ring, foreign: Callable[..., Any], found: str) -> None:
        """Taking ourselves out would take them out: we retire in place, once, and pass everything through."""
        registry = played.installed()
        played.now = theirs = foreign(getattr(played, found))
        played.answers()

        registry.sync(None)
        registry.remove_all()

        assert "retired" == state(registry)
        assert theirs is played.now
        assert all(copy is played.site.original for copy in played.copies())
        assert 1 == len(ring.named("hook.retired"))
        played.answers()
        assert 1 == len(played.policies.asked)

    @any_neighbour
    @either_way
    def test_on_top_does_not_make_us_wrap_twice(self, played: Subject, foreign: Callable[..., Any], found: str) -> None:
        """A retired hook that is wanted again wakes up where it is, copies included."""
        registry = played.installed()
        wrapper = played.now
        played.now = theirs = foreign(getattr(played, found))
        registry.sync(None)

        registry.sync({Asked})

        assert "installed" == state(registry)
        assert theirs is played.now
        assert all(copy is wrapper for copy in played.copies())
        played.answers()
        assert 1 == len(played.policies.asked)

    def test_who_leaves_later_lets_us_go_too(self, played: Subject) -> None:
        """A neighbour that restores what it found leaves our pass-through, which the next sync takes out."""
        registry = played.installed()
        wrapper = played.now
        played.now = with_closure(wrapper)
        registry.sync(None)
        played.now = wrapper

        registry.sync(None)

        assert "removed" == state(registry)
        assert played.site.original is played.now

    @polite
    @either_way
    def test_below_is_wrapped_and_put_back(self, played: Subject, foreign: Callable[..., Any], found: str) -> None:
        """A neighbour who came first, and kept the signature, is part of the host for us."""
        played.now = theirs = foreign(getattr(played, found))
        registry = played.installed()
        played.answers()
        assert 1 == len(played.policies.asked)

        registry.remove_all()

        assert theirs is played.now
        played.answers()

    @polite
    @either_way
    def test_on_top_is_not_in_our_way(self, subject: Subject, ring: Ring, foreign: Callable[..., Any], found: str) -> None:
        """A wrapper that says what it wraps is seen through."""
        registry = subject.installed()
        subject.now = foreign(getattr(subject, found))

        registry.check_reach()

        assert not ring.events

    def test_who_replaces_is_told_of_once_and_left_alone(self, subject: Subject, ring: Ring) -> None:
        """An assignment over our wrapper is found at the next prompt; the replacement stays when we go."""

        def replacement(*args: Any, **kwargs: Any) -> str:
            return "theirs"

        registry = subject.installed()
        subject.now = replacement

        registry.check_reach()
        registry.check_reach()

        (event,) = ring.named("hook.shadowed")
        assert {"hook": subject.name, "by": __name__} == event.fields
        registry.remove_all()
        assert replacement is subject.now
        assert "theirs" == subject.now()

    def test_nobody_is_nothing_to_tell(self, subject: Subject, ring: Ring) -> None:
        """Most prompts."""
        registry = subject.installed()

        registry.check_reach()

        assert not ring.events


class TestCopiesOfAName:
    def imported_late(self) -> ModuleType:
        late = ModuleType("fake_late")
        late.read = sys.modules["fake_host"].read
        sys.modules["fake_late"] = late
        return late

    def test_imported_after_us_ask_and_are_put_back(self, fake_host: ModuleType) -> None:
        """A module that is imported while we are in gets our wrapper, and the original when we go."""
        original, policies = fake_host.read, Policies()
        registry = HookRegistry(FAKE[:1], policies)
        registry.sync({Asked})
        late = self.imported_late()

        assert ("read", "a", None, False) == late.read("a")
        assert 1 == len(policies.asked)
        registry.remove_all()
        assert original is late.read

    def test_imported_between_two_lives_ask_again(self, fake_host: ModuleType) -> None:
        """A module that imported the original while we were out is reached when we come back."""
        policies = Policies()
        registry = HookRegistry(FAKE[:1], policies)
        registry.sync({Asked})
        registry.sync(None)
        late = self.imported_late()

        registry.sync({Asked})
        late.read("a")

        assert 1 == len(policies.asked)

    def test_ask_once(self, fake_host: ModuleType) -> None:
        """The copy and the original are one seam: a call passes one wrapper."""
        policies = Policies()
        HookRegistry(FAKE[:1], policies).sync({Asked})

        sys.modules["fake_copy"].read("a")

        assert 1 == len(policies.asked)


@dataclass(frozen=True)
class Sized(Request):
    size: int


class TestAmending:
    def amended(self, fake_host: ModuleType, amend: Callable[[Any], dict[str, Any]] | None) -> Any:
        hook = Hook(FAKE[1].seam, Sized, lambda call: Sized(call["size"]), amend)
        HookRegistry([hook], lambda request, host: host(replace(request, size=7))).sync({Sized})
        return fake_host.Thing().fill(3, full=True)

    def test_a_changed_request_becomes_changed_arguments(self, fake_host: ModuleType) -> None:
        """The policy's number reaches the host's parameter; the others are as they were."""
        assert ("fill", 7, True) == self.amended(fake_host, lambda request: {"size": request.size})

    def test_a_hook_that_cannot_amend_lets_the_host_answer(self, fake_host: ModuleType) -> None:
        """Where no argument stands for the change, the host gets what it was given."""
        assert ("fill", 3, True) == self.amended(fake_host, None)

    def test_an_unbound_call_is_the_same_seam(self, fake_host: ModuleType) -> None:
        """`Class.method(instance, …)`, as `torch.nn.Module.to(model, …)`: the instance is found."""
        instances: list[Any] = []
        hook = Hook(FAKE[1].seam, Asked, lambda call: instances.append(call.instance))
        HookRegistry([hook], let_host).sync({Asked})
        thing = fake_host.Thing()

        assert ("fill", 3, False) == fake_host.Thing.fill(thing, 3)
        assert [thing] == instances


    def test_a_call_on_a_stranger_is_the_hosts(self, fake_host: ModuleType, ring: Ring) -> None:
        """`Class.method(x)` with another class's object binds as it was meant, or is left alone: the hook stays."""
        sizes: list[int] = []
        hook = Hook(FAKE[1].seam, Asked, lambda call: sizes.append(call["size"]))
        HookRegistry([hook], let_host).sync({Asked})

        assert ("fill", 3, False) == fake_host.Thing.fill(object(), 3)
        assert sizes in ([], [3])
        assert not ring.named("hook.failed")


@pytest.fixture
def real() -> Iterator[HookRegistry]:
    registry = HookRegistry(REAL, let_host)
    yield registry
    registry.remove_all()


def armed(registry: HookRegistry) -> set[str]:
    return {name for name, state, _ in registry.report() if state == "installed"}


class TestTheRealHooks:
    reporting = {hook.name for hook in REAL if hook.report is not None}

    def test_have_names_of_their_own(self) -> None:
        """The ledger has one line for each."""
        assert len(REAL) == len({hook.name for hook in REAL})

    def test_are_in_the_matrix(self, request: pytest.FixtureRequest) -> None:
        """Every hook goes through every test above that takes a subject."""
        cases = [item.callspec for item in request.session.items
                 if item.path == request.path and "subject" in getattr(item, "fixturenames", ())]
        if request.config.option.keyword or any("[" in arg for arg in request.config.args):
            pytest.skip("only a part of the matrix was selected")

        found = {case.params["subject"].name for case in cases}

        assert {hook.name for hook in (*FAKE, *REAL)} == found

    def test_all_find_their_place_in_this_comfyui(self, real: HookRegistry) -> None:
        """With everything wanted, none declines."""
        real.sync({hook.asks for hook in REAL})

        assert {hook.name for hook in REAL} == armed(real)

    def test_that_report_are_in_whatever_the_policies_want(self, real: HookRegistry) -> None:
        """Telemetry works without a policy; a hot seam stays untouched until a policy needs it."""
        real.sync(())

        assert self.reporting == armed(real)
        assert "torch.nn.modules.module.Module.to" not in armed(real)

    @pytest.mark.parametrize("kind", sorted({hook.asks for hook in REAL}, key=lambda kind: kind.__name__))
    def test_come_and_go_with_what_the_policies_want(self, real: HookRegistry, kind: type[Request]) -> None:
        """One more kind of request is exactly its hooks more; without it they go again."""
        real.sync({kind})
        assert self.reporting | {hook.name for hook in REAL if hook.asks is kind} == armed(real)

        real.sync(())
        assert self.reporting == armed(real)

    def test_leave_comfyui_as_it_was(self, real: HookRegistry) -> None:
        """Off is off: every function is the object that it was before."""
        sites = [hook.seam.resolve() for hook in REAL]
        real.sync({hook.asks for hook in REAL})
        assert all(vars(site.owner)[site.name] is not site.original for site in sites)

        real.sync(None)

        assert not armed(real)
        assert all(vars(site.owner)[site.name] is site.original for site in sites)

    def test_do_not_mind_a_missing_one(self, real: HookRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where one declines, the others work."""
        site = REAL[0].seam.resolve()
        monkeypatch.delattr(site.owner, site.name)

        real.sync({hook.asks for hook in REAL})

        assert {hook.name for hook in REAL[1:]} == armed(real)
