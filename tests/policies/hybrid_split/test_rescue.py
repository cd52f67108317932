"""Out of memory, in numbers: who gives back what, how often something is repeated, and what the user reads in the end."""
from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from residency.policies import Tools
from residency.policies.chain import PolicyChain
from residency.policies.computing import Compute, ComputeAll, ComputeImage, ComputeStep, ComputeTiles, IgnoreError
from residency.policies.hybrid_split import HybridSplit, Settings
from residency.policies.hybrid_split.headroom import Headroom
from residency.policies.policy import OutOfMemory
from residency.policies.requests import PlaceModel, Request
from residency.policies.sampling import SampleStep
from residency.telemetry.sinks import Ring

MB = 2**20
DEVICE = torch.device("meta")


class DeviceFull(RuntimeError):
    """As torch's own."""


class Cancel(Exception):
    """As older hosts'."""


@dataclass
class Model:
    """Weights in numbers: 100 MB, of which `held` are on the device."""

    memory: Any
    held: int = 100 * MB
    name: str = "Flux"
    component: str = "text_encoder"  # which the settings leave to ComfyUI, so that no budget but ours has a say
    streamed_by_host: bool = False
    lora: bool = False
    fails: BaseException | None = None
    given: list[float] = field(default_factory=list)
    anew: int = 0
    module: torch.nn.Module = field(default_factory=lambda: torch.nn.Linear(1, 1))

    def size(self) -> int:
        return 100 * MB

    def on_device(self) -> int:
        return self.held

    def patched(self) -> set[str]:
        return {"weight"} if self.lora else set()

    def place_anew(self) -> None:
        self.anew += 1

    def give_back(self, size: float) -> int:
        if self.fails:
            raise self.fails
        self.given.append(size)
        gone = int(min(size, self.held))
        self.held -= gone
        self.memory.free += gone
        return gone


class Host:
    """Fails as it is told, then answers; `requests` is what it was asked."""

    def __init__(self, *errors: BaseException | None, then: Callable[[], Any] = lambda: "answer") -> None:
        self.errors, self.requests, self.then = list(errors), [], then

    def __call__(self, request: Request) -> Any:
        self.requests.append(request)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return self.then()


@dataclass
class Rescued:
    """The policy in a chain, on a device of 1000 MB of which 10 are free."""

    tools: Tools

    def __post_init__(self) -> None:
        self.memory: Any = self.tools.host.memory
        self.memory.free, self.memory.total, self.memory.accelerators = 10 * MB, 1000 * MB, [str(DEVICE)]
        self.memory.is_oom = lambda error: isinstance(error, DeviceFull)
        self.policy = HybridSplit(Settings(skip_clip=True), self.tools)
        self.chain = PolicyChain([self.policy], self.tools.host.lifecycle.is_cancel, self.memory.is_oom)
        self.model = Model(self.memory)
        self.rewound = 0

    def rewind(self) -> None:
        self.rewound += 1

    def compute(self, host: Host, kind: type[Compute] = ComputeStep) -> Any:
        return self.chain.answer(kind("a sampling step", self.model, DEVICE, self.rewind), host)

    def place(self, host: Host, more: float | None = 50 * MB) -> Any:
        return self.chain.answer(PlaceModel(self.model, DEVICE, more), host)


@pytest.fixture
def rescued(tools: Tools) -> Rescued:
    return Rescued(tools)


def test_what_fits_is_asked_once_and_nothing_is_freed(rescued: Rescued, ring: Ring) -> None:
    """The ordinary case."""
    host = Host()
    assert rescued.compute(host) == "answer"
    assert (len(host.requests), rescued.model.given, rescued.memory.others, rescued.rewound) == (1, [], [], 0)
    assert ring.named("rescue.repeated") == []


