"""Who predicts what, in which way, and that the host is asked exactly once where the workers' answer will not do."""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest
import torch

pytest.importorskip("ray")

import ray.exceptions
from residency.policies.chain import PolicyChain
from residency.policies.policy import Decision, Policy
from residency.policies.ray_shard import branches
from residency.policies.ray_shard.branches import lane, side_by_side
from residency.policies.ray_shard.dispatch import Dispatcher
from residency.policies.ray_shard.memo import Received
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.settings import Settings
from residency.policies.ray_shard.ways import HEADS, ROWS, TOKENS
from residency.policies.ray_shard.workers import Failed, Lost, Worker
from residency.policies.requests import Request
from residency.policies.sampling import Predict
from residency.telemetry.sinks import Ring

CPU = torch.device("cpu")
Model = Callable[[dict[str, Any]], torch.Tensor]


class Cancel(BaseException):
    """The host's."""


def double(arguments: dict[str, Any]) -> torch.Tensor:
    """A model in which rows do not know of each other."""
    return cast(torch.Tensor, arguments["x"] * 2 + arguments["c_crossattn"].mean((1, 2))[:, None])


@dataclass
class Call:
    """What a worker was asked."""

    worker: int
    rows: int
    way: str
    guests: bool
    chunks: list[int]
    weights: str = ""


class Handle:
    """A worker's process: what it is asked it computes when it is waited for."""

    def __init__(self, rank: int, crew: FakeCrew) -> None:
        self.rank, self.crew = rank, crew
        self.received = Received()
        self.ask = self

    def remote(self, what: str, key: str, *asked: Any) -> Any:
        if what == "measure":
            return lambda: self.crew.measured
        _, parcel, way, guests, weights = asked
        try:
            arguments = self.received.open(parcel, CPU)
        except KeyError as error:
            return partial(self._raise, Failed(f"KeyError: {error}"))
        named = arguments["transformer_options"].get("cond_or_uncond", [])
        self.crew.calls.append(Call(self.rank, len(arguments["x"]), way, guests, named, weights))
        if way in self.crew.unsuited:
            return lambda: {"unsuited": self.crew.unsuited[way], "free_bytes": 0}
        return lambda: {"answer": pack(self.crew.model(arguments), files=False), "seconds": 0.1, "compute_seconds": 0.05,
                        "free_bytes": 1000 + self.rank, "shared": self.crew.shared if way in (TOKENS, HEADS) else 0,
                        "stateful": self.crew.stateful and guests, "whole": self.crew.whole}

    def _raise(self, error: Exception) -> Any:
        raise error


class FakeCrew:
    """Workers whose `model` may be anything; `error` is what the next waiting for them raises."""

    def __init__(self, count: int, weights: Sequence[float] = ()) -> None:
        self.calls: list[Call] = []
        self.model: Model = double
        self.shared, self.stateful, self.whole = 3, False, ""
        self.unsuited: dict[str, str] = {}
        self.measured: Any = None
        self.broken, self.grouped = "", False
        self.error: BaseException | None = None
        self.lost: list[tuple[list[int], str]] = []
        self.workers = [Worker(rank, "cpu", weight, Handle(rank, self))
                        for rank, weight in enumerate(weights or [1.0] * count)]

    def ready(self) -> Sequence[Worker]:
        return () if self.broken else self.workers

    def gather(self, asked: Mapping[Worker, Any], seconds: float, check: Callable[[], None] = lambda: None) -> list[Any]:
        if self.error is not None:
            raise self.error
        check()
        return [answer() for answer in asked.values()]

    def lose(self, workers: Sequence[Worker], why: str) -> None:
        self.lost.append(([worker.rank for worker in workers], why))


@dataclass
class FakeFreight:
    key: str
    name: str = "Linear"
    digest: str = "patches"


