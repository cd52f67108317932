"""Pairs of real servers: ComfyUI alone, and with the plugin, on the CPU and on the simulated accelerator."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMFYUI, TREES
from support.fixtures import build_simulated_npu, make_models, no_simulated_npu
from support.server import Server
from support.workflows import Workflow

MODELS = (
    "diffusion_models/flux_a", "diffusion_models/flux_b", "diffusion_models/flux_a_fp32",
    "diffusion_models/flux_b_fp32", "diffusion_models/flux_quantised", "diffusion_models/sd3", "diffusion_models/wan",
    "diffusion_models/middle_a", "diffusion_models/middle_b", "diffusion_models/middle_fp32", "vae/taesd", "vae/wan",
    "text_encoders/clip_l", "text_encoders/clip_l_other", "text_encoders/clip_l_fp8", "controlnet/flux",
    "diffusion_models/flux_torch.pt", "checkpoints/sd3", "checkpoints/sd3_fp32", "loras/flux_one", "loras/flux_two",
    "loras/middle",
)
# Room for one of the middle models and what ComfyUI keeps free for sampling, but not for two.
SMALL_DEVICE_MB = 1320


@pytest.fixture(scope="session")
def models() -> Path:
    return make_models(COMFYUI, TREES.parent / "residency-models", MODELS)


@pytest.fixture(scope="session")
def simulated_npu() -> None:
    reason = no_simulated_npu()
    if reason:
        pytest.skip(reason)
    build_simulated_npu()


@dataclass
class Pair:
    """The same ComfyUI without and with the plugin."""

    alone: Server
    plugin: Server

    def same(self, workflow: Workflow, *prefixes: str) -> torch.Tensor:
        """Runs a workflow on both and returns the latents, which must be equal bit for bit."""
        found = []
        for server in (self.alone, self.plugin):
            server.run(workflow)
            found.append([server.latents(prefix) for prefix in prefixes or ("out",)])
        for alone, plugin in zip(*found, strict=True):
            assert torch.isfinite(alone).all()
            assert alone.std() > 0
            assert torch.equal(alone, plugin), (alone - plugin).abs().max()
        return found[1][0]


def troubles(server: Server) -> list[dict[str, Any]]:
    """What the plugin said that it never should in a healthy run."""
    names = ("hook.declined", "hook.failed", "hook.shadowed", "policy.declined", "policy.failed", "policy.ineffective")
    return [event for event in server.events() if event["event"] in names]


@pytest.fixture(scope="module", params=["cpu", "npu"])
def pair(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both servers on the CPU, then both on a simulated accelerator that is too small for two models."""
    device_mb = None
    if request.param == "npu":
        request.getfixturevalue("simulated_npu")
        device_mb = SMALL_DEVICE_MB
    with (Server(COMFYUI, tmp_path_factory.mktemp("alone"), models, plugin=False, device_mb=device_mb) as alone,
          Server(COMFYUI, tmp_path_factory.mktemp("plugin"), models, device_mb=device_mb) as plugin):
        yield Pair(alone, plugin)
        assert troubles(plugin) == []
