"""The same plugin on every ComfyUI release that we name."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TREES, VERSIONS
from e2e.conftest import SMALL_DEVICE_MB, Pair, empty, started, troubles
from support import workflows
from support.server import MB, Server

LORA = workflows.text_to_latent("middle_a", loras=(("middle", 1.0),), prefix="lora")


GGUF = {False: "flux_mixed_bf16", True: "flux_mixed.gguf"}  # ComfyUI alone gets the dequantised twin


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


@pytest.fixture(scope="module", params=VERSIONS[:-1])  # the other tests run on the last
def release(request: pytest.FixtureRequest, models: Path, simulated_npu: None,
            tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """One release without and with the plugin, beside a second device that nobody uses unless a setting says so."""
    env = {"SIMNPU_DEVICES": "2", "OMP_NUM_THREADS": "1"}
    with started(models, tmp_path_factory, SMALL_DEVICE_MB, comfyui=TREES / request.param, packs=[], env=env) as pair:
        assert pair.plugin.events("plugin.started")[0]["host"] == request.param
        yield pair


def test_a_workflow_swaps_models_loads_each_once_and_gives_the_same_latents(release: Pair) -> None:
    """Two models, a LoRA and a GGUF file on a device that holds one model: mapped, swapped without a copy, loaded once though
    three workflows take turns, and the same bit for bit. An out-of-memory costs no prompt."""
    found = {}
    for server in (release.alone, release.plugin):
        server.run(workflows.both("middle_a", "middle_b"))
        server.run(LORA)
        server.run(workflows.text_to_latent(GGUF[server.plugin], loras=(("flux_mixed", 1.0),), prefix="gguf"))
        server.run(workflows.both("middle_b", "middle_a"))
        before = server.device()["to_host"]
        server.run(workflows.both("middle_a", "middle_b", seed=2))
        copied = server.device()["to_host"] - before
        found[server.plugin] = [server.latents(prefix) for prefix in ("out_a", "out_b", "lora", "gguf")]
    survives_an_out_of_memory(server)
    assert troubles(server) == []
    assert copied < 1 * MB
    misses = Counter(event["model"] for event in server.events("cache.miss"))
    hits = {event["model"] for event in server.events("cache.hit")}
    assert set(misses.values()) == {1}
    assert {"middle_a.safetensors", "middle_b.safetensors"} <= hits
    assert [torch.equal(alone, plugin) for alone, plugin in zip(found[False], found[True], strict=True)] == [True] * 4


def test_a_second_device_lends_memory_and_gives_it_back(release: Pair) -> None:
    """The latents of a model that is on one device, and of one that is on two and in RAM, are the same; no copy comes back."""
    server = release.plugin
    empty(server)
    server.run(workflows.text_to_latent("middle_a"))
    empty(server)
    server.settings('[hybrid_split]\ndevices = "npu:0,30mb;npu:1,20mb;cpu,*"\n')
    whole = server.latents()
    server.run(workflows.text_to_latent("middle_a", prefix="lent"))
    lent, copied = server.used()[1], server.device()["to_host"]
    empty(server)

    assert torch.equal(whole, server.latents("lent"))
    assert 16 * MB < lent <= 20 * MB
    assert server.used()[1] == 0
    assert server.device()["to_host"] - copied < MB
    assert troubles(server) == []