class FakeFreighter:
    """`error` is what bringing a model to the workers raises."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.digest = "patches"
        self.delivered: list[list[int]] = []

    def key(self, module: torch.nn.Module) -> str:
        return f"Linear-{id(module)}"

    def deliver(self, remote: FakeRemote, workers: Sequence[Worker]) -> FakeFreight:
        self.delivered.append([worker.rank for worker in workers])
        if self.error is not None:
            raise self.error
        return FakeFreight(self.key(remote.module), digest=self.digest)


@dataclass(eq=False)
class FakeRemote:
    module: torch.nn.Module = field(default_factory=lambda: torch.nn.Linear(2, 2))
    placed: int = 0

    def place(self) -> None:
        self.placed += 1


class Sharding(Policy):
    """The dispatcher as the policy has it."""

    name = "ray_shard"
    answers = frozenset({Predict})

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher

    def decide(self, request: Request) -> Decision | None:
        assert isinstance(request, Predict)
        return Decision("", lambda proceed: self.dispatcher.act(request, proceed))


class Scene:
    """A host, its chain, and a crew."""

    def __init__(self, count: int = 2, weights: Sequence[float] = (), **settings: Any) -> None:
        self.crew, self.freighter = FakeCrew(count, weights), FakeFreighter()
        chosen = Settings(**{"verify": "off", "weights": "replicate", **settings})
        self.dispatcher = Dispatcher(chosen, cast(Any, self.crew), cast(Any, self.freighter))
        self.chain = PolicyChain([Sharding(self.dispatcher)], is_cancel=lambda error: isinstance(error, Cancel))
        self.remote = FakeRemote()
        self.hosts = 0
        self.model: Model = double
        self.host_error: BaseException | None = None

    def request(self, rows: int = 4, chunks: int = 2, guests: tuple[str, ...] = (), **rest: Any) -> Predict:
        column = torch.arange(rows, dtype=torch.float32)
        rest = {"t": column, "c_crossattn": column[:, None, None].repeat(1, 77, 256), "control": None,
                "transformer_options": {"cond_or_uncond": list(range(chunks))}, **rest}
        return Predict(cast(Any, self.remote), cast(Any, None), column[:, None].repeat(1, 3) + 1, rest, guests)

    def predict(self, rows: int = 4, chunks: int = 2, guests: tuple[str, ...] = (), **rest: Any) -> torch.Tensor:
        return self.ask(self.request(rows, chunks, guests, **rest))

    def ask(self, request: Predict) -> torch.Tensor:
        def host(asked: Request) -> torch.Tensor:
            self.hosts += 1
            if self.host_error is not None:
                raise self.host_error
            assert asked is request
            return self.model({"x": request.x, **request.rest})

        return cast(torch.Tensor, self.chain.answer(request, host))

    def expected(self, rows: int = 4) -> torch.Tensor:
        column = torch.arange(rows, dtype=torch.float32)[:, None]
        return (column + 1).repeat(1, 3) * 2 + column

    def asked(self) -> list[tuple[int, int, str]]:
        """(worker, rows, way) of each question since the last time."""
        calls, self.crew.calls = self.crew.calls, []
        return [(call.worker, call.rows, call.way) for call in calls]


def demoted(ring: Ring) -> list[tuple[str, str]]:
    return [(event.fields["way"], event.fields["reason"]) for event in ring.named("shard.demoted")]


class TestWays:
    def test_rows_are_shared_out(self, ring: Ring) -> None:
        """The host is not asked, nor its model placed."""
        scene = Scene()
        assert torch.equal(scene.predict(), scene.expected())
        assert scene.asked() == [(0, 2, ROWS), (1, 2, ROWS)]
        assert (scene.hosts, scene.remote.placed, demoted(ring)) == (0, 0, [])

    def test_each_gets_the_chunks_of_its_rows(self) -> None:
        """As the options name them."""
        scene = Scene()
        scene.predict(chunks=2)
        assert [call.chunks for call in scene.crew.calls] == [[0], [1]]

    def test_by_the_workers_weights(self) -> None:
        """A slow one gets less."""
        scene = Scene(weights=[3, 1])
        assert torch.equal(scene.predict(rows=8, chunks=1), scene.expected(8))
        assert scene.asked() == [(0, 6, ROWS), (1, 2, ROWS)]

    def test_a_single_row_goes_to_one_worker(self) -> None:
        """Where the workers did not meet."""
        scene = Scene()
        assert torch.equal(scene.predict(rows=1, chunks=1), scene.expected(1))
        assert scene.asked() == [(0, 1, ROWS)]

    @pytest.mark.parametrize(("off", "way"), [({}, TOKENS), ({"tokens": False}, HEADS)])
    def test_a_single_row_is_shared(self, off: dict[str, bool], way: str) -> None:
        """All are given the whole batch, and answer alike."""
        scene = Scene(**off)
        scene.crew.grouped = True
        assert torch.equal(scene.predict(rows=1, chunks=1), scene.expected(1))
        assert scene.asked() == [(0, 1, way), (1, 1, way)]

    def test_rows_that_are_too_few_for_all_come_after_tokens(self) -> None:
        """Nobody is to be idle."""
        scene = Scene(count=3)
        scene.crew.grouped = True
        scene.predict(rows=2)
        assert scene.asked() == [(0, 2, TOKENS), (1, 2, TOKENS), (2, 2, TOKENS)]

    def test_what_does_not_suit_a_model_is_not_asked_again(self, ring: Ring) -> None:
        """From tokens to heads to rows; the reasons are said once."""
        scene = Scene()
        scene.crew.grouped, scene.crew.unsuited = True, {TOKENS: "no family", HEADS: "no heads"}
        for _ in range(2):
            assert torch.equal(scene.predict(rows=1, chunks=1), scene.expected(1))
        assert [way for _, _, way in scene.asked()] == [TOKENS, TOKENS, HEADS, HEADS, ROWS, ROWS]
        assert demoted(ring) == [(TOKENS, "no family"), (HEADS, "no heads")]

    def test_rows_come_before_what_all_do_together(self) -> None:
        """They cost no exchange."""
        scene = Scene()
        scene.crew.grouped = True
        scene.predict()
        assert scene.asked() == [(0, 2, ROWS), (1, 2, ROWS)]

    def test_without_rows_one_worker_has_all(self) -> None:
        """The user turned them off."""
        scene = Scene(rows=False)
        scene.predict()
        assert scene.asked() == [(0, 4, ROWS)]

    def test_packs_see_the_whole_batch(self) -> None:
        """On one worker, or on all for their heads."""
        scene = Scene()
        scene.predict(guests=("pack.Patch",))
        assert scene.asked() == [(0, 4, ROWS)]
        scene.crew.grouped = True
        scene.predict(guests=("pack.Patch",))
        assert scene.asked() == [(0, 4, HEADS), (1, 4, HEADS)]

    def test_frames_of_a_video_stay_together(self) -> None:
        """A chunk for each worker."""
        scene = Scene(count=3)
        scene.predict(rows=4, chunks=2, num_video_frames=2)
        assert scene.asked() == [(0, 2, ROWS), (1, 2, ROWS)]

    def test_a_branch_has_its_own_workers(self) -> None:
        """And shares no heads, for which all would have to be asked."""
        scene = Scene(count=4)
        scene.crew.grouped = True
        side_by_side({place: lambda: [scene.predict(rows=1, chunks=1)] * 2 for place in (0, 1)})
        assert sorted(scene.asked()) == [(0, 1, ROWS), (1, 1, ROWS)]
        assert sorted(scene.freighter.delivered) == [[0, 2], [1, 3]]

    def test_branches_that_share_a_worker_do_not_mix_up_what_it_knows(self) -> None:
        """Each of them names what the other sent before."""
        scene = Scene(count=1)

        def branch(place: int) -> list[torch.Tensor]:
            for _ in range(20):
                answer = scene.predict(rows=1, chunks=1, c_crossattn=torch.full((1, 77, 256), float(place)))
                assert torch.equal(answer, torch.full((1, 3), 2.0 + place))
            return [answer] * 4

        side_by_side({place: lambda place=place: branch(place) for place in range(4)})  # type: ignore[misc]
        assert scene.hosts == 0

    def test_what_a_worker_has_free_is_known_afterwards(self) -> None:
        """For the host's next question."""
        scene = Scene()
        scene.predict()
        assert [worker.about["free_bytes"] for worker in scene.crew.workers] == [1000, 1001]

    def test_that_nothing_could_be_run_in_pieces_is_said_once(self, ring: Ring) -> None:
        scene = Scene()
        scene.predict()
        assert ring.named("policy.ineffective") == []
        scene.crew.whole = "it has no feed-forward"
        scene.predict()
        scene.predict()
        told = [(event.fields["policy"], event.fields["reason"]) for event in ring.named("policy.ineffective")]
        assert told == [("ray_shard", "ffn_chunks: Linear: it has no feed-forward")]


