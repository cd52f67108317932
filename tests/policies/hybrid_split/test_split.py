"""What a model's budget becomes, by settings and rules, with numbers."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from residency import telemetry
from residency.policies.hybrid_split import HybridSplit, Settings
from residency.policies.hybrid_split.settings import Rule
from residency.policies.memory import Limits
from residency.policies.models import Part
from residency.policies.policy import Effect
from residency.policies.requests import FreeMemory, LoadModel, MoveWeights, PlaceModel, PlaceModels
from residency.telemetry.sinks import Ring

MB = 2**20
CUDA = torch.device("cuda:0")


class Weights:
    """A model of 64 MB in modules of 1 MB, on a host that needs a buffer of 3 MB for what is streamed."""

    name, paths, component, streamed_by_host, stale, honest = "Flux", ("/m/flux.gguf",), "diffusion_model", False, 0, True
    pages: bool = True

    def __init__(self, held: int = 0) -> None:
        self.module, self.held, self.taken_off, self.capped = torch.nn.Linear(1, 1), held, 0, []

    def size(self) -> int:
        return 64 * MB

    def on_device(self) -> int:
        return self.held

    def patched(self) -> set[str]:
        return set()

    def load_device(self) -> str:
        return "cuda:0"

    def foreseen(self, more: float, split: bool = False) -> int:
        total = self.held + more
        return 64 * MB if total > 64 * MB and not split else max(0, int(min(total - 3 * MB, 64 * MB)) // MB * MB)

    def left_over(self, more: float, split: bool = False) -> int:
        return self.stale

    def take_off(self) -> None:
        self.taken_off, self.held, self.stale = self.taken_off + 1, 0, 0

    def more_for(self, limit: int) -> float:
        return limit // MB * MB + 3 * MB - self.held

    def by_device(self) -> dict[str, int]:
        return {"cuda:0": self.held if self.honest else 0}

    def cap(self, limit: int) -> bool:
        self.capped.append(limit)
        return self.pages

    def place(self, request: PlaceModel, split: bool = False) -> str:
        """The host."""
        self.held = 64 * MB if request.more_bytes is None else self.foreseen(request.more_bytes, split)
        return "placed"


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    telemetry.replace([ring])
    yield ring
    telemetry.replace([])


@pytest.fixture
def place(tools: Any, ring: Ring) -> Any:
    """Places weights by these settings, ComfyUI's own figure being 40 MB beside what is there; returns the policy."""
    def ask(weights: Weights, policy: HybridSplit | None = None, more: float | None = 40 * MB, device: torch.device = CUDA,
            **settings: Any) -> HybridSplit:
        policy = policy or HybridSplit(Settings(**settings), tools)
        request = PlaceModel(weights, device, more)
        decision = policy.decide(request)

        def proceed(asked: PlaceModel | None = None) -> str:
            asked = asked or request
            all_of_it = asked.more_bytes is None or asked.more_bytes + weights.held > weights.size()
            moved = MoveWeights(weights, device, all_of_it)
            split = policy.decide(moved)
            whole = split.act(lambda changed=moved: changed.whole) if split else moved.whole
            return weights.place(asked, not whole)

        assert (decision.act(proceed) if decision else proceed()) == "placed"
        return policy
    return ask


def test_comfyuis_own_figure_stays_in_auto_without_rules(place: Any, ring: Ring) -> None:
    """37 MB: its buffer comes out of it. The log says whose figure it is, once; of a model that is all there, nothing."""
    weights = Weights()
    policy = place(weights)
    assert weights.held == 37 * MB
    place(weights, policy, more=3 * MB)
    assert [event.fields["figure"] for event in ring.named("split.planned")] == ["ComfyUI's"]

    place(Weights(held=64 * MB), policy)
    assert len(ring.named("split.planned")) == 1


