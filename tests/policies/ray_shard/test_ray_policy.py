"""When the policy runs, on which devices, and which models it takes off the host's."""
from __future__ import annotations

import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

pytest.importorskip("ray")

from residency.policies import Tools, load, ray_shard
from residency.policies.chain import PolicyChain
from residency.policies.policy import Unfit
from residency.policies.ray_shard import RayShard, crew, freight, parcels
from residency.policies.ray_shard.settings import Settings, WorkerSettings
from residency.policies.requests import BuildModel, PlaceModel, ReleaseModel, Request
from residency.policies.sampling import BatchRoom, Predict, SampleStep
from residency.policies.weights import Weights
from residency.settings import Settings as AllSettings
from residency.telemetry.sinks import Ring

CPU, CARD = torch.device("cpu"), torch.device("meta")


class FakeCrew:
    """What the policy told it."""

    def __init__(self, *arguments: Any) -> None:
        self.devices = arguments[1]
        self.broken, self.grouped = "", False
        self.told: list[tuple[Any, ...]] = []
        self.free = [7, 5]

    def wake(self) -> None:
        self.told.append(("wake",))

    def ready(self) -> list[Any]:
        return [] if self.broken else [type("Worker", (), {"about": {"free_bytes": free}}) for free in self.free]

    def tell(self, *arguments: Any) -> None:
        self.told.append(arguments)

    def report(self) -> None:
        self.told.append(("report",))

    def close(self) -> None:
        self.told.append(("close",))


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "Crew", FakeCrew)


def policy(tools: Tools, **settings: Any) -> RayShard:
    made = RayShard(Settings(**{"workers": (WorkerSettings("cpu"),) * 2, **settings}), tools)
    made.start()
    return made


def devices(tools: Tools, here: list[str], *wanted: WorkerSettings) -> list[str]:
    tools.host.memory.accelerators = here  # type: ignore[attr-defined]
    return [one.device for one in cast(Any, policy(tools, workers=wanted))._crew.devices]


class TestStarting:
    def test_without_ray_it_says_how_to_get_it(self, tools: Tools, monkeypatch: pytest.MonkeyPatch, ring: Ring) -> None:
        """The others go on."""
        for name in [name for name in sys.modules if name.startswith("residency.policies.ray_shard.")]:
            if name.rpartition(".")[2] in ("crew", "cluster", "workers", "dispatch", "freight", "memo", "parcels", "packing"):
                monkeypatch.delitem(sys.modules, name)
        for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "ray", None)
        chosen = AllSettings(policies=("ray_shard",), tables={"ray_shard": Settings()})
        assert load(chosen, tools) == []
        (event,) = ring.named("policy.declined")
        assert 'pip install "ray>=2.40"' in event.fields["reason"]

    @pytest.mark.parametrize(("here", "words"), [([], "are none"), (["cuda:0"], "is one")])
    def test_one_device_is_nothing_to_share(self, tools: Tools, here: list[str], words: str) -> None:
        """Unless the user says what the workers are."""
        with pytest.raises(Unfit, match=words):
            devices(tools, here)

    @pytest.mark.parametrize(("here", "wanted", "expected"), [
        (["cuda:0", "cuda:1"], (), ["cuda:0", "cuda:1"]),
        (["cuda:0", "cuda:1"], (WorkerSettings(),), ["cuda:0"]),
        (["cuda:0", "cuda:1", "cuda:2"], (WorkerSettings(), WorkerSettings("cuda:0"), WorkerSettings()),
         ["cuda:1", "cuda:0", "cuda:2"]),
        (["cuda:0"], (WorkerSettings("cuda:0"), WorkerSettings("cuda:0")), ["cuda:0", "cuda:0"]),
        (["cuda:0"], (WorkerSettings("cuda:0"), WorkerSettings("cpu")), ["cuda:0", "cpu"]),
        ([], (WorkerSettings(), WorkerSettings()), ["cpu", "cpu"]),
    ])
    def test_devices(self, tools: Tools, here: list[str], wanted: tuple[WorkerSettings, ...], expected: list[str]) -> None:
        """Those named first; the others are the next that nobody has, in the host's order; without any it is the CPU."""
        assert devices(tools, here, *wanted) == expected

    def test_a_worker_keeps_its_weight(self, tools: Tools) -> None:
        """Whatever its device is."""
        made = policy(tools, workers=(WorkerSettings("cpu", 3.0), WorkerSettings("", 2.0)))
        assert [one.weight for one in cast(Any, made)._crew.devices] == [3.0, 2.0]

    @pytest.mark.parametrize(("here", "wanted", "words"), [
        (["cuda:0"], (WorkerSettings(),) * 2, "2 workers cannot be had: the devices here are cuda:0"),
        (["cuda:0", "cuda:1"], (WorkerSettings("cuda:7"),), "cuda:7 cannot be had: the devices here are cuda:0, cuda:1"),
        ([], (WorkerSettings("cuda:0"),), "cuda:0 cannot be had: the devices here are the CPU alone"),
    ])
    def test_devices_that_are_not_here(self, tools: Tools, here: list[str], wanted: tuple[WorkerSettings, ...],
                                       words: str) -> None:
        """The user reads which, and what is here."""
        with pytest.raises(Unfit, match=words):
            devices(tools, here, *wanted)

    def test_another_hosts_devices_are_its_own(self, tools: Tools) -> None:
        """Only a worker there can tell which it has; here they are as free as before."""
        tools.host.memory.accelerators = ["cuda:0"]  # type: ignore[attr-defined]
        wanted = (WorkerSettings("cuda:0", host="box"), WorkerSettings(), WorkerSettings("cuda:5", host="box"))
        made = policy(tools, address="auto", workers=wanted)
        assert [(one.device, one.host) for one in cast(Any, made)._crew.devices] == [
            ("cuda:0", "box"), ("cuda:0", ""), ("cuda:5", "box")]

    def test_another_host_is_in_a_cluster(self, tools: Tools) -> None:
        """A Ray that is started here has none; the user reads what to write."""
        with pytest.raises(Unfit, match='host = "box" is a machine of a Ray cluster: write address = "auto"'):
            policy(tools, workers=(WorkerSettings("cpu", host="box"),))

    @pytest.mark.parametrize(("address", "alone"), [("local", "0"), ("auto", None)])
    def test_a_ray_of_ours_is_for_this_machine(self, tools: Tools, monkeypatch: pytest.MonkeyPatch, address: str,
                                               alone: str | None) -> None:
        """Where the user's own is, and who reaches it, is the user's."""
        monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
        policy(tools, address=address)
        assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == alone
        monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)

    def test_it_starts_no_process_before_a_model_is_built(self, tools: Tools) -> None:
        """Then they start while the file is read."""
        made = policy(tools)
        told = cast(Any, made)._crew.told
        assert told == []
        assert made.decide(BuildModel("diffusion_models")) is None
        assert told == [("wake",)]