class TestDemotion:
    @pytest.mark.parametrize(("error", "words"), [
        (Failed("worker 1 on cpu: ValueError: bad"), "ValueError: bad"),
        (TypeError("cannot pickle 'generator' object"), "it cannot be sent: TypeError: cannot pickle"),
        (AttributeError("Can't pickle local object"), "it cannot be sent"), (RuntimeError("no"), "it cannot be sent"),
        (ValueError("no"), "it cannot be sent"), (ray.exceptions.ObjectStoreFullError("full"), "it cannot be sent"),
    ], ids=lambda value: type(value).__name__)
    @pytest.mark.parametrize("where", ["deliver", "gather"])
    def test_the_host_predicts(self, ring: Ring, error: Exception, words: str, where: str) -> None:
        """Once for each prediction, with its model in its place; the reason is said once."""
        scene = Scene()
        if where == "deliver":
            scene.freighter.error = error
        else:
            scene.crew.error = error
        for count in (1, 2):
            assert torch.equal(scene.predict(), scene.expected())
            assert (scene.hosts, scene.remote.placed) == (count, count)
        ((way, reason),) = demoted(ring)
        assert way == "local"
        assert words in reason
        assert not scene.crew.lost
        assert not ring.named("policy.failed")

    def test_what_fails_again_and_again_is_left_until_the_next_prompt(self, ring: Ring) -> None:
        """A model that no worker can take is not sent to them at every step."""
        scene = Scene()
        scene.freighter.error = Failed("no such module")
        for _ in range(6):
            scene.predict()
        assert (len(scene.freighter.delivered), scene.hosts) == (3, 6)
        scene.dispatcher.prompt_ended()
        scene.freighter.error = None
        scene.predict()
        assert (len(scene.asked()), scene.hosts) == (2, 6)
        assert len(demoted(ring)) == 1

    def test_a_failure_now_and_then_is_none_again_and_again(self) -> None:
        """An answer starts the count anew; other models have counts of their own."""
        scene = Scene()
        for _ in range(4):
            for error in (Failed("bad"), Failed("bad"), None):
                scene.crew.error = error
                scene.predict()
        assert scene.hosts == 8

    def test_conditioning_is_sent_anew_after_a_failure(self) -> None:
        """A worker that failed before it looked into the parcel knows nothing of what was new in it."""
        scene = Scene(count=1)
        scene.predict()
        scene.crew.workers[0].handle.received = Received()
        scene.predict()
        assert scene.hosts == 1
        assert torch.equal(scene.predict(), scene.expected())
        assert scene.hosts == 1

    def test_lost_workers_are_replaced(self, ring: Ring) -> None:
        """By the crew, while the host predicts this once."""
        scene = Scene()
        scene.crew.error = Lost([scene.crew.workers[1]], "worker 1 on cpu is dead")
        assert torch.equal(scene.predict(), scene.expected())
        assert (scene.hosts, scene.crew.lost) == (1, [([1], "worker 1 on cpu is dead")])
        assert demoted(ring) == [("local", "worker 1 on cpu is dead")]
        scene.crew.error = None
        scene.predict()
        assert scene.hosts == 1

    def test_a_pack_with_a_state_of_its_own(self, ring: Ring) -> None:
        """Its state is here; with these patches nobody asks the workers again, with others they are."""
        scene = Scene()
        scene.crew.stateful = True
        for _ in range(2):
            assert torch.equal(scene.predict(guests=("pack.Patch",)), scene.expected())
        assert (len(scene.asked()), scene.hosts) == (1, 2)
        assert [way for way, _ in demoted(ring)] == ["rows", "local"]
        scene.freighter.digest = "other patches"
        scene.predict(guests=("pack.Patch",))
        assert len(scene.asked()) == 1

    def test_a_model_whose_attention_cannot_be_shared(self, ring: Ring) -> None:
        """It goes to one worker whole, then and from then on."""
        scene = Scene()
        scene.crew.grouped, scene.crew.shared = True, 0
        for _ in range(2):
            assert torch.equal(scene.predict(rows=1, chunks=1), scene.expected(1))
        assert [way for _, _, way in scene.asked()] == [TOKENS, TOKENS, HEADS, HEADS, ROWS, ROWS]
        assert (scene.hosts, [way for way, _ in demoted(ring)]) == (0, ["tokens", "heads"])

    def test_a_broken_crew(self, ring: Ring) -> None:
        """Nobody is waited for."""
        scene = Scene()
        scene.crew.broken = "Ray did not start"
        assert torch.equal(scene.predict(), scene.expected())
        assert (scene.hosts, demoted(ring)) == (1, [("local", "Ray did not start")])

    @pytest.mark.parametrize("error", [Cancel(), KeyboardInterrupt(), branches.Abandoned()], ids=repr)
    def test_cancel_goes_up_as_it_is(self, ring: Ring, error: BaseException) -> None:
        """The host does not predict what the user does not want any more."""
        scene = Scene()
        scene.crew.error = error
        with pytest.raises(type(error)) as caught:
            scene.predict()
        assert caught.value is error
        assert (scene.hosts, demoted(ring)) == (0, [])

    @pytest.mark.parametrize("error", [TypeError("a pack's own"), RuntimeError("bad shapes"), AttributeError("x"),
                                       torch.OutOfMemoryError("full"), Cancel()], ids=repr)
    @pytest.mark.parametrize("when", ["compared", "demoted"])
    def test_the_hosts_own_error_goes_up(self, ring: Ring, error: BaseException, when: str) -> None:
        """Whatever kind it is, it is not taken for the workers', and the host runs once."""
        scene = Scene(verify="always")
        scene.host_error = error
        scene.crew.error = Failed("bad") if when == "demoted" else None
        with pytest.raises(type(error)) as caught:
            scene.predict()
        assert caught.value is error
        assert scene.hosts == 1

    def test_an_abandoned_branch_is_called_off(self) -> None:
        """It asks whether it is wanted while it waits."""
        scene = Scene()

        def abandoned() -> list[torch.Tensor]:
            lane().stop.set()
            return [scene.predict()]

        with pytest.raises(branches.Abandoned):
            side_by_side({0: abandoned})
        assert scene.hosts == 0


