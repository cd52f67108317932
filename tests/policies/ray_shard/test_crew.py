"""The workers together, with a Ray of the test's own: started once, waited for, called off, replaced, ended."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import ray.exceptions as failures
from residency.policies.ray_shard import actor, cluster, crew, launching, workers
from residency.policies.ray_shard.crew import Crew
from residency.policies.ray_shard.settings import Settings, WorkerSettings
from residency.policies.ray_shard.workers import Failed, Lost, Worker
from residency.telemetry.sinks import Ring

NEVER = object()  # an answer that does not come
Script = Callable[..., Any]


class Cancel(BaseException):
    """The host's."""


class Reference:
    """An answer, or an error, that is there or will be."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def ready(self) -> bool:
        return self.value is not NEVER

    def get(self) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class Actor:
    """A worker's process. `script` answers what it is asked: an error is raised there, NEVER leaves it at it."""

    def __init__(self, script: Script, environment: dict[str, str], named: dict[str, Any]) -> None:
        self.script, self.environment, self.named, self.node = script, environment, named, named.pop("scheduling_strategy")
        self.asked: list[tuple[Any, ...]] = []
        self.references: list[Reference] = []
        self.killed = False
        self.start = SimpleNamespace(remote=lambda twin, options: self._ask("start", dict(twin), options))
        self.ask = SimpleNamespace(remote=self._ask)
        self.tell = SimpleNamespace(options=lambda concurrency_group: SimpleNamespace(remote=self._ask))

    def _ask(self, what: str, *arguments: Any) -> Reference:
        self.asked.append((what, *arguments))
        try:
            value = failures.RayActorError() if self.killed else self.script(what, *arguments)
        except Exception as error:
            value = failures.RayTaskError(what, "", error)
        self.references.append(Reference(value))
        return self.references[-1]

    def die(self) -> None:
        self.killed = True
        for reference in self.references:
            if not reference.ready:
                reference.value = failures.RayActorError()

    def heard(self, what: str) -> list[tuple[Any, ...]]:
        return [tuple(arguments) for name, *arguments in self.asked if name == what]


def willing(what: str, *arguments: Any) -> Any:
    """A worker that does as it is told."""
    return {"start": {"free_bytes": 5}, "address": "127.0.0.1:7", "about": {"private_bytes": 1, "shared_bytes": 2,
                                                                           "free_bytes": 3}}.get(what)