def test_a_step_is_repeated_after_half_of_the_model_left(rescued: Rescued, ring: Ring) -> None:
    """Others leave first, and random numbers are drawn again as they were."""
    host = Host(DeviceFull("tried to allocate 5 bytes\nmore"))
    assert rescued.compute(host) == "answer"

    assert len(host.requests) == 2
    assert rescued.model.given == [50 * MB]
    assert rescued.memory.others == [("meta", rescued.model.module)]
    assert rescued.rewound == 1
    (event,) = ring.named("rescue.repeated")
    assert {key: value for key, value in event.fields.items() if key != "seconds"} == {
        "what": "a sampling step", "model": "Flux", "attempt": 1, "freed_bytes": 50 * MB, "error": "tried to allocate 5 bytes"}


def test_the_second_repeat_takes_everything(rescued: Rescued) -> None:
    """Then the model streams."""
    assert rescued.compute(Host(DeviceFull("1"), DeviceFull("2"))) == "answer"
    assert rescued.model.held == 0


def test_the_hosts_own_error_goes_up_in_the_end_with_figures(rescued: Rescued, ring: Ring) -> None:
    """The same object, its own words first, one sentence of ours, and its traceback."""
    last = DeviceFull("tried to allocate 5 bytes")
    with pytest.raises(DeviceFull) as raised:
        rescued.compute(Host(DeviceFull("1"), DeviceFull("2"), last))

    assert raised.value is last
    assert str(last) == ("tried to allocate 5 bytes\nResidency freed 100 MB and repeated it 2 times, in vain. "
                         "meta has 110 MB of 1000 MB free, Flux has 0 MB of its 100 MB there.")
    assert last.__traceback__ is not None
    (event,) = ring.named("rescue.failed")
    assert event.fields == {"what": "a sampling step", "model": "Flux", "attempts": 2, "freed_bytes": 100 * MB,
                            "error": "tried to allocate 5 bytes"}
    assert ring.named("policy.failed") == []


def test_it_is_not_repeated_again_where_nothing_could_be_freed(rescued: Rescued) -> None:
    """A second attempt would be the same as the first."""
    rescued.model.held = 0
    host = Host(DeviceFull("1"), DeviceFull("2"), DeviceFull("3"))
    with pytest.raises(DeviceFull, match="repeated it 1 times"):
        rescued.compute(host)
    assert len(host.requests) == 2


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   ValueError("bad"), Cancel("stop"), KeyboardInterrupt()], ids=repr)
def test_other_errors_go_up_at_once(rescued: Rescued, error: BaseException) -> None:
    """A mistake, the CPU's own memory, a Cancel: as they are."""
    host = Host(error)
    with pytest.raises(type(error)) as raised:
        rescued.compute(host)
    assert raised.value is error
    assert len(host.requests) == 1
    assert len(error.args) < 2
    assert rescued.memory.others == []


def test_an_ordinary_error_of_a_repeat_goes_up_as_it_is(rescued: Rescued) -> None:
    """It is not ours to explain."""
    error = RuntimeError("mat1 and mat2")
    with pytest.raises(RuntimeError) as raised:
        rescued.compute(Host(DeviceFull("1"), error))
    assert (raised.value, str(error)) == (error, "mat1 and mat2")


def test_cancel_comes_before_a_repeat(rescued: Rescued, ring: Ring) -> None:
    """The user pressed it while room was made."""
    cancel, host = Cancel(), Host(DeviceFull("1"))
    rescued.tools.host.lifecycle.cancel = cancel  # type: ignore[attr-defined]
    with pytest.raises(Cancel) as raised:
        rescued.compute(host)
    assert raised.value is cancel
    assert len(host.requests) == 1
    assert ring.named("policy.failed") == []


@pytest.mark.parametrize("error", [RuntimeError("cannot move"), TypeError("unexpected keyword")], ids=repr)
def test_a_failure_to_make_room_shows_the_hosts_error(rescued: Rescued, error: Exception) -> None:
    """Not the one that came later, of a pack's own patcher for example."""
    rescued.model.fails = error
    first, host = DeviceFull("tried to allocate"), Host(DeviceFull("never"))
    host.errors[0] = first
    with pytest.raises(DeviceFull, match="repeated it 1 times") as raised:
        rescued.compute(host)
    assert raised.value is first
    assert len(host.requests) == 1