@dataclass(eq=False)
class Remote:
    """A diffusion model; `built` is what is packed."""

    module: torch.nn.Module = field(default_factory=lambda: torch.nn.Linear(4, 4))
    built: Any = None
    asked: int = 0
    kind: str = "diffusion_model"

    def as_built(self) -> Any:
        self.asked += 1
        return self.built

    def unpaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def token(self) -> object:
        return 1

    def patches(self) -> Mapping[str, Any]:
        return {}

    def known(self) -> Mapping[int, str]:
        return {}


class FakeWeights:
    """Counts what is moved; some bytes of it are `here`."""

    def __init__(self, remote: Remote | None) -> None:
        self.module = remote.module if remote else torch.nn.Linear(1, 1)
        self.here = 0
        self.moves: list[str] = []

    def take_off(self) -> None:
        self.moves.append("take off")

    def on_device(self) -> int:
        return self.here

    def give_back(self, size: float) -> int:
        self.moves.append(f"give back {size}")
        return int(size)


class Scene:
    """The policy in a chain, and a host that places what it is asked to."""

    def __init__(self, tools: Tools, **settings: Any) -> None:
        self.policy = policy(tools, **settings)
        self.chain = PolicyChain([self.policy])
        self.placed: list[float | None] = []

    @property
    def told(self) -> list[tuple[Any, ...]]:
        told: list[tuple[Any, ...]] = cast(Any, self.policy)._crew.told
        return told

    def place(self, remote: Remote | None, weights: FakeWeights | None = None, device: torch.device = CARD) -> list[str]:
        weights = weights or FakeWeights(remote)
        request = PlaceModel(cast(Weights, weights), device, None, remote=cast(Any, remote))

        def host(asked: Request) -> str:
            assert isinstance(asked, PlaceModel)
            self.placed.append(asked.more_bytes)
            return "placed"

        assert self.chain.answer(request, host) == "placed"
        return weights.moves


