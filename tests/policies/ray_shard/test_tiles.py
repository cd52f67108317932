"""Tiles by workers that the test plays: ComfyUI's own blending over them, in its order, to the last bit."""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import comfy.utils
import pytest
import torch
from residency.hooks.tiles import foretell
from residency.policies.computing import ScaleTiles
from residency.policies.ray_shard.parcels import pack, unpack
from residency.policies.ray_shard.score import Score
from residency.policies.ray_shard.settings import Settings
from residency.policies.ray_shard.tiles import Tiler, as_it_lay
from residency.policies.ray_shard.workers import Failed, Lost, Worker
from residency.telemetry.sinks import Ring

ray = pytest.importorskip("ray")
LATENTS = torch.randn(2, 4, 21, 15, generator=torch.Generator().manual_seed(1))
TILE, OVERLAP = (8, 6), 2
COUNT = len(foretell(LATENTS, TILE, OVERLAP))


class Cancelled(BaseException):
    """The host's Cancel."""


class Upscale(torch.nn.Module):
    """Stands for a VAE: an answer depends on all of its tile."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(3, 4, 3, 3, generator=generator), requires_grad=False)

    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        answer = torch.nn.functional.conv2d(tile, self.weight, padding=1) + tile.mean()
        return torch.nn.functional.interpolate(answer, scale_factor=2)


@dataclass(eq=False)
class Reference:
    """To a worker's answer."""

    number: int
    arguments: tuple[Any, ...]


@dataclass(eq=False)
class Played(Worker):
    """A worker that computes when the crew looks; `breaks` tells what happens to the n-th tile it is asked for."""

    model: Upscale = field(default_factory=Upscale)
    breaks: Mapping[int, str] = field(default_factory=dict)
    asked: int = 0
    dead: bool = False
    full_at: int = 0  # the store has no room for what is asked then

    def ask(self, what: str, *arguments: Any) -> Any:
        assert what == "tile"
        self.asked += 1
        if self.asked == self.full_at:
            raise ray.exceptions.ObjectStoreFullError("full")
        return Reference(self.asked, arguments)

    def compute(self, number: int, key: str, digest: str, function: Any, tile: Any, room: float) -> dict[str, Any]:
        trouble = "dead" if self.dead else self.breaks.get(number, "")
        if trouble == "dead":
            self.dead = True
            raise Lost([self], f"worker {self.rank} is dead")
        if trouble:
            raise Failed(f"worker {self.rank}: {trouble}")
        answer = unpack(function, known={"vae": self.model})(as_it_lay(*unpack(tile)))
        return {"answer": pack(answer, files=False), "seconds": 0.75, "compute_seconds": 0.5}


class Crew:
    """Answers come in any order from worker to worker, and in order from each."""

    def __init__(self, workers: Sequence[Played], seed: int = 0) -> None:
        self.workers, self.broken = list(workers), ""
        self.lost: list[int] = []
        self.called_off: list[Mapping[Any, Any]] = []
        self.cancel_at = self.silent_at = -1
        self.looked = self.most_of_one = 0
        self._draw = random.Random(seed)

    def ready(self) -> Sequence[Played]:
        return () if self.broken else self.workers

    def any(self, asked: Mapping[Any, Any], seconds: float) -> list[Any]:
        self.looked += 1
        self.most_of_one = max(self.most_of_one, *Counter(map(id, asked.values())).values())
        if self.looked == self.cancel_at:
            raise Cancelled
        if self.looked == self.silent_at:
            raise Lost(list(dict.fromkeys(asked.values())), "no answer")
        worker = self._draw.choice(list(dict.fromkeys(asked.values())))
        return [next(reference for reference in asked if asked[reference] is worker)]

    def lose(self, workers: Sequence[Played], why: str) -> None:
        self.lost.extend(worker.rank for worker in workers)

    def call_off(self, asked: Mapping[Any, Any]) -> None:
        self.called_off.append(asked)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residency.policies.ray_shard.ahead.answer_of",
                        lambda worker, reference: worker.compute(reference.number, *reference.arguments))


class Freighter:
    """Packs nothing; `trouble` is raised where a model should be delivered."""

    def __init__(self) -> None:
        self.packed: list[Any] = []
        self.trouble: Exception | None = None

    def of(self, remote: Any) -> Any:
        return remote if remote in self.packed else None

    def pack(self, remote: Any) -> None:
        self.packed.append(remote)

    def deliver(self, remote: Any, workers: Sequence[Any]) -> Any:
        if self.trouble is not None:
            raise self.trouble
        return SimpleNamespace(key="vae-1", digest="")