@pytest.mark.parametrize(("rule", "held"), [
    (Rule(device_gb=20 / 1024), 20), (Rule(device_gb=63 / 1024), 63), (Rule(device_gb=64 / 1024), 64), (Rule(device_gb=1), 64),
    (Rule(residency="host"), 0), (Rule(residency="device"), 64), (Rule(name="other*", device_gb=1 / 1024), 37),
    (Rule(name="flux*", device_gb=5 / 1024), 5), (Rule(component="vae", residency="host"), 37),
])
def test_a_rule_states_what_is_on_the_device(place: Any, ring: Ring, rule: Rule, held: int) -> None:
    """The buffer comes on top of a stated limit, even where both are more than the model."""
    weights = Weights()
    policy = place(weights, rules=(rule,))
    assert weights.held == held * MB
    event = ring.named("split.planned")[0].fields
    if held != 37:
        assert (event["predicted_bytes"], event["streamed_bytes"]) == (held * MB, (64 - held) * MB)
        assert event["mode"] == ("gpu_only" if held == 64 else "hybrid")
    assert event["figure"] == ("ComfyUI's" if held == 37 else "the rule's")
    assert policy.prompt_ended() == Effect(held * MB, held * MB)
    assert policy.prompt_ended() is None


def test_a_warm_prompt_says_nothing_again(place: Any, ring: Ring) -> None:
    weights = Weights()
    policy = place(weights, rules=(Rule(device_gb=20 / 1024),))
    place(weights, policy)
    assert (weights.held, weights.taken_off) == (20 * MB, 0)
    assert len(ring.named("split.planned")) == 1


@pytest.mark.parametrize(("settings", "held"), [
    ({}, 32), ({"conservative_factor": 0.9}, 43), ({"overhead_percent": 30}, 24), ({"conservative_factor": 0.5}, 22),
    ({"rules": (Rule(conservative_factor=0.5),)}, 22), ({"rules": (Rule(conservative_factor=0.5, component="vae"),)}, 32),
    ({"rules": (Rule(device_gb=7 / 1024),)}, 7),
])
def test_the_conservative_budget_follows_its_numbers(place: Any, tools: Any, settings: dict[str, Any], held: int) -> None:
    """(free - overhead) * factor, less the host's buffer; a rule's own number wins."""
    tools.host.memory.free, tools.host.memory.total = 64 * MB, 80 * MB
    weights = Weights()
    place(weights, mode="conservative", **settings)
    # 64 - 12 = 52 MB free of overhead; * 0.7 = 36.4, less 3 and whole modules
    assert weights.held == pytest.approx(held * MB, abs=2 * MB)


def test_what_the_model_has_there_is_free_for_it(place: Any, tools: Any) -> None:
    """A second prompt finds less free memory and the same budget."""
    tools.host.memory.free, tools.host.memory.total = 64 * MB, 80 * MB
    weights = Weights()
    policy = place(weights, mode="conservative")
    first = weights.held
    tools.host.memory.free -= first
    place(weights, policy)
    assert weights.held == first > 0


def test_a_rule_may_force_a_conservative_factor_in_auto(place: Any, tools: Any, ring: Ring) -> None:
    tools.host.memory.free, tools.host.memory.total = 64 * MB, 80 * MB
    place(Weights(), rules=(Rule(conservative_factor=0.5),))
    assert ring.named("split.planned")[0].fields["figure"] == "conservative"


@pytest.mark.parametrize("change", [{"more": None}, {"device": torch.device("cpu")}])
def test_what_cannot_be_split_or_has_no_device_is_left_alone(place: Any, ring: Ring, change: dict[str, Any]) -> None:
    """A host that asks for all of it knows why."""
    place(Weights(), rules=(Rule(device_gb=1 / 1024),), **change)
    assert ring.named("split.planned") == []


def test_text_encoders_are_left_to_comfyui_if_the_user_says_so(place: Any) -> None:
    for skip, held in ((True, 37), (False, 5)):
        weights = Weights()
        weights.component = "text_encoder"
        place(weights, skip_clip=skip, rules=(Rule(device_gb=5 / 1024),))
        assert weights.held == held * MB


def test_modules_that_comfyui_would_leave_there_uncounted_go_first(place: Any) -> None:
    weights = Weights(held=30 * MB)
    weights.stale = MB
    place(weights, rules=(Rule(device_gb=20 / 1024),))
    assert (weights.taken_off, weights.held) == (1, 20 * MB)


