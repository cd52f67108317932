"""In one process with ComfyUI-GGUF and ComfyUI-MultiGPU, loaded before us and after us.

`COMFYUI_GGUF_PATH` and `COMFYUI_MULTIGPU_PATH` name their folders; gguf must be installed.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import SMALL_DEVICE_MB
from support import workflows
from support.server import Server

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def packs() -> list[Path]:
    paths = [os.environ.get(name) for name in ("COMFYUI_GGUF_PATH", "COMFYUI_MULTIGPU_PATH")]
    if not all(paths):
        pytest.skip("COMFYUI_GGUF_PATH and COMFYUI_MULTIGPU_PATH do not name the packs")
    return [Path(path) for path in paths if path]


@pytest.fixture(scope="module")
def gguf_model(models: Path) -> str:
    """A Q8_0 file of one of the models, made with the gguf package."""
    script = Path(__file__).parents[1] / "support" / "make_gguf.py"
    source, file = models / "diffusion_models" / "flux_a.safetensors", models / "diffusion_models" / "flux_a_q8.gguf"
    if not file.exists():
        subprocess.run([sys.executable, str(script), str(source), str(file)], check=True)
    return file.name


@pytest.fixture(scope="module", params=["packs first", "plugin first"])
def server(request: pytest.FixtureRequest, packs: list[Path], models: Path, gguf_model: str, simulated_npu: None,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(COMFYUI, tmp_path_factory.mktemp("packs"), models, device_mb=SMALL_DEVICE_MB, packs=packs,
                plugin_first=request.param == "plugin first") as server:
        yield server


def through_gguf(gguf_model: str, seed: int = 1) -> workflows.Workflow:
    flow = workflows.text_to_latent("flux_a", seed=seed)
    flow["model"] = workflows.node("UnetLoaderGGUF", unet_name=gguf_model)
    return flow


def test_comfyui_starts_with_all_of_us(server: Server) -> None:
    """No pack fails to import, and no hook of ours declines."""
    assert "IMPORT FAILED" not in server.log()
    assert server.events("hook.declined") == []
    assert len(server.events("plugin.started")) == 1


def test_workflows_run_and_models_swap(server: Server, gguf_model: str) -> None:
    """Stock and GGUF loaders work in turn, and what a prompt makes is what it made before."""
    server.run(workflows.both("middle_a", "middle_b"))
    first = server.latents("out_a")
    server.run(through_gguf(gguf_model))
    quantised = server.latents()
    server.run(workflows.both("middle_a", "middle_b", seed=2))
    server.run(workflows.both("middle_a", "middle_b"))
    server.run(through_gguf(gguf_model, seed=2))
    server.run(through_gguf(gguf_model))

    assert torch.equal(first, server.latents("out_a"))
    assert torch.equal(quantised, server.latents())
    assert [event for event in server.events() if event["event"] in ("hook.failed", "policy.failed")] == []


def test_latents_are_those_of_the_packs_alone(server: Server, packs: list[Path], models: Path, gguf_model: str,
                                              tmp_path_factory: pytest.TempPathFactory) -> None:
    """The plugin changes nothing of what the packs make of their own files."""
    server.run(through_gguf(gguf_model, seed=3))
    with Server(COMFYUI, tmp_path_factory.mktemp("alone"), models, plugin=False, device_mb=SMALL_DEVICE_MB,
                packs=packs) as alone:
        alone.run(through_gguf(gguf_model, seed=3))

        assert torch.equal(alone.latents(), server.latents())


def test_the_report_says_what_was_shadowed(server: Server) -> None:
    """MultiGPU's DisTorch loader replaces a function that we wrapped; that is named once, and in the report."""
    flow = workflows.text_to_latent("flux_b")
    flow["model"] = workflows.node("UNETLoaderDisTorch2MultiGPU", unet_name="flux_b.safetensors", weight_dtype="default",
                                   compute_device="npu:0", virtual_vram_gb=0.0, donor_device="cpu", expert_mode_allocations="",
                                   eject_models=False)
    server.run(flow)
    expected = server.latents()
    for seed in (2, 1):
        server.run(workflows.text_to_latent("flux_b", seed=seed))
    assert torch.equal(expected, server.latents())
    shadowed = [event["hook"] for event in server.events("hook.shadowed")]

    assert len(shadowed) == len(set(shadowed))
    report = subprocess.run([sys.executable, "-m", "telemetry", "report", str(server.base / "user/residency/telemetry.jsonl")],
                            cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True).stdout
    for hook in shadowed:
        assert hook in report
    assert "comfy.model_management.load_models_gpu" in shadowed
