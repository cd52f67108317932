"""Workers that Ray starts, under a real ComfyUI on the CPU: the same latents, by rows of a batch, tokens and heads.

Local and remote sums are made in another order where a batch is split, so latents are compared to a relative error of 1e-5 in
float32; a control shows that what changes the image is a thousand times that.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import troubles, wait_for
from support import workflows
from support.server import MB, PATCHING_NODES, PromptFailed, Server, both
from support.workflows import Workflow, node

pytestmark = pytest.mark.ray

TOLERANCE = 1e-5
LORA = (("flux_one", 1.0),)


def settings(workers: int | str = 2, **more: Any) -> str:
    lines = [f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for name, value in more.items()]
    return "\n".join(['policies = ["ray_shard", "hybrid_split", "preload_cache", "zero_copy"]', "[ray_shard]",
                      f"workers = {workers}", *lines]).replace("'", '"')


def patched(flow: Workflow, kind: str, amount: float = 1.0) -> Workflow:
    """The same with a patch of a pack between the model and the sampler."""
    flow = copy.deepcopy(flow)
    sample = flow["sample"]["inputs"]
    flow["patch"] = node(kind, model=sample["model"], amount=amount)
    sample["model"] = ["patch", 0]
    return flow


def sampled(flow: Workflow, batch: int = 1, **options: Any) -> Workflow:
    """The same with other choices on the sampler, and more latents."""
    flow = copy.deepcopy(flow)
    flow["sample"]["inputs"] |= options
    flow["empty"]["inputs"]["batch_size"] = batch
    return flow


FLUX, SD3 = workflows.text_to_latent("flux_a_fp32"), workflows.from_checkpoint("sd3_fp32")
WAN = workflows.video("wan", "wan")


@contextmanager
def pair(models: Path, factory: pytest.TempPathFactory, text: str, *, comfyui: Path = COMFYUI,
         **more: Any) -> Iterator[tuple[Server, Server]]:
    folders = factory.mktemp("alone"), factory.mktemp("plugin")
    more = {"packs": [PATCHING_NODES], **more}
    with both(partial(Server, comfyui, folders[0], models, plugin=False, **more),
              partial(Server, comfyui, folders[1], models, settings=text, **more)) as servers:
        yield servers


class Pair:
    """ComfyUI alone, whose latents are kept, and the same with workers."""

    def __init__(self, alone: Server, plugin: Server) -> None:
        self.alone, self.plugin = alone, plugin
        self._known: dict[str, torch.Tensor] = {}

    def expected(self, flow: Workflow, prefix: str = "out") -> torch.Tensor:
        key = repr((flow, prefix))
        if key not in self._known:
            self.alone.run(flow)
            self._known[key] = self.alone.latents(prefix)
        return self._known[key]

    def error(self, flow: Workflow, prefix: str = "out", like: Workflow | None = None) -> float:
        """The largest difference, of the largest value, to what ComfyUI alone makes of it, or of another workflow."""
        expected = self.expected(like or flow, prefix)
        self.plugin.run(flow)
        assert torch.isfinite(expected).all()
        assert expected.std() > 0
        return float((self.plugin.latents(prefix) - expected).abs().max() / expected.abs().max())

    def calls(self) -> dict[str, int]:
        """How the last prompt's predictions were made."""
        found: dict[str, int] = self.plugin.events("shard.finished")[-1]["calls"]
        return found