def test_the_failed_tensors_are_gone_before_room_is_made(rescued: Rescued) -> None:
    """Neither the error, nor one that it was raised from, nor the chain keeps them."""
    alive: list[weakref.ref[torch.Tensor]] = []
    found: list[list[bool]] = []

    def inner() -> None:
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        raise DeviceFull("inner")

    def fail() -> None:
        mine = torch.zeros(3)
        alive.append(weakref.ref(mine))
        try:
            inner()
        except DeviceFull as error:
            raise DeviceFull("outer") from error

    class Failing(Host):
        def __call__(self, request: Request) -> Any:
            self.requests.append(request)
            if len(self.requests) == 1:
                fail()
            return "answer"

    rescued.memory.free_others = lambda device, module: found.append([one() is None for one in alive])
    assert rescued.compute(Failing()) == "answer"
    assert found == [[True, True]]


class TestWholeCalls:
    def test_are_repeated_once(self, rescued: Rescued) -> None:
        """What lies outside of a step."""
        host = Host(DeviceFull("1"), DeviceFull("2"))
        with pytest.raises(DeviceFull):
            rescued.compute(host, ComputeAll)
        assert len(host.requests) == 2

    def test_are_repeated_when_a_step_gave_up(self, rescued: Rescued, ring: Ring) -> None:
        """Five runs of the step at most, and one error that counts them all."""
        step = Host(*(DeviceFull(str(number)) for number in range(1, 7)))
        whole = Host(then=lambda: rescued.compute(step))
        with pytest.raises(DeviceFull) as raised:
            rescued.compute(whole, ComputeAll)

        assert (len(whole.requests), len(step.requests)) == (2, 5)
        assert str(raised.value).count("Residency freed") == 1
        assert "5\nResidency" in str(raised.value)
        assert len(ring.named("rescue.failed")) == 1

    def test_in_each_other_are_not_repeated_twice(self, rescued: Rescued, ring: Ring) -> None:
        """`sample` calls the guider's `sample`."""
        inner = Host(*(DeviceFull(str(number)) for number in range(9)))
        outer = Host(then=lambda: rescued.compute(inner, ComputeAll))
        with pytest.raises(DeviceFull, match="repeated it 1 times"):
            rescued.compute(outer, ComputeAll)
        assert (len(outer.requests), len(inner.requests)) == (1, 2)
        assert len(ring.named("rescue.failed")) == 1

    def test_a_step_in_a_step_is_not_repeated_by_both(self, rescued: Rescued) -> None:
        """A VAE in a ControlNet."""
        inner = Host(*(DeviceFull(str(number)) for number in range(9)))
        outer = Host(then=lambda: rescued.compute(inner))
        with pytest.raises(DeviceFull):
            rescued.compute(outer)
        assert (len(outer.requests), len(inner.requests)) == (1, 3)


class TestTiles:
    def tiles(self, rescued: Rescued) -> Any:
        return rescued.chain.answer(ComputeTiles(), Host(then=lambda: "tiles"))

    def test_come_after_the_repeats(self, rescued: Rescued) -> None:
        """The host swallows its out-of-memory and goes on in tiles; it is asked to start anew instead, twice."""
        host = Host(then=partial(self.tiles, rescued))
        assert rescued.compute(host, ComputeImage) == "tiles"
        assert len(host.requests) == 3

    def test_come_at_once_where_somebody_asks_for_them(self, rescued: Rescued) -> None:
        """The node for it, or a pack that calls the VAE itself."""
        assert self.tiles(rescued) == "tiles"
        assert rescued.compute(Host(then=partial(self.tiles, rescued))) == "tiles"

    def test_a_refusal_never_reaches_the_user(self, rescued: Rescued) -> None:
        """It is raised only where it is caught."""
        with pytest.raises(DeviceFull, match="in tiles too"):
            rescued.compute(Host(OutOfMemory("1"), OutOfMemory("2"), DeviceFull("in tiles too")), ComputeImage)