def test_a_model_that_nothing_holds_is_loaded_all_the_same_and_said_before(place: Any, tools: Any, ring: Ring) -> None:
    """With the shortfall to the byte: RAM is whatever the pad leaves, here nothing but the model's own 8 bytes."""
    tools.ledger.limits = Limits(pad=10**15)
    place(Weights(), rules=(Rule(device_gb=20 / 1024),))
    names = [event.name for event in ring.events]
    assert names.index("split.insufficient") < len(names)
    assert ring.named("split.insufficient")[0].fields["shortfall_bytes"] == 44 * MB
    assert ring.named("split.planned")[0].fields["mode"] == "insufficient"


def test_a_split_that_did_not_happen_is_said_and_not_tried_again(place: Any, ring: Ring) -> None:
    weights = Weights()
    weights.honest = False
    policy = place(weights, rules=(Rule(device_gb=20 / 1024),))
    assert ring.named("policy.ineffective")[0].fields["observed_bytes"] == 0
    weights.held = 0
    place(weights, policy)
    assert weights.held == 37 * MB
    assert len(ring.named("policy.ineffective")) == 1


def test_pages_of_dynamic_vram_get_the_limit(place: Any, ring: Ring) -> None:
    """Nothing else is done to them; a library without such a limit is named once."""
    weights = Weights()
    weights.streamed_by_host = True
    policy = place(weights, rules=(Rule(device_gb=20 / 1024),))
    assert (weights.capped, weights.held) == ([20 * MB], 37 * MB)
    assert ring.named("split.capped")[0].fields["budget_bytes"] == 20 * MB

    weights.pages = False
    place(weights, policy)
    place(weights, policy)
    assert [event.fields["policy"] for event in ring.named("policy.declined")] == ["hybrid_split, dynamic VRAM"]


def test_room_is_made_for_what_a_limit_leaves_of_a_model(tools: Any) -> None:
    """Once for the weights; what ComfyUI wants for computing stays as it is, and so does another device."""
    policy = HybridSplit(Settings(rules=(Rule(device_gb=20 / 1024),)), tools)
    wanted = []

    def free(size: float, device: str = "cuda:0") -> None:
        request = FreeMemory(device, size)
        decision = policy.decide(request)
        wanted.append(decision.act(lambda asked: asked.bytes_wanted) if decision else size)

    def proceed() -> None:
        free(1.1 * 64 * MB + 100, "cuda:1")
        free(1.1 * 64 * MB + 100)
        free(1000.0)

    policy.decide(PlaceModels((Weights(),))).act(proceed)
    free(1.1 * 64 * MB)
    assert wanted == [1.1 * 64 * MB + 100, pytest.approx(1.1 * 20 * MB + 100), 1000.0, 1.1 * 64 * MB]
    assert policy.decide(PlaceModels((Weights(held=64 * MB),))) is None


def test_a_rule_moves_a_model_to_a_device_that_exists(tools: Any, ring: Ring) -> None:
    """And says once of one that does not that the model runs where ComfyUI chose."""
    moved: list[str] = []
    part = Part("text_encoder", torch.nn.Linear(1, 1), 64, moved.append)
    request = LoadModel("text encoder", ("/m/t5.safetensors",), {}, lambda answer: None, parts=lambda answer: [part])
    for device in ("cpu", "cuda:5"):
        policy = HybridSplit(Settings(rules=(Rule(component="text_encoder", device=device),)), tools)
        for _ in range(2):
            assert policy.decide(request).act(lambda: "answer") == "answer"
    assert moved == ["cpu", "cpu"]
    assert [event.fields["policy"] for event in ring.named("policy.declined")] == ["hybrid_split, device cuda:5"]


@pytest.mark.parametrize(("settings", "held"), [({}, 37 - 10), ({"rules": (Rule(device_gb=20 / 1024),)}, 20 - 10)])
def test_what_a_model_gave_back_when_memory_ran_out_comes_off_every_budget(place: Any, tools: Any, ring: Ring,
                                                                          settings: dict[str, Any], held: int) -> None:
    """ComfyUI's own and a stated one, until the user frees all memory."""
    weights, policy = Weights(), HybridSplit(Settings(**settings), tools)
    assert policy._rescue is not None
    policy._rescue.headroom.add(weights, 10 * MB)
    place(weights, policy)
    assert weights.held == held * MB
    policy.emptied()
    weights.held = 0
    place(weights, policy)
    assert weights.held == (held + 10) * MB