@pytest.fixture
def scene(tools: Tools, ring: Ring) -> Iterator[Scene]:
    yield Scene(tools)


class TestPlacing:
    def test_a_diffusion_model_stays_off_the_device(self, scene: Scene) -> None:
        """It is packed as it lies in RAM, once; what was computed here meanwhile goes back."""
        remote = Remote()
        assert scene.place(remote) == ["take off"]
        assert scene.place(remote) == []
        weights = FakeWeights(remote)
        weights.here = 64
        assert scene.place(remote, weights) == ["give back 64"]
        assert scene.place(remote, weights, device=CPU) == ["give back 64"]
        assert scene.placed == [0.0] * 4
        assert remote.asked == 1

    def test_other_models_are_the_hosts(self, scene: Scene) -> None:
        """Text encoders, VAEs."""
        assert scene.place(None) == []
        assert scene.placed == [None]

    def test_a_model_that_cannot_be_packed_is_the_hosts(self, scene: Scene, ring: Ring) -> None:
        """With all the room it wants; it is said once, and not tried at each prompt."""
        remote = Remote(built=(one for one in "abc"))
        for _ in range(3):
            scene.place(remote)
        assert scene.placed == [None] * 3
        assert remote.asked == 1
        (event,) = ring.named("policy.failed")
        assert "pickle" in event.fields["error"]
        assert scene.policy.decide(BatchRoom(remote.module)) is None
        assert scene.policy.decide(Predict(cast(Any, remote), cast(Any, None), torch.zeros(1), {}, False)) is None

        other = Remote()
        scene.place(other)
        assert scene.placed[-1] == 0.0

    def test_what_no_file_backs_is_stored_before_the_host_writes_to_it(self, scene: Scene,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
        """Scheduled LoRA do so, in place and at the first step already."""
        stored: list[torch.Tensor] = []
        sent = lambda parcel: parcels.unpack(pickle.loads(pickle.dumps(parcel)))  # noqa: E731
        monkeypatch.setattr(freight.ray, "put", lambda parcel: stored.append(sent(parcel)))
        remote = Remote(built=torch.ones(2**16))
        scene.place(remote)
        remote.built.mul_(2)
        scene.place(remote)
        assert len(stored) == 1
        assert torch.equal(stored[0], torch.ones(2**16))

    def test_a_model_that_no_worker_will_have_is_not_stored(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is no Ray to store it in. Here the workers broke while they were waited for."""
        crew = cast(Any, scene.policy)._crew
        monkeypatch.setattr(crew, "ready", list)
        monkeypatch.setattr(freight.ray, "put", None)
        scene.place(Remote(built=torch.ones(2**16)))
        assert scene.placed == [0.0]

    def test_cancel_while_workers_start_costs_no_model(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        """It goes up, and the next prompt packs the model."""
        class Cancel(BaseException):
            """The host's."""

        def ready() -> list[Any]:
            raise Cancel

        monkeypatch.setattr(freight.ray, "put", lambda parcel: None)
        remote = Remote(built=torch.ones(2**16))
        with monkeypatch.context() as cancelled:
            cancelled.setattr(cast(Any, scene.policy)._crew, "ready", ready)
            with pytest.raises(Cancel):
                scene.place(remote)
        scene.place(remote)
        assert scene.placed == [0.0]

    def test_it_forgets_models_that_are_gone(self, scene: Scene) -> None:
        """And tells the workers to."""
        remote: Remote | None = Remote()
        scene.place(remote)
        del remote
        gc.collect()
        assert scene.told[-1] == ("forget", "Linear-1")

    def test_without_workers_everything_is_the_hosts(self, scene: Scene) -> None:
        """Those that were packed too."""
        remote = Remote()
        scene.place(remote)
        cast(Any, scene.policy)._crew.broken = "no room"
        scene.place(remote)
        assert scene.placed == [0.0, None]
        assert scene.policy.decide(BatchRoom(remote.module)) is None


class TestSteps:
    def step(self, remote: Remote | None, count: int) -> SampleStep:
        branches: Mapping[int, Callable[[], list[torch.Tensor]]] = {
            place: lambda place=place: [torch.full((1,), float(place == one)) for one in range(count)]  # type: ignore[misc]
            for place in range(count)}
        return SampleStep("a step", cast(Any, None), CARD, lambda: None, True, cast(Any, remote), torch.zeros(1, 4, 8, 8),
                          lambda: branches)

    def test_conditionings_run_side_by_side(self, scene: Scene) -> None:
        """The host is asked for the branches instead of the whole."""
        remote = Remote()
        scene.place(remote)
        asked: list[Request] = []

        def host(request: Request) -> Any:
            asked.append(request)
            assert isinstance(request, SampleStep) and request.run is not None
            return request.run()

        answer = scene.chain.answer(self.step(remote, 2), host)
        assert [one.item() for one in answer] == [1.0, 1.0]
        assert len(asked) == 1

    def test_where_weights_lie_is_asked_for_all_of_them_together(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who chooses a mode by rows would find one row, and a pipeline wants more. Then the host puts them into a batch."""
        remote, shapes = Remote(), []
        scene.place(remote)

        def shares(remote: Any, shape: tuple[int, ...]) -> bool:
            shapes.append(shape)
            return True

        monkeypatch.setattr(cast(Any, scene.policy)._dispatcher, "shares_weights", shares)
        step = self.step(remote, 2)
        assert scene.chain.answer(step, lambda asked: asked is step) is True
        assert shapes == [(2, 4, 8, 8)]

    @pytest.mark.parametrize("count", [0, 1])
    def test_a_single_one_is_the_hosts(self, scene: Scene, count: int) -> None:
        """There is nothing to run beside it."""
        remote = Remote()
        scene.place(remote)
        assert scene.policy.decide(self.step(remote, count)) is None

    @pytest.mark.parametrize(("workers", "settings", "apart"), [
        (2, {}, True), (3, {}, False), (3, {"tokens": False}, False), (3, {"tokens": False, "heads": False}, True),
        (2, {"rows": False}, False)])
    def test_nobody_is_idle(self, tools: Tools, ring: Ring, workers: int, settings: dict[str, bool], apart: bool) -> None:
        """Where workers outnumber conditionings all of them compute each, if they may; so where rows stay together."""
        scene = Scene(tools, workers=(WorkerSettings("cpu"),) * workers, **settings)
        remote = Remote()
        scene.place(remote)
        assert (scene.policy.decide(self.step(remote, 2)) is not None) is apart

    def test_a_model_that_is_not_packed_is_the_hosts(self, scene: Scene) -> None:
        """And so is what is no diffusion model."""
        assert scene.policy.decide(self.step(Remote(), 2)) is None
        assert scene.policy.decide(self.step(None, 2)) is None

    def test_a_batch_is_as_large_as_the_fullest_worker_allows(self, scene: Scene) -> None:
        """The host's own device has little to say; without workers it has."""
        remote = Remote()
        scene.place(remote)
        room = BatchRoom(remote.module)
        assert scene.chain.answer(room, lambda request: 1) == 5
        cast(Any, scene.policy)._crew.free = []
        assert scene.chain.answer(room, lambda request: 1) == 1
        assert scene.chain.answer(BatchRoom(torch.nn.Linear(1, 1)), lambda request: 1) == 1


class TestReleasing:
    @pytest.mark.parametrize(("wanted", "told"), [(None, True), (100.0, True), (0, False)])
    def test_the_workers_release_what_the_host_does(self, scene: Scene, wanted: float | None, told: bool) -> None:
        """Not where nothing is wanted."""
        remote = Remote()
        scene.place(remote)
        request = ReleaseModel(cast(Weights, FakeWeights(remote)), 0, wanted)
        assert scene.chain.answer(request, lambda asked: "host") == "host"
        assert (("release", "Linear-1") in scene.told) is told

    def test_of_other_models_they_know_nothing(self, scene: Scene) -> None:
        """Nobody is told."""
        scene.chain.answer(ReleaseModel(cast(Weights, FakeWeights(None)), 0, None), lambda asked: "host")
        assert scene.told == []

    def test_the_user_wants_all_memory_back(self, scene: Scene) -> None:
        """Of all models."""
        scene.chain.emptied()
        assert scene.told == [("release",)]

    def test_it_is_turned_off(self, scene: Scene) -> None:
        """The workers end."""
        scene.chain.switch([])
        assert scene.told == [("close",)]

    def test_what_workers_hold_is_told_after_prompts_that_they_worked_for(self, scene: Scene) -> None:
        """Not after others."""
        scene.chain.prompt_ended()
        assert scene.told == []
        cast(Any, scene.policy)._dispatcher.score.here("kind", 1.0)
        scene.chain.prompt_ended()
        assert scene.told == [("report",)]


def test_it_is_made_without_ray(tools: Tools) -> None:
    """Only its start needs it."""
    assert ray_shard.create(Settings(), tools).name == "ray_shard"