class TestVerifying:
    def test_the_first_of_each_kind_is_computed_here_too(self) -> None:
        """By shape; and the answer is the host's own."""
        scene = Scene(verify="first_step")
        scene.crew.model = lambda arguments: double(arguments) * (1 + 1e-6)
        first, second = scene.predict(), scene.predict()
        assert torch.equal(first, scene.expected())
        assert not torch.equal(second, scene.expected())
        assert scene.hosts == 1
        scene.predict(rows=2)
        assert scene.hosts == 2
        scene.predict(rows=2)
        assert scene.hosts == 2

    def test_once_for_each_set_of_packs(self) -> None:
        """They may do anything; weights that are patched cannot."""
        scene = Scene(verify="first_step")
        for guests in ("one",), ("two",), ("one",):
            scene.predict(guests=guests)
            scene.predict()
        assert scene.hosts == 3

    def test_always(self) -> None:
        """Each is the host's."""
        scene = Scene(verify="always")
        for count in (1, 2, 3):
            assert torch.equal(scene.predict(), scene.expected())
            assert scene.hosts == count

    def test_off(self) -> None:
        """Nobody looks."""
        scene = Scene(verify="off")
        scene.crew.model = lambda arguments: double(arguments) * 2
        scene.predict()
        assert scene.hosts == 0

    @pytest.mark.parametrize("wrong", [
        lambda arguments: double(arguments) * 1.01, lambda arguments: double(arguments)[:, :2],
        lambda arguments: double(arguments) / 0, lambda arguments: torch.full_like(double(arguments), float("nan")),
    ], ids=["differs", "other shape", "infinite", "nan"])
    def test_what_differs_is_not_asked_again(self, ring: Ring, wrong: Model) -> None:
        """The host's answer is taken; with the same patches that way is closed, for that model alone."""
        scene = Scene(verify="first_step")
        scene.crew.model = wrong
        for count in (1, 2):
            assert torch.equal(scene.predict(), scene.expected())
            assert scene.hosts == count
        assert len(scene.asked()) == 2
        assert "what the workers computed differs by" in demoted(ring)[0][1]

        scene.crew.model = double
        scene.remote = FakeRemote()
        scene.predict()
        assert len(scene.asked()) == 2

    def test_another_way_is_still_open(self) -> None:
        """Tokens, where rows differ."""
        scene = Scene(verify="first_step")
        scene.crew.grouped = True
        scene.crew.model = lambda arguments: double(arguments) * 1.01
        scene.predict()
        scene.crew.model = double
        scene.predict()
        assert scene.asked() == [(0, 2, ROWS), (1, 2, ROWS), (0, 4, TOKENS), (1, 4, TOKENS)]

    @pytest.mark.parametrize(("dtype", "factor", "accepted"), [
        (torch.float32, 5e-5, True), (torch.float32, 1e-3, False), (torch.bfloat16, 1e-2, True), (torch.bfloat16, 1e-1, False),
        (torch.float16, 1e-2, True), (torch.float64, 5e-5, True), (torch.float8_e4m3fn, 1e-2, True),
    ], ids=str)
    def test_as_exact_as_the_coarser_of_weights_and_latents(self, dtype: torch.dtype, factor: float, accepted: bool) -> None:
        """Latents are float32 here; weights may be anything."""
        scene = Scene(verify="first_step")
        scene.remote = FakeRemote(torch.nn.Linear(2, 2).to(dtype))
        scene.crew.model = lambda arguments: double(arguments) * (1 + factor)
        scene.predict()
        scene.predict()
        assert scene.hosts == (1 if accepted else 2)


