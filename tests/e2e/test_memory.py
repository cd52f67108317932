"""Where the bytes are: mapped and not copied, back in the mapping without a copy from the device, and gone when let go."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import Pair, empty, troubles, wait_for
from support import workflows
from support.server import MB, Server, both


@pytest.fixture
def swapping(npu_pair: Pair) -> Pair:
    """Both servers on a simulated accelerator that holds one of two models."""
    return npu_pair


def test_swapping_models_copies_nothing_from_the_device(swapping: Pair) -> None:
    """From the second prompt on, ComfyUI alone copies most of two models back; with the plugin nothing comes back."""
    empty(swapping.plugin)  # what other tests left may be of files whose biases were converted
    to_host, told = {}, len(swapping.plugin.events("weights.restored"))
    for name, server in (("alone", swapping.alone), ("plugin", swapping.plugin)):
        server.run(workflows.both("middle_a", "middle_b"))
        before = server.device()["to_host"]
        server.run(workflows.both("middle_a", "middle_b", seed=2))
        to_host[name] = server.device()["to_host"] - before

    assert to_host["alone"] > 90 * MB
    assert to_host["plugin"] < 1 * MB
    restored = swapping.plugin.events("weights.restored")[told:]
    assert sum(event["bytes"] for event in restored) > 90 * MB
    assert sum(event["copied_bytes"] for event in restored) == 0


def test_a_lora_change_copies_nothing_from_the_device(swapping: Pair) -> None:
    """ComfyUI takes the whole model off the device when a LoRA changes; patched weights come back from their backup."""
    to_host = {}
    for name, server in (("alone", swapping.alone), ("plugin", swapping.plugin)):
        server.run(workflows.text_to_latent("middle_a"))
        before = server.device()["to_host"]
        for seed, loras in ((1, (("middle", 1.0),)), (2, ()), (3, (("middle", 0.5),))):
            server.run(workflows.text_to_latent("middle_a", loras=loras, seed=seed))
        to_host[name] = server.device()["to_host"] - before

    assert torch.equal(swapping.alone.latents(), swapping.plugin.latents())
    assert to_host["alone"] > 60 * MB
    assert to_host["plugin"] < 1 * MB


def test_weights_changed_on_the_device_come_back_changed(swapping: Pair) -> None:
    """A pack that writes into a weight on the device finds its change after the model was swapped out and in again."""
    flow = workflows.both("middle_b", "middle_a")
    flow["scale"] = workflows.node("ScaleWeightOnDevice", model=["model2", 0], factor=1.5)
    flow["sample2"]["inputs"]["model"] = ["scale", 0]

    swapping.same(flow, "out_a", "out_b")
    for name in ("sample", "sample2"):  # the scaled model is in ComfyUI's cache, so it is not scaled twice
        flow[name]["inputs"]["seed"] = 2
    changed = swapping.same(flow, "out_a", "out_b")

    swapping.alone.run(workflows.both("middle_b", "middle_a", seed=2))
    assert not torch.equal(changed, swapping.alone.latents("out_b"))


def test_swapping_follows_a_lora_that_is_scheduled_by_hooks(swapping: Pair) -> None:
    """Hooks write into weights in place, and back; models swap in between."""
    first = swapping.same(workflows.hooked_lora("middle_a", "middle"))
    swapping.same(workflows.both("middle_b", "middle_a", seed=3), "out_a", "out_b")
    again = swapping.same(workflows.hooked_lora("middle_a", "middle", prefix="again"), "again")

    assert torch.equal(first, again)


def test_free_unmaps_the_files_and_says_so(swapping: Pair) -> None:
    """`POST /free` gives back what the bank keeps, and the system agrees that the file is not mapped any more."""
    server = swapping.plugin
    server.run(workflows.text_to_latent("flux_b"))
    assert server.maps("flux_b.safetensors") != []

    before = len(server.events("weights.released"))
    server.free()
    server.run(workflows.text_to_latent("flux_a"))

    def released() -> dict[str, bool | None]:
        return {event["file"]: event["unmapped"] for event in server.events("weights.released")[before:]}

    wait_for(lambda: "flux_b.safetensors" in released())  # ComfyUI may take a prompt that came meanwhile first
    assert released()["flux_b.safetensors"] is True
    assert server.maps("flux_b.safetensors") == []


@pytest.fixture(scope="module")
def narrow(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The plugin on the CPU, keeping the file's dtype."""
    settings = "[zero_copy]\nkeep_file_dtype = true\n"
    with Server(COMFYUI, tmp_path_factory.mktemp("narrow"), models, settings=settings) as server:
        yield server
        assert troubles(server) == []


def growth(server: Server, workflow: workflows.Workflow) -> float:
    """Private MB that a model's first prompt costs, beyond what any model's first prompt costs."""
    server.run(workflows.text_to_latent("flux_a"))
    before = server.private_bytes()
    server.run(workflow)
    return (server.private_bytes() - before) / MB


@pytest.fixture(scope="module")
def cpu(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The plugin with nothing but mapping: a load that is kept would hide what the bank does."""
    folders = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("plugin")
    with both(partial(Server, COMFYUI, folders[0], models, plugin=False),
              partial(Server, COMFYUI, folders[1], models, settings='policies = ["zero_copy"]\n')) as (alone, plugin):
        yield Pair(alone, plugin)


def test_a_model_in_the_computes_dtype_costs_no_private_ram(cpu: Pair) -> None:
    """141 MB of float32 weights are the file's mapping."""
    flow = workflows.text_to_latent("middle_fp32")

    assert growth(cpu.alone, flow) > 120
    assert growth(cpu.plugin, flow) < 40
    assert torch.equal(cpu.alone.latents(), cpu.plugin.latents())


def test_keep_file_dtype_maps_what_would_be_widened(cpu: Pair, narrow: Server) -> None:
    """A bf16 file computed in float32 stays bf16 and mapped, with the same latents, patched or not."""
    flow = workflows.text_to_latent("middle_a")
    cpu.alone.run(flow)
    assert growth(narrow, flow) < 40
    mapped = {event["file"]: event for event in narrow.events("weights.mapped")}["middle_a.safetensors"]
    assert (mapped["bytes"] > 70 * MB, mapped["copied_bytes"] < 1 * MB) == (True, True)
    assert torch.equal(cpu.alone.latents(), narrow.latents())

    patched = workflows.text_to_latent("middle_a", loras=(("middle", 1.0),))
    for server in (cpu.alone, narrow):
        server.run(patched)
    assert torch.equal(cpu.alone.latents(), narrow.latents())


def test_the_next_load_of_a_file_reads_and_maps_nothing(cpu: Pair) -> None:
    """A model that ComfyUI dropped is built again from the mapping that the bank kept."""
    server = cpu.plugin
    first = workflows.text_to_latent("middle_fp32")
    server.run(first)
    other = workflows.text_to_latent("sd3", clip_type="sd3")
    server.run(other)  # another workflow: ComfyUI drops the first one's models
    server.run(other | {"sample": {**other["sample"], "inputs": {**other["sample"]["inputs"], "seed": 9}}})
    read, mapped = server.storage_bytes(), server.maps("middle_fp32")
    server.run(workflows.text_to_latent("middle_fp32", seed=4))

    reads = [event["source"] for event in server.events("weights.read") if event["file"] == "middle_fp32.safetensors"]
    assert reads[-1] == "bank"
    assert server.maps("middle_fp32") == mapped
    assert server.storage_bytes() - read < 1 * MB  # of 141; the process may read a page of something else
