"""GGUF files, and models that are kept, where ComfyUI pages weights itself (dynamic VRAM): on a simulated accelerator with a
simulated paging library."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI, TREES, VERSIONS
from e2e.conftest import (
    SMALL_DEVICE_MB,
    Pair,
    check_loader_nodes,
    drop_from_page_cache,
    loads,
    started,
    status,
    troubles,
    wait_for,
)
from support import workflows
from support.server import MB, Server

FILE, OTHER, TWIN = "middle_q8_a.gguf", "middle_q8_b.gguf", "middle_q8_a_bf16"
FILE_MB, WEIGHTS_MB = 44, 38  # all of the file, and what is large enough to be paged
LORA = (("middle", 1.0),)


def test_weights_go_from_the_file_to_the_device_and_leave_it_without_a_copy(dynamic_pair: Pair) -> None:
    """ComfyUI's own patcher and its own reader, as for the formats that it knows: once in, nothing moves."""
    server = dynamic_pair.plugin
    server.run(workflows.text_to_latent(OTHER))
    before, private = server.device(), server.private_bytes()
    server.run(workflows.text_to_latent(FILE))
    first = server.device()
    server.run(workflows.text_to_latent(FILE, seed=2))
    second = server.device()

    assert WEIGHTS_MB * MB < first["from_file"] - before["from_file"] < (FILE_MB + 1) * MB
    assert second["from_file"] - first["from_file"] < 1 * MB
    assert second["to_host"] - before["to_host"] < 1 * MB
    assert server.private_bytes() - private < FILE_MB / 2 * MB  # layers and a prompt's own memory, and no weights
    assert "Model Flux prepared for dynamic VRAM loading. 39MB Staged" in server.log()


def test_a_model_that_finds_no_room_streams_at_each_step(dynamic_pair: Pair, models: Path, tmp_path: Path) -> None:
    """With and without a LoRA, and with an encoder in GGUF; the latents are those of ComfyUI's own format with room."""
    flows = {"plain": {}, "lora": {"loras": LORA}, "clip": {"clip": "clip_l_q8.gguf"}}
    for prefix, options in flows.items():
        twin = {**options, **({"clip": "clip_l_q8_fp16"} if "clip" in options else {})}
        dynamic_pair.alone.run(workflows.text_to_latent(TWIN, prefix=prefix, **twin))
    nothing_stays = {"SIMAIMDO_HEADROOM_MB": str(SMALL_DEVICE_MB)}
    with Server(COMFYUI, tmp_path, models, device_mb=SMALL_DEVICE_MB, dynamic_vram=True, env=nothing_stays) as server:
        server.run(workflows.text_to_latent(TWIN))
        before = server.device()["from_file"]
        for prefix, options in flows.items():
            server.run(workflows.text_to_latent(FILE, prefix=prefix, **options))
            if prefix == "plain":
                assert server.device()["from_file"] - before > 2 * WEIGHTS_MB * MB  # at both steps
            assert torch.equal(dynamic_pair.alone.latents(prefix), server.latents(prefix))
        assert troubles(server) == []


def test_a_scheduled_lora_runs_on_a_classic_copy_of_the_model(dynamic_pair: Pair) -> None:
    """ComfyUI loads the file again for hooks, by the loader that it remembers; the model itself stays as it was."""
    dynamic_pair.alone.run(workflows.hooked_lora(TWIN, "middle"))
    dynamic_pair.plugin.run(workflows.hooked_lora(FILE, "middle"))

    assert torch.equal(dynamic_pair.alone.latents(), dynamic_pair.plugin.latents())


def test_other_formats_are_left_to_comfyui(dynamic_pair: Pair) -> None:
    """They are not mapped a second time, and a line says so once."""
    server = dynamic_pair.plugin
    dynamic_pair.same(workflows.text_to_latent("middle_a", loras=LORA))
    declined = [event["policy"] for event in server.events("policy.declined")]

    assert declined == ["zero_copy, all but GGUF files"]
    assert not [event for event in server.events("weights.mapped") if event["file"].startswith("middle_a")]


@pytest.fixture(scope="module", params=VERSIONS[1:])  # the first has no switch for dynamic VRAM but an NVIDIA card
def each_version(request: pytest.FixtureRequest, models: Path, simulated_npu: None,
                 tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if request.param == VERSIONS[-1]:
        yield request.getfixturevalue("dynamic_pair")
        return
    with started(models, tmp_path_factory, SMALL_DEVICE_MB, comfyui=TREES / request.param, dynamic_vram=True) as pair:
        yield pair


def test_a_gguf_file_gives_the_latents_of_its_twin_in_every_release(each_version: Pair) -> None:
    """With and without a LoRA, by the host's own paging."""
    told = each_version.plugin.log().count("Model Flux prepared for dynamic VRAM loading")
    for options in ({}, {"loras": (("flux_mixed", 1.0),)}, {}):
        each_version.twins(workflows.text_to_latent("flux_mixed_bf16", **options),
                           workflows.text_to_latent("flux_mixed.gguf", **options))
    assert each_version.plugin.log().count("Model Flux prepared for dynamic VRAM loading") - told >= 2


@pytest.mark.parametrize(("source", "twin"), [("middle_a.safetensors", "middle_a.safetensors"),
                                              (FILE, f"{TWIN}.safetensors")], ids=["safetensors", "GGUF"])
def test_switching_back_loads_and_reads_nothing(each_version: Pair, own_model: Callable[[str, str], Path], source: str,
                                                twin: str) -> None:
    """A, B, A, with a LoRA in the second A and without in a third: ComfyUI's own latents, of the model that was kept; its
    file was dropped from the page cache. `/free` lets go of it."""
    alone, plugin = each_version.alone, each_version.plugin
    files = {alone: own_model("paged_alone", f"diffusion_models/{twin}"),
             plugin: own_model("paged_plugin", f"diffusion_models/{source}")}
    other = workflows.text_to_latent("sd3", clip="clip_l_other", clip_type="sd3")
    read, kinds, found = {}, ["UNETLoader", "CLIPLoader"], {}
    for server, file in files.items():
        server.run(workflows.text_to_latent(file.name))
        server.run(other)
        since = len(server.events())
        if server is plugin:
            wait_for(lambda: any("r--s" in line for line in plugin.maps("paged_plugin")))
        drop_from_page_cache(file)
        before, server_latents = server.storage_bytes(), []
        for loras in (LORA, ()):
            server.run(workflows.text_to_latent(file.name, loras=loras, seed=2))
            server_latents.append(server.latents())
            if server is plugin:
                check_loader_nodes(plugin, *kinds)
            server.run(other)
        read[server], found[server] = (server.storage_bytes() - before) / file.stat().st_size, server_latents

    assert all(map(torch.equal, found[alone], found[plugin]))
    assert not torch.equal(*found[plugin])
    assert loads(plugin, since, "paged").count(("cache.hit", files[plugin].name)) == 2
    assert {kind for kind, _ in loads(plugin, since)} == {"cache.hit"}
    assert read[plugin] < 0.01
    plugin.free()
    wait_for(lambda: status(plugin)["entries"] == [])
    wait_for(lambda: plugin.maps("paged_plugin") == [])