def test_the_score_of_a_prompt(ring: Ring) -> None:
    """Calls by way; the speedup against the last prediction of that kind here. An idle prompt says nothing."""
    scene = Scene(verify="first_step")
    assert not scene.dispatcher.prompt_ended()
    scene.predict()
    scene.predict()
    assert scene.dispatcher.prompt_ended()
    (event,) = ring.named("shard.finished")
    assert event.fields["calls"] == {"rows": 2, "local": 1}
    assert event.fields["sent_bytes"] > 4 * 77 * 256 * 4
    assert event.fields["received_bytes"] == 2 * 4 * 3 * 4
    assert event.fields["speedup"] > 0
    assert event.fields["compute_seconds"] == event.fields["transfer_seconds"] == 2 * 0.05
    assert "why" not in event.fields
    assert not scene.dispatcher.prompt_ended()


def test_why_a_way_is_passed_over_is_told_with_each_prompt(ring: Ring) -> None:
    """Though the console says it once."""
    scene = Scene()
    scene.crew.error = Failed("bad")
    for _ in range(2):
        scene.predict()
        scene.dispatcher.prompt_ended()
    assert [event.fields["why"] for event in ring.named("shard.finished")] == [{"local": "bad"}] * 2
    assert len(ring.named("shard.demoted")) == 1


def test_one_model_is_placed_at_a_time() -> None:
    """Branches whose host has to predict do so one after the other."""
    scene = Scene()
    scene.crew.error = Failed("bad")
    inside: list[int] = []
    together = threading.Event()

    def slow(arguments: dict[str, Any]) -> torch.Tensor:
        inside.append(1)
        if len(inside) > 1:
            together.set()
        together.wait(0.05)
        inside.pop()
        return double(arguments)

    scene.model = slow
    side_by_side({place: lambda: [scene.predict()] * 2 for place in (0, 1)})
    assert (scene.hosts, together.is_set()) == (2, False)