class Scene:
    """A host that scales `LATENTS` with `Upscale`; `here` counts the tiles that it computes itself."""

    def __init__(self, workers: Sequence[Played], seed: int = 0, verify: str = "off") -> None:
        self.crew, self.freighter, self.score = Crew(workers, seed), Freighter(), Score()
        self.tiler = Tiler(Settings(verify=verify), self.crew, self.freighter, self.score)  # type: ignore[arg-type]
        self.module, self.here, self.log = Upscale(), 0, list[str]()
        self.remote = SimpleNamespace(module=self.module, known=lambda: {id(self.module): "vae"},
                                      place=lambda: self.log.append("place"))
        self.weights = SimpleNamespace(take_off=lambda: self.log.append("take off"))
        self.tiles: Callable[[], Sequence[torch.Tensor]] = lambda: foretell(self.samples, TILE, OVERLAP)
        self.samples = LATENTS
        self.function = (lambda module: lambda tile: module(tile))(self.module)
        self.proceeded = 0

    def host(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return comfy.utils.tiled_scale_multidim(self.samples, function, TILE, OVERLAP, upscale_amount=2, out_channels=3)

    def run(self) -> torch.Tensor:
        """What the host gets with the workers."""
        request = ScaleTiles(self.remote, self.weights, self.function, self.tiles, lambda shape: 1.0)  # type: ignore[arg-type]

        def proceed(asked: Any = None) -> Any:
            self.proceeded += 1
            return self.host(self._mine if asked is None else asked.function)

        original = self.module.forward
        self.module.forward = self._mine  # type: ignore[method-assign]
        try:
            with torch.inference_mode():
                answer: torch.Tensor = self.tiler.act(request, proceed)
        finally:
            self.module.forward = original  # type: ignore[method-assign]
        assert self.proceeded == 1
        self.proceeded = 0
        return answer

    def _mine(self, tile: torch.Tensor) -> torch.Tensor:
        self.here += 1
        return Upscale.forward(self.module, tile)

    def alone(self) -> torch.Tensor:
        """What the host gets by itself."""
        with torch.inference_mode():
            return self.host(Upscale())


def workers(*weights: float, **more: Any) -> list[Played]:
    return [Played(rank, "cpu", weight, **more) for rank, weight in enumerate(weights or (1.0, 1.0))]


def reasons(ring: Ring) -> list[str]:
    return [event.fields["reason"] for event in ring.named("shard.demoted")]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (1.0, 0.3, 2.0)], ids=len)
def test_the_result_is_the_hosts_to_the_last_bit(weights: tuple[float, ...], seed: int, ring: Ring) -> None:
    """In whatever order the workers answer, and the host computes no tile."""
    scene = Scene(workers(*weights), seed)

    assert torch.equal(scene.run(), scene.alone())
    assert (scene.here, sum(worker.asked for worker in scene.crew.workers)) == (0, COUNT)
    scene.score.tell()
    told = ring.named("shard.finished")[0].fields
    assert told["calls"] == {"tiles": COUNT}
    assert told["transfer_seconds"] == told["compute_seconds"] / 2 > 0
    assert not scene.crew.called_off
    assert reasons(ring) == []


def test_the_answers_are_the_workers() -> None:
    """The control: one worker with other weights shows in the result."""
    one, other = workers()
    other.model = Upscale(seed=2)
    scene = Scene([one, other])

    assert not torch.equal(scene.run(), scene.alone())


@pytest.mark.parametrize("stride", [(1200, 300, 20, 1), (1200, 1, 60, 3), (48, 16, 4, 1)])
def test_a_tile_lies_in_memory_as_it_did(stride: tuple[int, ...]) -> None:
    """Gaps do not travel, and how a sum rounds depends on them."""
    tile = torch.randn(2000).as_strided((1, 3, 4, 4), stride)
    found = as_it_lay(*unpack(pack((tile, stride), files=False)))

    assert found.stride() == stride
    assert torch.equal(found, tile)


