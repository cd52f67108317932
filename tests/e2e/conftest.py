"""Pairs of real servers: ComfyUI alone, and with the plugin, on the CPU and on the simulated accelerator."""
from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMFYUI, TREES
from support.fixtures import make_models
from support.server import GGUF_NODES, MB, NODE_CLOCK, TESTING_NODES, Server, both
from support.workflows import Workflow

MODELS = (
    "diffusion_models/flux_a", "diffusion_models/flux_b", "diffusion_models/flux_a_fp32",
    "diffusion_models/flux_b_fp32", "diffusion_models/flux_quantised", "diffusion_models/sd3", "diffusion_models/wan",
    "diffusion_models/ltxv", "diffusion_models/qwen", "diffusion_models/deep",
    "diffusion_models/middle_a", "diffusion_models/middle_b", "diffusion_models/middle_fp32", "vae/taesd",
    "vae/taesd_fp32", "vae/taesd_other", "vae/wan", "text_encoders/clip_l", "text_encoders/clip_l_other",
    "text_encoders/clip_l_fp8", "controlnet/flux",
    "diffusion_models/flux_torch.pt", "checkpoints/sd3", "checkpoints/sd3_fp32", "loras/flux_one", "loras/flux_two",
    "loras/middle", "diffusion_models/flux_mixed.gguf", "diffusion_models/flux_mixed_other.gguf",
    "diffusion_models/flux_mixed_fp32", "diffusion_models/flux_mixed_bf16", "diffusion_models/middle_q8_a.gguf",
    "diffusion_models/middle_q8_b.gguf", "diffusion_models/middle_q8_a_bf16", "loras/flux_mixed",
    "text_encoders/t5_base.gguf", "text_encoders/t5_base_other.gguf", "text_encoders/t5_base_fp16",
    "text_encoders/clip_l_q8.gguf", "text_encoders/clip_l_q8_fp16", "text_encoders/clip_l_scaled_fp8",
    "text_encoders/clip_l_scaled_fp16",
)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs ignore it, and so would their servers
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Room for one of the middle models and what ComfyUI keeps free for sampling, but not for two.
SMALL_DEVICE_MB = 1320


@pytest.fixture(scope="session")
def models() -> Path:
    return make_models(COMFYUI, TREES.parent / "residency-models", MODELS)


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

    def twins(self, twin: Workflow, flow: Workflow) -> torch.Tensor:
        """Runs a GGUF workflow with the plugin and its dequantised twin on ComfyUI alone; the latents must be equal."""
        self.alone.run(twin)
        self.plugin.run(flow)
        expected, found = self.alone.latents(), self.plugin.latents()
        assert torch.isfinite(expected).all()
        assert torch.equal(expected, found), (expected - found).abs().max()
        return found


def troubles(server: Server, paged: bool = False) -> list[dict[str, Any]]:
    """What the plugin said that it never should in a healthy run. Where ComfyUI pages weights, only GGUF files are ours."""
    names = ("hook.declined", "hook.failed", "hook.shadowed", "policy.declined", "policy.failed", "policy.ineffective")
    expected = "zero_copy, all but GGUF files" if paged or server.dynamic_vram else None
    return [event for event in server.events() if event["event"] in names and event.get("policy") != expected]


def wait_for(true: Callable[[], bool], seconds: float = 20) -> None:
    """Waits until something holds that nobody tells of."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def status(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/residency/status", timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def drop_from_page_cache(file: Path) -> None:
    """As ComfyUI's reader asks the kernel to after each read. Clean pages only, so it is synced first."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def loads(server: Server, since: int, name: str = "") -> list[tuple[str, str]]:
    """(hit or miss, file) of the loads since an event."""
    return [(event["event"], event["model"]) for event in server.events()[since:]
            if event["event"] in ("cache.hit", "cache.miss") and name in event["model"]]


def check_loader_nodes(server: Server, *kinds: str) -> None:
    """The loader nodes of the last prompt, as ComfyUI ran them, took far less than a load does, on busy machines too."""
    took = server.loader_nodes()
    assert sorted(kind for kind, _ in took) == sorted(kinds)
    assert sum(seconds for _, seconds in took) < 0.1, took


@pytest.fixture
def own_model(models: Path) -> Iterator[Callable[[str, str], Path]]:
    """Copies of a model under other names, to be changed and deleted; of this process alone, others use the folder too."""
    made: list[Path] = []

    def copy(name: str, source: str) -> Path:
        original = models / (source if "/" in source else f"diffusion_models/{source}.safetensors")
        made.append(original.with_name(f"{name}_{os.getpid()}{original.suffix}"))
        shutil.copyfile(original, made[-1])
        return made[-1]

    yield copy
    for file in made:
        file.unlink(missing_ok=True)


def empty(server: Server, times: int = 5) -> None:
    """`POST /free` until the simulated devices are empty: ComfyUI misses one that comes just when it ended a prompt."""
    for _ in range(times):
        server.free()  # one at a time: one that is late would empty the next prompt's devices
        with suppress(AssertionError):
            return wait_for(lambda: sum(server.used()) < MB, 5)
    raise AssertionError("the devices were not emptied")


@contextmanager
def shrunk(server: Server, device_mb: float) -> Iterator[None]:
    """A simulated device with less memory for a while, and with nothing on it before and after."""
    empty(server)
    server.shrink(device_mb)
    try:
        yield
    finally:
        server.shrink(server.device_mb or 0)
        empty(server)


@contextmanager
def started(models: Path, factory: pytest.TempPathFactory, device_mb: int | None, *, comfyui: Path = COMFYUI,
            **more: Any) -> Iterator[Pair]:
    options = {"device_mb": device_mb, "packs": [TESTING_NODES, GGUF_NODES, NODE_CLOCK], **more}
    folders = factory.mktemp("alone"), factory.mktemp("plugin")
    with both(partial(Server, comfyui, folders[0], models, plugin=False, **options),
              partial(Server, comfyui, folders[1], models, **options)) as (alone, plugin):
        yield Pair(alone, plugin)
        assert troubles(plugin) == []


@pytest.fixture(scope="session")
def cpu_pair(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with started(models, tmp_path_factory, None) as pair:
        yield pair


@pytest.fixture(scope="session")
def npu_pair(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """On a simulated accelerator that is too small for two models."""
    with started(models, tmp_path_factory, SMALL_DEVICE_MB) as pair:
        yield pair


@pytest.fixture(scope="session")
def dynamic_pair(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The same with dynamic VRAM, by a simulated paging library."""
    with started(models, tmp_path_factory, SMALL_DEVICE_MB, dynamic_vram=True) as pair:
        yield pair


@pytest.fixture(params=["cpu", "npu"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Both servers on the CPU, then both on the simulated accelerator."""
    pair: Pair = request.getfixturevalue(f"{request.param}_pair")
    return pair
