"""On a real CUDA device: the classic patcher with dynamic VRAM off, and dynamic VRAM, where only GGUF files are ours."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import Pair, troubles
from e2e.test_preload_cache import status
from support import workflows
from support.server import MB, Server

pytestmark = pytest.mark.gpu


def room_for_one_model() -> list[str]:
    """Arguments that leave room for one of the middle models and not for two, whatever the card."""
    free, _ = torch.cuda.mem_get_info()
    reserved = free / 2**30 - 0.8 - 0.45  # what ComfyUI keeps for inference, a CUDA context, one model
    return ["--disable-dynamic-vram", "--reserve-vram", f"{reserved:.3f}"]


@pytest.fixture(scope="module")
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def swapping(cuda: None, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    args = room_for_one_model()
    with (Server(COMFYUI, tmp_path_factory.mktemp("alone"), models, plugin=False, device_args=args) as alone,
          Server(COMFYUI, tmp_path_factory.mktemp("plugin"), models, device_args=args) as plugin):
        yield Pair(alone, plugin)
        assert troubles(plugin) == []


@pytest.mark.parametrize("workflow", [
    pytest.param(workflows.both("middle_a", "middle_b"), id="two models that swap"),
    pytest.param(workflows.both("middle_a", "middle_b", seed=2), id="and again"),
    pytest.param(workflows.text_to_latent("middle_a", loras=(("middle", 1.0),)), id="LoRA"),
    pytest.param(workflows.hooked_lora("middle_a", "middle"), id="LoRA scheduled by hooks"),
    pytest.param(workflows.text_to_latent("flux_quantised"), id="quantised"),
    pytest.param(workflows.text_to_latent("flux_a", weight_dtype="fp8_e4m3fn"), id="fp8 of a bf16 file"),
])
def test_latents_are_equal(swapping: Pair, workflow: workflows.Workflow) -> None:
    """Bit for bit, on the classic patcher."""
    swapping.same(workflow, *(("out_a", "out_b") if "save2" in workflow else ("out",)))


def test_swapping_restores_without_a_copy(swapping: Pair) -> None:
    """What leaves the card goes back to the file's mapping."""
    for seed in (3, 4):
        swapping.plugin.run(workflows.both("middle_a", "middle_b", seed=seed))
    restored = swapping.plugin.events("weights.restored")

    assert sum(event["bytes"] for event in restored) > 60 * MB
    middle = [event for event in restored[-2:] if event["model"] == "Flux"]
    assert sum(event["copied_bytes"] for event in middle) == 0


def pages(server: Server) -> bool:
    """Whether this ComfyUI runs dynamic VRAM on this card."""
    return "DynamicVRAM support detected" in server.log()


def test_dynamic_vram_keeps_its_own_formats(cuda: None, models: Path, tmp_path: Path) -> None:
    """zero_copy says once what it leaves alone, and the result is ComfyUI's."""
    found = []
    for name in ("alone", "plugin"):
        with Server(COMFYUI, tmp_path / name, models, plugin=name == "plugin", device_args=[]) as server:
            server.run(workflows.both("middle_a", "middle_b"))
            found.append(server.latents("out_b"))
            if name == "plugin" and pages(server):
                assert [event["policy"] for event in server.events("policy.declined")] == ["zero_copy, all but GGUF files"]
                assert server.events("weights.mapped") == []

    assert torch.equal(*found)


@pytest.mark.parametrize("room_gb", [None, 1.2], ids=["all of the card", "a small headroom"])
def test_a_gguf_file_streams_with_dynamic_vram(cuda: None, models: Path, tmp_path: Path, room_gb: float | None) -> None:
    """With and without LoRA, scheduled too, the latents are those of its dequantised twin, in ComfyUI's own paging."""
    args = [] if room_gb is None else ["--reserve-vram", f"{torch.cuda.mem_get_info()[0] / 2**30 - room_gb:.3f}"]
    flows = {"plain": workflows.text_to_latent, "lora": partial(workflows.text_to_latent, loras=(("middle", 1.0),)),
             "hooked": partial(workflows.hooked_lora, lora="middle")}
    with Server(COMFYUI, tmp_path, models, device_args=args) as server:
        if not pages(server):
            pytest.skip("no dynamic VRAM on this card")
        for prefix, flow in flows.items():
            server.run(flow("middle_q8_a_bf16", prefix=f"{prefix}_twin"))
            server.run(flow("middle_q8_a.gguf", prefix=prefix))
            assert torch.equal(server.latents(f"{prefix}_twin"), server.latents(prefix)), prefix
        staged = [line for line in server.log().splitlines() if "prepared for dynamic VRAM loading. 39MB Staged" in line]
        private = server.private_bytes()
        server.run(workflows.text_to_latent("middle_q8_a.gguf", seed=2))

        assert staged
        assert server.private_bytes() - private < 10 * MB
        assert next(event["copied_bytes"] for event in server.events("weights.mapped")) < 1 * MB
        assert troubles(server, paged=True) == []


@pytest.mark.parametrize("pinned_gb", [0, 0.02, "auto"])
def test_page_locked_weights_stay_within_the_budget(swapping: Pair, models: Path, tmp_path: Path,
                                                    pinned_gb: float | str) -> None:
    """The sum over all models, mapped ones too, as ComfyUI counts it; and the latents are those of ComfyUI alone."""
    quoted = f'"{pinned_gb}"' if isinstance(pinned_gb, str) else pinned_gb
    settings = f'[memory]\npinned_gb = {quoted}\n[hybrid_split]\ndevices = "cuda:0,25%;cpu,*"\n'
    flow = workflows.text_to_latent("middle_a")
    with Server(COMFYUI, tmp_path, models, device_args=["--disable-dynamic-vram"], settings=settings) as server:
        server.run(flow)
        pinned = status(server)["bytes"]["pinned"]
        swapping.alone.run(flow)

        assert torch.equal(swapping.alone.latents(), server.latents())
        assert server.events("pin.failed") == []
    if pinned_gb == "auto":
        assert pinned > 20 * MB
    else:
        assert pinned <= pinned_gb * 2**30
        assert (pinned > 0) == (pinned_gb > 0)


def test_a_second_card_lends_memory(swapping: Pair, models: Path, tmp_path: Path) -> None:
    """As much as the settings say, and the latents stay."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one card")
    settings = '[hybrid_split]\ndevices = "cuda:0,25%;cuda:1,20mb"\n'
    flow = workflows.text_to_latent("middle_a")
    with Server(COMFYUI, tmp_path, models, device_args=["--disable-dynamic-vram"], settings=settings) as server:
        server.run(flow)
        swapping.alone.run(flow)
        placed = server.events("donors.placed")[-1]

        assert torch.equal(swapping.alone.latents(), server.latents())
        assert placed["predicted_bytes"] == placed["observed_bytes"]
        assert 16 * MB < placed["observed_bytes"]["cuda:1"] <= 20 * MB