def test_answers_belong_to_their_tiles() -> None:
    """The control: with two tiles swapped on the way the result is another."""
    scene = Scene(workers())
    scene.tiles = lambda: [views[1], views[0], *views[2:]]
    views = foretell(LATENTS, TILE, OVERLAP)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("residency.policies.ray_shard.tiles._is_same", lambda one, other: True)
        assert not torch.equal(scene.run(), scene.alone())


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (1.0, 1.0, 1.0)], ids=len)
def test_few_tiles_are_under_way_at_a_time(weights: tuple[float, ...]) -> None:
    """Each worker has one to compute and one that waits; what waits for the host is bounded."""
    scene = Scene(workers(*weights))
    held = []
    taken = 0

    class Counting(Crew):
        def any(self, asked: Mapping[Any, Any], seconds: float) -> list[Any]:
            held.append(sum(worker.asked for worker in self.workers) - taken)
            return super().any(asked, seconds)

    scene.crew.__class__ = Counting
    host = scene.host

    def counted(function: Any) -> torch.Tensor:
        def asked(tile: torch.Tensor) -> torch.Tensor:
            nonlocal taken
            answer: torch.Tensor = function(tile)
            taken += 1
            return answer

        return host(asked)

    scene.host = counted  # type: ignore[method-assign]
    scene.run()

    assert scene.crew.most_of_one == 2
    assert len(weights) < max(held) <= 3 * len(weights)


@pytest.mark.parametrize("at", [0, 1, COUNT - 1])
def test_a_tile_that_was_not_foretold_is_computed_here(at: int, ring: Ring) -> None:
    """And so are those after it: whoever asks differently may go on so."""
    scene = Scene(workers())
    views = foretell(LATENTS, TILE, OVERLAP)
    scene.tiles = lambda: [*views[:at], LATENTS[:1, :, 1:8, 1:6], *views[at + 1:]]

    assert torch.equal(scene.run(), scene.alone())
    assert scene.here == COUNT - at
    assert reasons(ring) == ["the host asked for another tile than was foretold"]


def test_more_tiles_than_foretold_are_computed_here() -> None:
    """Workers have the ones that were."""
    scene = Scene(workers())
    scene.tiles = lambda: foretell(LATENTS, TILE, OVERLAP)[:5]

    assert torch.equal(scene.run(), scene.alone())
    assert scene.here == COUNT - 5


def test_a_worker_that_fails_gets_no_more(ring: Ring) -> None:
    """Its tile is computed here, and the others go on."""
    one, other = workers()
    other.breaks = {2: "no memory"}
    scene = Scene([one, other])

    assert torch.equal(scene.run(), scene.alone())
    assert scene.here == 1
    assert other.asked <= 3
    assert reasons(ring) == ["worker 1: no memory"]
    assert scene.crew.lost == []


def test_when_all_fail_the_host_goes_on_alone(ring: Ring) -> None:
    """Each tile is computed once."""
    scene = Scene(workers(1.0, 1.0, breaks={3: "no memory"}))

    assert torch.equal(scene.run(), scene.alone())
    assert len(reasons(ring)) == 2
    scene.score.tell()
    calls = ring.named("shard.finished")[0].fields["calls"]
    assert calls["local"] == scene.here
    assert sum(calls.values()) == COUNT


def test_a_dead_worker_is_replaced_and_the_others_have_its_tiles(ring: Ring) -> None:
    """But for the one that it was at, which may be what it died of."""
    one, other = workers()
    other.breaks = {3: "dead"}
    scene = Scene([one, other])

    assert torch.equal(scene.run(), scene.alone())
    assert scene.crew.lost == [1]
    assert scene.here == 1
    assert reasons(ring) == ["worker 1 is dead"]


@pytest.mark.parametrize("breaks", [{1: "dead"}, {4: "dead"}])
def test_when_all_are_dead_the_host_goes_on_alone(breaks: Mapping[int, str]) -> None:
    """Nobody waits for them."""
    scene = Scene(workers(1.0, 1.0, breaks=breaks))

    assert torch.equal(scene.run(), scene.alone())
    assert sorted(scene.crew.lost) == [0, 1]


def test_when_the_store_is_full_the_host_goes_on_alone(ring: Ring) -> None:
    """What was asked before is still taken."""
    scene = Scene(workers(full_at=4))

    assert torch.equal(scene.run(), scene.alone())
    asked = sum(worker.asked for worker in scene.crew.workers) - 1
    assert asked > 3
    assert scene.here == COUNT - asked
    assert [reason.partition(":")[0] for reason in reasons(ring)] == ["a tile cannot be sent"]


def test_workers_that_do_not_answer_are_replaced(ring: Ring) -> None:
    """All that were asked, after the timeout; the host computes what is left."""
    scene = Scene(workers())
    scene.crew.silent_at = 6

    assert torch.equal(scene.run(), scene.alone())
    assert sorted(scene.crew.lost) == [0, 1]
    assert reasons(ring) == ["no answer"]