@pytest.fixture(scope="module")
def ray_pair(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(models, tmp_path_factory, settings(2, verify="off")) as servers:
        yield Pair(*servers)
        assert troubles(servers[1]) == []
        assert servers[1].events("worker.lost") == []


@pytest.mark.parametrize("flow", [
    pytest.param(FLUX, id="Flux"),
    pytest.param(sampled(FLUX, cfg=3.5, steps=3, sampler_name="dpmpp_2m_sde"), id="an SDE sampler"),
    pytest.param(sampled(FLUX, batch=3), id="three latents"),
    pytest.param(sampled(FLUX, batch=3, cfg=1.0), id="three latents, one conditioning"),
    pytest.param(workflows.text_to_latent("flux_a_fp32", loras=LORA), id="LoRA"),
    pytest.param(workflows.text_to_latent("flux_quantised"), id="quantised"),
    pytest.param(workflows.text_to_latent("flux_a"), id="a bf16 file"),
    pytest.param(SD3, id="SD3"),
    pytest.param(sampled(SD3, batch=2, sampler_name="euler_ancestral"), id="SD3, two latents, noise at each step"),
    pytest.param(WAN, id="Wan video"),
    pytest.param(sampled(WAN, cfg=1.0), id="Wan video, one conditioning"),
    pytest.param(workflows.with_controlnet("flux_a_fp32", "flux"), id="ControlNet"),
    pytest.param(workflows.hooked_lora("flux_a_fp32", "flux_one"), id="LoRA scheduled by hooks"),
    pytest.param(patched(FLUX, "ScaleAttention", 0.5), id="a custom attention"),
    pytest.param(patched(SD3, "ScaleAttention", 0.5), id="a custom attention, by heads"),
    pytest.param(patched(FLUX, "PauseInModel", 0.01), id="a wrapper of a pack's class"),
])
def test_latents_are_those_of_comfyui_alone(ray_pair: Pair, flow: Workflow) -> None:
    """And all of it was predicted by workers."""
    assert ray_pair.error(flow) <= TOLERANCE
    assert "local" not in ray_pair.calls()


@pytest.mark.parametrize(("flow", "way"), [
    pytest.param(FLUX, "rows", id="two conditionings"), pytest.param(sampled(FLUX, cfg=1.0, batch=2), "rows", id="two latents"),
    pytest.param(sampled(SD3, cfg=1.0), "tokens", id="one row"),
    pytest.param(patched(SD3, "ScaleAttention", 0.5), "heads", id="a pack's patch, which sees the whole batch"),
])
def test_the_way_that_suits_is_taken(ray_pair: Pair, flow: Workflow, way: str) -> None:
    """Rows where there are enough; else tokens, or heads where a pack takes part."""
    ray_pair.plugin.run(flow)
    assert set(ray_pair.calls()) == {way}


def test_lora_goes_on_and_off_and_on(ray_pair: Pair) -> None:
    """And two models alternate, in one prompt and in several."""
    on, other = workflows.text_to_latent("flux_a_fp32", loras=LORA, seed=5), workflows.text_to_latent("flux_b_fp32", seed=5)
    off, two = workflows.text_to_latent("flux_a_fp32", seed=5), workflows.both("flux_a_fp32", "flux_b_fp32", seed=5)
    for flow in (on, off, other, sampled(on, seed=6), two, sampled(other, seed=6), sampled(off, seed=7)):
        prefix = "out_b" if "sample2" in flow else "out"
        assert ray_pair.error(flow, prefix) <= TOLERANCE
        assert "local" not in ray_pair.calls()


@pytest.mark.parametrize(("flow", "wrong"), [
    pytest.param(workflows.text_to_latent("flux_a_fp32", loras=LORA), FLUX, id="no LoRA"),
    pytest.param(patched(FLUX, "ScaleAttention", 0.5), FLUX, id="no patch"),
    pytest.param(workflows.with_controlnet("flux_a_fp32", "flux"), FLUX, id="no ControlNet"),
    pytest.param(sampled(SD3, cfg=1.0, seed=9), sampled(SD3, cfg=1.0, seed=10), id="other noise"),
])
def test_what_makes_another_image_is_seen(ray_pair: Pair, flow: Workflow, wrong: Workflow) -> None:
    """The control: ten times the tolerance is far below any real difference."""
    assert ray_pair.error(flow, like=wrong) > 10 * TOLERANCE


def test_gguf_blocks_are_mapped_by_the_workers(ray_pair: Pair, models: Path) -> None:
    """The latents are those of the dequantised weights, and next to nothing of the file was sent."""
    flow, twin = workflows.text_to_latent("flux_mixed.gguf"), workflows.text_to_latent("flux_mixed_fp32")
    assert ray_pair.error(flow, like=twin) <= TOLERANCE
    assert "local" not in ray_pair.calls()
    loaded = ray_pair.plugin.events("shard.loaded")[-1]
    assert loaded["mapped_bytes"] > 0.9 * (models / "diffusion_models" / "flux_mixed.gguf").stat().st_size
    assert loaded["copied_bytes"] < 0.1 * loaded["mapped_bytes"]


def test_lora_on_gguf_goes_on_and_off_and_on(ray_pair: Pair) -> None:
    """Of the ordinary kind and scheduled by hooks, with the latents of the dequantised weights."""
    one = (("flux_mixed", 1.0),)
    flows = [[workflows.text_to_latent(name), workflows.text_to_latent(name, loras=one),
              workflows.hooked_lora(name, "flux_mixed")] for name in ("flux_mixed.gguf", "flux_mixed_fp32")]
    for index in (1, 0, 2, 0, 1, 2):
        assert ray_pair.error(flows[0][index], like=flows[1][index]) <= TOLERANCE
        assert "local" not in ray_pair.calls()
    assert ray_pair.error(flows[0][1], like=flows[1][0]) > 10 * TOLERANCE
    assert ray_pair.error(flows[0][2], like=flows[1][0]) > 10 * TOLERANCE


@pytest.mark.parametrize(("kind", "amount", "reason"), [("CountCalls", 1.0, "state"), ("HoldLock", 0.9, "cannot be sent")])
def test_what_cannot_travel_is_computed_here(ray_pair: Pair, kind: str, amount: float, reason: str) -> None:
    """With the same latents, bit for bit, and the reason said once."""
    seen = len(ray_pair.plugin.events("shard.demoted"))
    assert ray_pair.error(patched(FLUX, kind, amount)) == 0
    assert set(ray_pair.calls()) == {"local"}
    told = ray_pair.plugin.events("shard.demoted")[seen:]
    assert any(reason in event["reason"] for event in told)
    assert len([event for event in told if event["way"] == "local"]) == 1


def test_cancel_ends_the_prompt_at_once(ray_pair: Pair) -> None:
    """And the next prompt has its workers again."""
    prompt = ray_pair.plugin.queue(sampled(patched(FLUX, "PauseInModel", 3.0), steps=20, seed=77))
    cancel_within(ray_pair.plugin, prompt)
    assert ray_pair.error(sampled(FLUX, seed=78)) <= TOLERANCE
    assert "local" not in ray_pair.calls()


def cancel_within(server: Server, prompt: str, seconds: float = 0.5) -> None:
    """The user's Cancel, in the middle of a step. Of the seconds until the prompt has ended some are ComfyUI's own."""
    wait_for(lambda: bool(server.events("shard.patched")), 60)
    time.sleep(1.5)
    server.interrupt()
    asked = time.monotonic()
    with pytest.raises(PromptFailed, match="interrupted"):
        server.finish(prompt)
    assert time.monotonic() - asked < seconds


def test_verifying_compares_and_says_so(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three workers, of which one has half a share: the first prediction of each kind is computed here too."""
    text = settings(3, verify="first_step").replace("workers = 3", 'workers = [{ device = "cpu" }, { device = "cpu" }, '
                                                                   '{ device = "cpu", weight = 0.5 }]')
    with pair(models, tmp_path_factory, text) as (alone, plugin):
        found = Pair(alone, plugin)
        for flow in (FLUX, sampled(FLUX, batch=5, cfg=1.0), sampled(SD3, cfg=1.0, seed=4), sampled(SD3, cfg=1.0, seed=5)):
            assert found.error(flow) <= TOLERANCE
        assert found.calls() == {"tokens": 2}
        here = [event["calls"].get("local", 0) for event in plugin.events("shard.finished")]
        assert here == [1, 1, 1, 0]
        assert plugin.events("shard.demoted") == []
        assert plugin.events("shard.finished")[-1]["speedup"] > 0


def test_one_worker_predicts_for_comfyui(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Which only keeps sampling: there is nobody to share rows or heads with, and the arithmetic is the same."""
    with pair(models, tmp_path_factory, settings(1, verify="off")) as (alone, plugin):
        found = Pair(alone, plugin)
        for flow in (FLUX, sampled(FLUX, cfg=1.0, batch=2), workflows.text_to_latent("flux_a_fp32", loras=LORA), SD3,
                     sampled(SD3, cfg=1.0, sampler_name="euler_ancestral")):
            assert found.error(flow) <= TOLERANCE
            assert set(found.calls()) == {"rows"}
        assert found.error(FLUX, like=sampled(FLUX, seed=2)) > 10 * TOLERANCE
        assert plugin.events("shard.started")[0]["workers"] == ["cpu"]
        assert plugin.events("shard.demoted") == []
        assert troubles(plugin) == []


def test_a_worker_for_each_accelerator(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of two simulated ones, and nothing of the model is on the device of ComfyUI's own process."""
    flows = [workflows.text_to_latent("middle_a", loras=loras, seed=3) for loras in ((), (("middle", 1.0),))]
    text = settings('"auto"', verify="off").replace("'", "")
    with pair(models, tmp_path_factory, text, device_mb=1500, env={"SIMNPU_DEVICES": "2"}) as (alone, plugin):
        found = Pair(alone, plugin)
        for flow in flows:
            assert found.error(flow) <= TOLERANCE
            assert found.calls() == {"rows": 4}
        assert plugin.events("shard.started")[0]["workers"] == ["npu:0", "npu:1"]
        assert {event["device_bytes"] for event in plugin.events("model.placed") if event["model"] == "Flux"} == {0}
        assert found.error(flows[0], like=flows[1]) > 10 * TOLERANCE
        assert troubles(plugin) == []


def test_one_worker_holds_the_file_itself(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Four of them hold the weights of a file as one does: what all have together, shared pages counted once, is its size."""
    text = settings(4, verify="off", heads=False, tokens=False)
    with Server(COMFYUI, tmp_path_factory.mktemp("plugin"), models, settings=text) as server:
        before = _held(server, sampled(FLUX, batch=4))
        others = len(server.events("shard.loaded"))
        after = _held(server, sampled(workflows.text_to_latent("middle_fp32"), batch=4))
        loaded = server.events("shard.loaded")[others:]
        assert sum(event["workers"] for event in loaded) == 4
        size = loaded[-1]["mapped_bytes"]
        assert size > 100 * MB
        private = after["private_bytes"] - before["private_bytes"]
        assert private <= 0.4 * size  # what they compute with, four times
        assert after["shared_bytes"] - before["shared_bytes"] - private <= 1.1 * size


def _held(server: Server, flow: Workflow) -> dict[str, int]:
    """Bytes of RAM of all workers after a prompt."""
    seen = len(server.events("shard.workers"))
    server.run(flow)
    wait_for(lambda: len(server.events("shard.workers")) > seen)
    event = server.events("shard.workers")[-1]
    return {name: sum(event[name].values()) for name in ("shared_bytes", "private_bytes")}