class FakeRay:
    """As much of Ray as the crew uses."""

    exceptions = failures

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.inits: list[dict[str, Any]] = []
        self.shutdowns = 0
        self.running = False
        self.script: Script = willing
        self.init_error: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.around: dict[str, str] = {}  # environment of every other host
        self.cloudpickle = SimpleNamespace(register_pickle_by_value=lambda module: None)

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        assert self.go_on.wait(10)
        self.inits.append(options)
        if self.init_error is not None:
            raise self.init_error
        self.running = True

    def shutdown(self) -> None:
        self.running = False
        self.shutdowns += 1

    def remote(self, **options: Any) -> Any:
        def make(environment: dict[str, str], **named: Any) -> Actor:
            self.actors.append(Actor(self.script, environment, named))
            return self.actors[-1]

        def task(**where: Any) -> Any:
            return SimpleNamespace(remote=lambda: Reference(self.around))

        return lambda kind: SimpleNamespace(options=task) if kind is actor.surroundings else SimpleNamespace(
            options=lambda **named: SimpleNamespace(remote=lambda environment: make(environment, **named)))

    def wait(self, references: Sequence[Reference], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        end = time.monotonic() + timeout
        while sum(one.ready for one in references) < num_returns and time.monotonic() < end:
            time.sleep(0.002)
        return [one for one in references if one.ready], [one for one in references if not one.ready]

    def get(self, references: Any, timeout: float | None = None) -> Any:
        many = references if isinstance(references, list) else [references]
        _, late = self.wait(many, len(many), 10 if timeout is None else timeout)
        if late:
            raise failures.GetTimeoutError("late")
        answers = [one.get() for one in many]
        return answers if isinstance(references, list) else answers[0]

    def kill(self, actor: Actor) -> None:
        assert actor is not None
        actor.die()

    def alive(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.killed]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for module in (crew, workers, cluster, launching):
        monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(cluster, "_outlive", lambda: None)
    monkeypatch.setattr(cluster, "on", lambda node: node)
    monkeypatch.setattr(cluster, "nodes", lambda hosts: {host: f"node of {host}" for host in hosts})
    monkeypatch.setattr(cluster, "others", lambda hosts: {host: host for host in hosts})
    monkeypatch.setattr(actor, "sources", lambda twin: {"ComfyUI": ("1.0", "abc")})
    monkeypatch.setattr(crew, "_GRACE", 0.2)
    return fake


class Host:
    """The user's Cancel, if `cancel` is set; `looked` counts."""

    def __init__(self) -> None:
        self.cancel: BaseException | None = None
        self.looked = 0

    def raise_if_cancelled(self) -> None:
        self.looked += 1
        if self.cancel is not None:
            cancel, self.cancel = self.cancel, None
            raise cancel


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def make(fake: FakeRay, host: Host) -> Iterator[Callable[..., Crew]]:
    made: list[Crew] = []

    def make(count: int = 2, device: str = "cpu", **settings: Any) -> Crew:
        devices = settings.pop("devices", None) or [
            WorkerSettings(device if device == "cpu" else f"{device}:{place}") for place in range(count)]
        made.append(Crew(Settings(**{"heads": False, "tokens": False, "weights": "replicate", **settings}), devices,
                         lambda: {"threads": 8}, host.raise_if_cancelled))
        return made[-1]

    yield make
    fake.go_on.set()
    for one in made:
        one.close()


def ask(crew: Crew, what: str = "predict") -> dict[Worker, Any]:
    return {worker: worker.ask(what) for worker in crew.ready()}


def soon(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


class TestStarting:
    def test_in_the_background_and_once(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """Whoever wakes it goes on; whoever needs it waits."""
        fake.go_on.clear()
        crew = make()
        for _ in range(3):
            crew.wake()
        assert fake.inits == []
        fake.go_on.set()
        assert [worker.about for worker in crew.ready()] == [{"free_bytes": 5}] * 2
        assert crew.ready() is crew.ready()
        assert (len(fake.inits), len(fake.actors), crew.grouped) == (1, 2, False)
        (event,) = ring.named("shard.started")
        assert event.fields["workers"] == ["cpu", "cpu"]

    def test_who_waits_may_cancel(self, fake: FakeRay, make: Callable[..., Crew], host: Host) -> None:
        """The start goes on, for the next prompt."""
        fake.go_on.clear()
        crew = make()
        host.cancel = Cancel()
        with pytest.raises(Cancel):
            crew.ready()
        fake.go_on.set()
        assert len(crew.ready()) == 2
        assert len(fake.inits) == 1

    def test_a_start_that_fails(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """It is said once, in one line, and nobody waits for it again."""
        fake.init_error = RuntimeError("a long story\nno room in /dev/shm\n")
        crew = make()
        assert crew.ready() == ()
        assert crew.broken == "RuntimeError: no room in /dev/shm"
        started = time.perf_counter()
        assert crew.ready() == ()
        assert time.perf_counter() - started < 0.04
        assert [event.fields for event in ring.named("shard.broken")] == [{"reason": crew.broken}]
        assert len(fake.inits) == 1

    def test_a_worker_that_does_not_start(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """The others hold no memory for nothing, and Ray ends."""
        def script(what: str, *arguments: Any) -> Any:
            if what == "start" and len(fake.actors) == 2:
                raise ImportError("no comfy")
            return willing(what)

        fake.script = script
        crew = make(3)
        assert crew.ready() == ()
        assert "no comfy" in crew.broken
        soon(lambda: fake.shutdowns)
        assert fake.alive() == []

    def test_threads_are_shared_on_the_cpu_alone(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """A worker on a device needs few."""
        make(2).ready()
        make(2, "cuda").ready()
        started = [actor.heard("start")[0] for actor in fake.actors]
        assert [(twin["threads"], options["mates"]) for twin, options in started] == [(8, 2)] * 2 + [(8, 1)] * 2

    def test_each_sees_one_device(self, fake: FakeRay, make: Callable[..., Crew], monkeypatch: pytest.MonkeyPatch) -> None:
        """Under the first name."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        make(2, "cuda").ready()
        assert [actor.environment["CUDA_VISIBLE_DEVICES"] for actor in fake.actors] == ["0", "1"]
        assert [actor.heard("start")[0][1]["device"] for actor in fake.actors] == ["cuda:0"] * 2

    def test_detached_workers_have_names_and_outlive_us(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """The next ComfyUI finds them."""
        crew = make(detached=True, address="auto")
        crew.ready()
        assert [actor.named["name"] for actor in fake.actors] == ["worker-0", "worker-1"]
        assert all(actor.heard("start")[0][1]["orphan"] for actor in fake.actors)
        crew.close()
        assert (len(fake.alive()), fake.shutdowns) == (2, 1)


def abroad(device: str, *hosts: str) -> list[WorkerSettings]:
    return [WorkerSettings(device, host=host) for host in hosts]


class TestOtherHosts:
    def test_each_is_started_where_it_belongs(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """With what it needs to see whether all is as it is here; it does not look for a process that it cannot see."""
        crew = make(devices=abroad("cpu", "", "box", "box"), address="auto")
        crew.ready()
        assert [actor.node for actor in fake.actors] == ["node of ", "node of box", "node of box"]
        started = [actor.heard("start")[0] for actor in fake.actors]
        assert [options["orphan"] for _, options in started] == [False, True, True]
        assert [options["mates"] for _, options in started] == [1, 2, 2]  # of one machine's cores
        assert [twin["threads"] for twin, _ in started] == [8, 0, 0]
        assert [twin.get("host") for twin, _ in started] == [None, "box", "box"]
        assert [twin.get("sources") for twin, _ in started] == [None, *[{"ComfyUI": ("1.0", "abc")}] * 2]
        (event,) = ring.named("shard.started")
        assert event.fields["workers"] == ["cpu", "cpu of box", "cpu of box"]

    def test_its_devices_are_those_that_its_environment_shows(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Here others are seen."""
        fake.around = {"CUDA_VISIBLE_DEVICES": "4,6"}
        make(devices=abroad("cuda:1", "box"), address="auto").ready()
        assert fake.actors[0].environment["CUDA_VISIBLE_DEVICES"] == "6"

    def test_a_device_that_it_does_not_show(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """The line says so."""
        fake.around = {"CUDA_VISIBLE_DEVICES": "4"}
        crew = make(devices=abroad("cuda:1", "box"), address="auto")
        assert crew.ready() == ()
        assert crew.broken == "LookupError: cuda:1 of box cannot be had: CUDA_VISIBLE_DEVICES is '4' there"

    def test_a_host_that_will_not_do(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Worker and host are named with the reason."""
        def script(what: str, *arguments: Any) -> Any:
            if what == "start" and len(fake.actors) == 2:
                raise FileNotFoundError("ComfyUI is not at /x on host box")
            return willing(what)

        fake.script = script
        crew = make(devices=abroad("cpu", "", "box"), address="auto")
        assert crew.ready() == ()
        assert crew.broken == "Failed: worker 1 on cpu of box: FileNotFoundError: ComfyUI is not at /x on host box"

    def test_they_meet_in_the_network(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """And on the machine itself where all are on one, whosever cluster it is."""
        for hosts, local in ((("", "box"), False), (("box", "box"), True), (("", ""), True)):
            fake.actors.clear()
            crew = make(devices=abroad("cpu", *hosts), address="auto", heads=True)
            crew.ready()
            assert fake.actors[0].heard("address") == [(local,)]
            assert crew.grouped

    def test_who_outlives_us_is_found_by_its_host(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """A worker that is left on another one is not it."""
        make(devices=abroad("cpu", "", "10.0.0.2"), address="auto", detached=True).ready()
        assert [actor.named["name"] for actor in fake.actors] == ["worker-0", "worker-1-10.0.0.2"]


class TestMeeting:
    def test_all_at_an_address_of_the_firsts(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Each with its rank, and the weights of all."""
        crew = make(3, heads=True, timeout_seconds=7)
        crew.ready()
        assert crew.grouped
        assert [actor.heard("join") for actor in fake.actors] == [
            [(rank, "127.0.0.1:7", [1.0] * 3, 7, True)] for rank in range(3)]

    def test_who_cannot_meet_go_on_alone(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """Rows need no meeting."""
        def script(what: str, *arguments: Any) -> Any:
            if what == "join":
                raise ConnectionError("no route")
            return willing(what)

        fake.script = script
        crew = make(2, heads=True)
        assert len(crew.ready()) == 2
        assert (crew.grouped, crew.broken) == (False, "")
        (event,) = ring.named("shard.demoted")
        assert "no route" in event.fields["reason"]

    @pytest.mark.parametrize(("count", "together"), [(1, True), (2, False)])
    def test_nobody_to_meet(self, fake: FakeRay, make: Callable[..., Crew], count: int, together: bool) -> None:
        """One alone, or the user does not want it."""
        crew = make(count, heads=together, tokens=together)
        crew.ready()
        assert not crew.grouped
        assert fake.actors[0].heard("join") == []


class TestGathering:
    def test_answers_in_order(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Of who was asked, whoever is first."""
        crew = make(3)
        asked = dict(zip(crew.ready(), map(Reference, "abc"), strict=True))
        late = next(iter(asked.values()))
        late.value = NEVER
        threading.Timer(0.1, lambda: setattr(late, "value", "a")).start()
        assert crew.gather(asked, 5) == ["a", "b", "c"]

    def test_a_dead_worker(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """Who hears of it has it replaced, once; the others are called off and live on."""
        fake.script = lambda what, *arguments: NEVER if what == "predict" else willing(what)
        crew = make()
        asked = ask(crew)
        first, second = crew.ready()
        fake.script = willing
        second.handle.die()
        with pytest.raises(Lost) as caught:
            crew.gather(asked, 5)
        assert caught.value.workers == (second,)
        asked[first].value = "ended its step"
        crew.lose(caught.value.workers, str(caught.value))
        assert list(crew.ready()) == [first, second]
        assert fake.actors[0].heard("cancel") == [(True,), (False,)]
        assert [actor.killed for actor in fake.actors] == [False, True, False]
        assert [event.fields["worker"] for event in ring.named("worker.lost")] == [1]
        assert [event.fields["worker"] for event in ring.named("worker.replaced")] == [1]

    def test_no_answer_in_time(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """All that are late are lost."""
        fake.script = lambda what, *arguments: NEVER if what == "predict" else willing(what)
        crew = make()
        asked = ask(crew)
        first, second = crew.ready()
        asked[first].value = "in time"
        with pytest.raises(Lost, match="no answer in 0 s") as caught:
            crew.gather(asked, 0.1)
        assert caught.value.workers == (second,)
        crew.ready()
        assert second.handle.heard("cancel") == []

    def test_an_error_in_a_worker(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """It is named with the worker, which lives on, as the others do."""
        crew = make()
        asked = ask(crew)
        second = crew.ready()[1]
        asked[second].value = failures.RayTaskError("predict", "", ValueError("bad shapes"))
        with pytest.raises(Failed, match="worker 1 on cpu: ValueError: bad shapes"):
            crew.gather(asked, 5)
        assert len(crew.ready()) == 2
        assert len(fake.alive()) == 2
        assert ring.named("worker.lost") == []

    def test_an_answer_that_ray_lost(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Is a failure like any other."""
        crew = make()
        asked = ask(crew)
        next(iter(asked.values())).value = failures.ObjectStoreFullError("full")
        with pytest.raises(Failed, match="ObjectStoreFullError"):
            crew.gather(asked, 5)
        assert len(crew.ready()) == 2

    @pytest.mark.parametrize("how", ["cancel", "check"])
    def test_cancelled_workers_end_their_step(self, fake: FakeRay, make: Callable[..., Crew], host: Host, how: str) -> None:
        """By the user, or because nobody wants the answer any more. Until they are done nobody asks them again."""
        fake.script = lambda what, *arguments: NEVER if what == "predict" else willing(what)
        crew = make()
        asked = ask(crew)
        error = Cancel()

        def check() -> None:
            raise error

        if how == "cancel":
            host.cancel = error
        with pytest.raises(Cancel) as caught:
            crew.gather(asked, 5, check if how == "check" else lambda: None)
        assert caught.value is error
        soon(lambda: all(actor.heard("cancel") for actor in fake.actors))
        for reference in asked.values():
            reference.value = failures.RayTaskError("predict", "", InterruptedError())
        assert len(crew.ready()) == 2
        assert [actor.heard("cancel") for actor in fake.actors] == [[(True,), (False,)]] * 2
        assert len(fake.alive()) == 2

    def test_who_is_stuck_is_replaced(self, fake: FakeRay, make: Callable[..., Crew], host: Host, ring: Ring) -> None:
        """A new process knows neither models nor conditionings."""
        fake.script = lambda what, *arguments: NEVER if what == "predict" else willing(what)
        crew = make()
        asked = ask(crew)
        first, second = crew.ready()
        second.models["model"] = "patched"
        sent = second.sent
        host.cancel = Cancel()
        with pytest.raises(Cancel):
            crew.gather(asked, 5)
        asked[first].value = "ended its step"
        assert list(crew.ready()) == [first, second]
        assert [actor.killed for actor in fake.actors] == [False, True, False]
        assert second.handle is fake.actors[2]
        assert (second.models, second.sent is sent) == ({}, False)
        assert [event.fields["reason"] for event in ring.named("worker.lost")] == ["it did not end its step"]

    def test_who_dies_of_being_called_off_is_replaced(self, fake: FakeRay, make: Callable[..., Crew], host: Host,
                                                      ring: Ring) -> None:
        """It is no reason to do without the others."""
        def script(what: str, *arguments: Any) -> Any:
            if what == "cancel" and arguments == (False,) and len(fake.actors) == 2:
                return failures.RayActorError()
            return NEVER if what == "predict" else willing(what)

        fake.script = script
        crew = make()
        asked = ask(crew)
        host.cancel = Cancel()
        with pytest.raises(Cancel):
            crew.gather(asked, 5)
        for reference in asked.values():
            reference.value = "ended its step"
        assert len(crew.ready()) == 2
        assert (crew.broken, len(fake.alive()), len(fake.actors)) == ("", 2, 4)
        assert [event.fields["reason"] for event in ring.named("worker.lost")] == ["it is dead"] * 2

    def test_workers_that_were_called_off_meet_anew(self, fake: FakeRay, make: Callable[..., Crew], host: Host) -> None:
        """Cancelling closes what they exchange tensors by."""
        fake.script = lambda what, *arguments: NEVER if what == "predict" else willing(what)
        crew = make(heads=True)
        asked = ask(crew)
        host.cancel = Cancel()
        with pytest.raises(Cancel):
            crew.gather(asked, 5)
        for reference in asked.values():
            reference.value = "ended its step"
        crew.ready()
        assert crew.grouped
        assert [len(actor.heard("join")) for actor in fake.actors] == [2, 2]


class TestAnyAnswer:
    def test_comes_as_soon_as_there_is_one(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """A worker may have several to give."""
        crew = make()
        first, second = crew.ready()
        references = [Reference(NEVER), Reference(NEVER), Reference("c")]
        assert crew.any(dict(zip(references, (first, first, second), strict=True)), 5) == references[2:]

    def test_where_none_comes_all_are_lost(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Each once, however much it was asked."""
        crew = make()
        first, second = crew.ready()
        with pytest.raises(Lost, match="no answer in 0 s") as caught:
            crew.any({Reference(NEVER): worker for worker in (first, second, first)}, 0.1)
        assert caught.value.workers == (first, second)

    def test_who_waits_may_cancel_and_then_calls_off(self, fake: FakeRay, make: Callable[..., Crew], host: Host) -> None:
        """Nobody is asked again until those who are at it are done."""
        fake.script = lambda what, *arguments: NEVER if what == "predict" else willing(what)
        crew = make()
        asked = ask(crew)
        host.cancel = cancel = Cancel()
        with pytest.raises(Cancel) as caught:
            crew.any({reference: worker for worker, reference in asked.items()}, 5)
        assert caught.value is cancel
        assert not any(actor.heard("cancel") for actor in fake.actors)
        crew.call_off(asked)
        soon(lambda: all(actor.heard("cancel") for actor in fake.actors))
        for reference in asked.values():
            reference.value = "ended"
        assert len(crew.ready()) == 2
        assert [actor.heard("cancel") for actor in fake.actors] == [[(True,), (False,)]] * 2


class TestReplacing:
    def test_a_worker_that_cannot_be_replaced(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """All go, and the host is alone; once."""
        crew = make()
        lost = crew.ready()[1]

        def script(what: str, *arguments: Any) -> Any:
            raise MemoryError("full")

        fake.script = script
        crew.lose([lost], "dead")
        crew.lose([lost], "dead")
        soon(lambda: crew.broken)
        assert crew.ready() == ()
        soon(lambda: fake.shutdowns)
        assert fake.alive() == []
        assert len(ring.named("shard.broken")) == 1
        assert len(fake.actors) == 3


class TestTelling:
    def test_all_in_their_turn(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Nobody waits for it, and a worker that fails at it is no loss."""
        def script(what: str, *arguments: Any) -> Any:
            if what == "release":
                raise ValueError("no such model")
            return willing(what)

        fake.script = script
        crew = make()
        crew.ready()
        crew.tell("release", "model")
        soon(lambda: all(actor.heard("release") == [("model",)] for actor in fake.actors))
        assert len(crew.ready()) == 2

    def test_before_the_start_there_is_nobody_to_tell(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """It is no reason to start."""
        crew = make()
        crew.tell("release")
        crew.report()
        crew.close()
        assert fake.inits == []

    def test_the_report(self, fake: FakeRay, make: Callable[..., Crew], ring: Ring) -> None:
        """By worker."""
        crew = make()
        crew.ready()
        crew.report()
        soon(lambda: ring.named("shard.workers"))
        (event,) = ring.named("shard.workers")
        assert event.fields["private_bytes"] == {"worker 0": 1, "worker 1": 1}


class TestClosing:
    def test_workers_and_ray_end(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Twice is once; nobody who asks later waits."""
        crew = make()
        crew.ready()
        crew.close()
        crew.close()
        assert (fake.alive(), fake.shutdowns) == ([], 1)
        assert not any(thread.name == "residency-ray" for thread in threading.enumerate())
        assert crew.ready() == ()
        assert crew.broken == "the policy was turned off"

    def test_what_is_under_way_when_it_ends(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """It is lost; the host predicts, and does not wait."""
        fake.script = lambda what, *arguments: NEVER if what == "predict" else willing(what)
        crew = make()
        asked = ask(crew)
        crew.close()
        with pytest.raises(Lost):
            crew.gather(asked, 5)
        crew.lose([next(iter(asked))], "dead")
        assert crew.ready() == ()

    def test_somebody_elses_ray_goes_on(self, fake: FakeRay, make: Callable[..., Crew]) -> None:
        """Another pack of this process started it."""
        fake.running = True
        crew = make()
        crew.ready()
        crew.close()
        assert (fake.inits, fake.shutdowns, fake.alive()) == ([], 0, [])