def test_cancel_goes_up_and_the_workers_hear_of_it() -> None:
    """The same object, and nothing is asked or computed after it."""
    scene = Scene(workers())
    scene.crew.cancel_at = 5
    with pytest.raises(Cancelled):
        scene.run()

    asked = sum(worker.asked for worker in scene.crew.workers)
    assert [set(one) for one in scene.crew.called_off] == [set(scene.crew.workers)]
    assert [reference.number for reference in scene.crew.called_off[0].values()] == [one.asked for one in scene.crew.workers]
    assert asked < COUNT
    assert scene.here == 0


def test_an_error_of_the_hosts_goes_up() -> None:
    """What is under way is called off."""
    scene = Scene(workers())
    scene.host = lambda function: function(foretell(LATENTS, TILE, OVERLAP)[0]) and 1 / 0  # type: ignore[method-assign]
    scene.samples = LATENTS
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        scene.run()

    assert len(scene.crew.called_off) == 1


class TestComparing:
    def test_the_first_tile_of_each_kind_is_computed_here_too(self, ring: Ring) -> None:
        """Kinds differ by their shape; the second pass has none that is new."""
        scene = Scene(workers(), verify="first_step")
        shapes = len({tile.shape for tile in scene.tiles()})

        assert torch.equal(scene.run(), scene.alone())
        assert scene.here == shapes
        assert shapes > 1
        scene.run()
        assert scene.here == shapes
        assert reasons(ring) == []

    def test_always(self) -> None:
        """Every tile."""
        scene = Scene(workers(), verify="always")
        scene.run()
        assert scene.here == COUNT

    def test_a_vae_whose_tiles_differ_is_refused(self, ring: Ring) -> None:
        """The result is right from the first tile on, and the workers are not asked again."""
        scene = Scene(workers(model=Upscale(seed=2)), verify="first_step")

        assert torch.equal(scene.run(), scene.alone())
        assert scene.here == COUNT
        assert len(scene.crew.called_off) == 1
        asked = sum(worker.asked for worker in scene.crew.workers)
        assert torch.equal(scene.run(), scene.alone())
        assert sum(worker.asked for worker in scene.crew.workers) == asked
        assert [reason.split(" by ")[0] for reason in reasons(ring)] == ["a worker's tile differs"]

    def test_what_is_no_number_is_no_match(self) -> None:
        """NaN is compared to nothing."""
        model = Upscale()
        model.weight.fill_(torch.nan)
        scene = Scene(workers(model=model), verify="first_step")
        assert torch.equal(scene.run(), scene.alone())


class TestDelivering:
    def test_a_vae_is_packed_once_while_it_is_off_its_device(self) -> None:
        """And put back at once, as the host may need it for a tile."""
        scene = Scene(workers())
        scene.run()
        scene.run()

        assert scene.log == ["take off", "place"]
        assert scene.freighter.packed == [scene.remote]

    @pytest.mark.parametrize(("trouble", "again"), [
        (Lost([], "worker 0 is dead"), True), (Failed("worker 0: no file"), False), (TypeError("cannot pickle"), False)])
    def test_where_it_cannot_be_delivered_the_host_goes_on_alone(self, trouble: Exception, again: bool, ring: Ring) -> None:
        """Once it is said why; only after a death it is tried again."""
        scene = Scene(workers())
        scene.freighter.trouble = trouble
        assert torch.equal(scene.run(), scene.alone())
        assert (scene.here, len(reasons(ring))) == (COUNT, 1)
        scene.freighter.trouble = None
        scene.here = 0
        scene.run()
        assert scene.here == (0 if again else COUNT)

    def test_a_function_with_much_in_it_is_not_sent(self, ring: Ring) -> None:
        """It would travel with every tile."""
        scene = Scene(workers())
        much = torch.zeros(2**19)
        scene.function = (lambda module: lambda tile: module(tile) + much[0])(scene.module)

        assert torch.equal(scene.run(), scene.alone())
        assert reasons(ring) == ["it cannot be sent: PicklingError: its function has 2 MB of tensors"]

    def test_one_tile_is_not_worth_it(self) -> None:
        """Nobody is woken for it."""
        scene = Scene(workers())
        scene.samples = LATENTS[:1, :, :8, :6]
        assert torch.equal(scene.run(), scene.alone())
        assert (scene.here, scene.crew.looked, scene.log) == (1, 0, [])

    def test_without_workers_the_host_is_asked_as_before(self, ring: Ring) -> None:
        """Why there are none is said."""
        scene = Scene(workers())
        scene.crew.broken = "no Ray"
        assert torch.equal(scene.run(), scene.alone())
        assert reasons(ring) == ["no Ray"]
