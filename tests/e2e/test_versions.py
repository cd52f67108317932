"""The same plugin on every ComfyUI release that we name."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TREES, VERSIONS
from e2e.conftest import SMALL_DEVICE_MB, troubles
from support import workflows
from support.server import MB, Server

LORA = workflows.text_to_latent("middle_a", loras=(("middle", 1.0),), prefix="lora")


GGUF = {False: "flux_mixed_bf16", True: "flux_mixed.gguf"}  # ComfyUI alone gets the dequantised twin


PLAIN, PATCHED = {}, {"loras": (("flux_mixed", 1.0),)}


@pytest.mark.parametrize("version", VERSIONS[1:-1])  # the first has no switch for dynamic VRAM but an NVIDIA card
def test_dynamic_vram_streams_a_gguf_file_and_gives_the_latents_of_its_twin(version: str, models: Path, simulated_npu: None,
                                                                            tmp_path: Path) -> None:
    """With and without a LoRA, by the host's own paging, on a simulated accelerator."""
    with Server(TREES / version, tmp_path, models, device_mb=SMALL_DEVICE_MB, dynamic_vram=True) as server:
        for options in (PLAIN, PATCHED, PLAIN):
            for name in GGUF.values():
                server.run(workflows.text_to_latent(name, prefix=f"out_{name.partition('.')[2]}", **options))
            assert torch.equal(server.latents("out_"), server.latents("out_gguf"))
        assert troubles(server) == []
        assert server.log().count("Model Flux prepared for dynamic VRAM loading") >= 4


def survives_an_out_of_memory(server: Server) -> None:
    """Before sampling, in a step, and in a VAE."""
    flow = lambda seed: workflows.text_to_latent("flux_a", seed=seed, vae="taesd", loras=(("flux_one", 1.0),))  # noqa: E731
    server.run(flow(1))
    expected = server.latents("out_vae")
    count = server.allocations(flow(2))
    for at in (1, count // 3, count - 20):
        assert server.run_failing(flow(1), at)
        assert torch.equal(expected, server.latents("out_vae"))
        server.run(flow(2))


@pytest.mark.parametrize("version", VERSIONS[:-1])  # the other tests run on the last
def test_a_workflow_swaps_models_loads_each_once_and_gives_the_same_latents(version: str, models: Path, simulated_npu: None,
                                                            tmp_path: Path) -> None:
    """Two models, a LoRA and a GGUF file on a device that holds one model: mapped, swapped without a copy, loaded once though
    three workflows take turns, and the same bit for bit. An out-of-memory costs no prompt."""
    found = {}
    for name in ("alone", "plugin"):
        with Server(TREES / version, tmp_path / name, models, plugin=name == "plugin", device_mb=SMALL_DEVICE_MB) as server:
            server.run(workflows.both("middle_a", "middle_b"))
            server.run(LORA)
            server.run(workflows.text_to_latent(GGUF[server.plugin], loras=(("flux_mixed", 1.0),), prefix="gguf"))
            server.run(workflows.both("middle_b", "middle_a"))
            before = server.device()["to_host"]
            server.run(workflows.both("middle_a", "middle_b", seed=2))
            copied = server.device()["to_host"] - before
            found[name] = [server.latents(prefix) for prefix in ("out_a", "out_b", "lora", "gguf")]
            if name == "plugin":
                survives_an_out_of_memory(server)
                assert troubles(server) == []
                assert server.events("plugin.started")[0]["host"] == version
                assert copied < 1 * MB
                misses = Counter(event["model"] for event in server.events("cache.miss"))
                hits = {event["model"] for event in server.events("cache.hit")}
                assert set(misses.values()) == {1}
                assert {"middle_a.safetensors", "middle_b.safetensors"} <= hits

    assert [torch.equal(alone, plugin) for alone, plugin in zip(found["alone"], found["plugin"], strict=True)] == [True] * 4