class TestErrorsThatTheHostIgnores:
    def ignored(self, rescued: Rescued) -> Any:
        return rescued.chain.answer(IgnoreError(DeviceFull("of a LoRA")), Host(then=lambda: "logged"))

    def test_are_an_out_of_memory_like_any_other(self, rescued: Rescued) -> None:
        """A model without its LoRA would make another image."""
        host = Host(then=partial(self.ignored, rescued))
        with pytest.raises(OutOfMemory, match="of a LoRA\nResidency") as raised:
            rescued.place(host)
        assert len(host.requests) == 3
        assert isinstance(raised.value, torch.OutOfMemoryError)

    def test_are_the_hosts_own_affair_elsewhere(self, rescued: Rescued) -> None:
        """Where nobody would repeat anything."""
        assert self.ignored(rescued) == "logged"


class TestPlacing:
    def test_a_model_that_did_not_fit_is_loaded_with_half_and_then_with_nothing(self, rescued: Rescued) -> None:
        """Of its budget, or of its size where the budget is larger; the host has taken it off the device."""
        rescued.model.held = 0
        for budget, half in ((60 * MB, 30 * MB), (500 * MB, 50 * MB)):
            rescued.policy.emptied()
            host = Host(DeviceFull("1"), DeviceFull("2"))
            assert rescued.place(host, budget) == "answer"
            assert [request.more_bytes for request in host.requests] == [budget, half, 0]

    def test_a_model_without_a_limit_stays_without(self, rescued: Rescued) -> None:
        """One that cannot stream, for example: others make room."""
        host = Host(DeviceFull("1"))
        assert rescued.place(host, None) == "answer"
        assert [request.more_bytes for request in host.requests] == [None, None]
        assert len(rescued.memory.others) == 1

    def test_what_was_given_back_stays_free(self, rescued: Rescued) -> None:
        """At the next placings, until the user frees all memory."""
        rescued.compute(Host(DeviceFull("1")))
        host = Host()
        rescued.place(host, 10 * MB)
        rescued.policy.emptied()
        rescued.place(host, 10 * MB)
        # It holds 50 MB, and 10 more are offered: 60, less the 50 that it gave back, is 40 less than it holds.
        assert [request.more_bytes for request in host.requests] == [-40 * MB, 10 * MB]

    def test_patches_go_into_all_weights_of_what_is_repeated(self, rescued: Rescued) -> None:
        """Those that stream would be rounded in another way; the next placing starts anew."""
        rescued.model.lora = True
        host = Host(None, DeviceFull("1"))
        rescued.place(host)
        rescued.place(host)
        assert [request.patch_all for request in host.requests] == [False, False, True]
        assert rescued.model.anew == 1

    def test_on_the_cpu_nothing_is_done(self, rescued: Rescued) -> None:
        """Its memory is the system's."""
        assert rescued.policy.decide(PlaceModel(rescued.model, torch.device("cpu"), 5)) is None


def test_headroom_never_exceeds_the_model() -> None:
    """And a model that was never short has none."""
    model, headroom = Model(None), Headroom()
    request = PlaceModel(model, DEVICE, 7)
    assert headroom.within(request) is request
    for _ in range(3):
        headroom.add(model, 60 * MB)
    assert headroom.reserve_of(model.module) == 100 * MB
    assert headroom.within(PlaceModel(model, DEVICE, 20 * MB)).more_bytes == -80 * MB
    assert headroom.within(PlaceModel(model, DEVICE, None)).more_bytes is None


def test_without_the_setting_nothing_is_hooked_for_it(tools: Tools) -> None:
    """The hot seams are left alone."""
    kinds = {SampleStep, ComputeStep, ComputeImage, ComputeAll, ComputeTiles}
    assert kinds <= HybridSplit(Settings(), tools).answers
    assert not kinds & HybridSplit(Settings(rescue=False), tools).answers


@pytest.mark.parametrize(("device", "alone", "rescued"), [
    (DEVICE, True, True), (DEVICE, False, False), (torch.device("cpu"), True, False)])
def test_only_a_step_on_a_device_that_no_pack_takes_part_in_is_repeated(tools: Tools, device: torch.device, alone: bool,
                                                                        rescued: bool) -> None:
    """Packs may count steps."""
    request = SampleStep("a sampling step", Model(None), device, lambda: None, alone, None, torch.zeros(1, 4, 8, 8), dict)
    assert (HybridSplit(Settings(), tools).decide(request) is not None) is rescued
