"""Workers that each have a part of the tokens of a step, under a real ComfyUI on the CPU: the same latents.

A worker multiplies fewer rows at once, so sums may be made in another order: latents are compared to a relative error of 1e-5
in float32; a control shows that what changes the image is far more.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.conftest import troubles
from e2e.test_ray import FLUX, LORA, TOLERANCE, WAN, Pair, pair, patched, sampled, settings
from support import workflows
from support.server import PATCHING_NODES, SIZING_NODES
from support.workflows import Workflow

pytestmark = pytest.mark.ray

LTXV, QWEN = workflows.ltx_video("ltxv"), workflows.text_to_latent("qwen")


@pytest.fixture(scope="module")
def together(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two workers that do not share out rows."""
    with pair(models, tmp_path_factory, settings(2, verify="off", rows=False), packs=[PATCHING_NODES, SIZING_NODES]) as servers:
        yield Pair(*servers)
        assert troubles(servers[1]) == []
        assert servers[1].events("worker.lost") == []


@pytest.mark.parametrize("flow", [
    pytest.param(FLUX, id="Flux"),
    pytest.param(sampled(FLUX, cfg=1.0), id="Flux, one row"),
    pytest.param(sampled(FLUX, batch=3, sampler_name="dpmpp_2m_sde", steps=3), id="Flux, three latents, an SDE sampler"),
    pytest.param(workflows.text_to_latent("flux_a_fp32", loras=LORA), id="Flux, LoRA"),
    pytest.param(workflows.hooked_lora("flux_a_fp32", "flux_one"), id="Flux, LoRA scheduled by hooks"),
    pytest.param(workflows.with_controlnet("flux_a_fp32", "flux"), id="Flux, ControlNet"),
    pytest.param(WAN, id="Wan"),
    pytest.param(sampled(WAN, cfg=1.0), id="Wan, one row"),
    pytest.param(LTXV, id="LTXV"),
    pytest.param(sampled(LTXV, cfg=1.0), id="LTXV, one row"),
    pytest.param(QWEN, id="Qwen"),
    pytest.param(sampled(QWEN, cfg=1.0), id="Qwen, one row"),
])
def test_latents_are_those_of_comfyui_alone(together: Pair, flow: Workflow) -> None:
    """And all of it was predicted by workers, of their tokens."""
    assert together.error(flow) <= TOLERANCE
    assert set(together.calls()) == {"tokens"}


def test_gguf_blocks_too(together: Pair) -> None:
    """The latents are those of the dequantised weights."""
    flow, twin = workflows.text_to_latent("flux_mixed.gguf"), workflows.text_to_latent("flux_mixed_fp32")
    assert together.error(flow, like=twin) <= TOLERANCE
    assert set(together.calls()) == {"tokens"}


@pytest.mark.parametrize(("flow", "wrong"), [
    pytest.param(workflows.text_to_latent("flux_a_fp32", loras=LORA), FLUX, id="no LoRA"),
    pytest.param(workflows.with_controlnet("flux_a_fp32", "flux"), FLUX, id="no ControlNet"),
    pytest.param(sampled(QWEN, seed=9), sampled(QWEN, seed=10), id="other noise"),
    pytest.param(sampled(LTXV, seed=9), sampled(LTXV, seed=10), id="other noise, video"),
])
def test_what_makes_another_image_is_seen(together: Pair, flow: Workflow, wrong: Workflow) -> None:
    """The control: ten times the tolerance is far below any real difference."""
    assert together.error(flow, like=wrong) > 10 * TOLERANCE


def test_a_packs_patch_sees_all_tokens(together: Pair) -> None:
    """The heads are shared instead, and the reason is said."""
    assert together.error(patched(QWEN, "ScaleAttention", 0.5)) <= TOLERANCE
    assert set(together.calls()) == {"heads"}
    assert any(event["way"] == "tokens" and "may need all tokens" in event["reason"]
               for event in together.plugin.events("shard.demoted"))


def test_two_rows_on_three_workers_leave_nobody_idle(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All have a part of the tokens, by their weights; verified at the first step."""
    text = settings(3).replace("workers = 3", 'workers = [{ device = "cpu" }, { device = "cpu", weight = 0.5 }, '
                                              '{ device = "cpu" }]')
    with pair(models, tmp_path_factory, text) as (alone, plugin):
        found = Pair(alone, plugin)
        assert found.error(FLUX) <= TOLERANCE
        assert found.calls() == {"tokens": 2, "local": 1}
        assert found.error(sampled(FLUX, seed=3)) <= TOLERANCE
        assert found.calls() == {"tokens": 2}
        assert plugin.events("shard.demoted") == []
