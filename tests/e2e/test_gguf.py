"""GGUF files through the stock loader give what the same weights in a safetensors file give, bit for bit, from the mapping.

ComfyUI alone cannot open them, so it gets their twin: the same weights, dequantised to the dtype that this device computes in.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from e2e.conftest import Pair, empty, shrunk, troubles
from support import workflows
from support.gguf_files import save
from support.server import MB, PromptFailed

LORA = (("flux_mixed", 1.0),)
FILE = "flux_mixed.gguf"


@pytest.fixture(params=["cpu", "npu", "dynamic"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """On the CPU, on the simulated accelerator, and there with dynamic VRAM."""
    pair: Pair = request.getfixturevalue(f"{request.param}_pair")
    return pair


def twin(pair: Pair) -> str:
    return "flux_mixed_bf16" if pair.plugin.simulated else "flux_mixed_fp32"


def latents(pair: Pair, flow, *changes) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Runs a workflow on the twin and on the GGUF file, and returns the latents, which must be equal."""
    return pair.twins(flow(twin(pair), *changes), flow(FILE, *changes))


def test_latents_are_those_of_the_dequantised_weights(pair: Pair) -> None:
    """Seven types in one file, with and without LoRA, in any order; a LoRA does something, and leaves no trace."""
    plain = latents(pair, workflows.text_to_latent)
    lora = latents(pair, lambda model: workflows.text_to_latent(model, loras=LORA))
    half = latents(pair, lambda model: workflows.text_to_latent(model, loras=(("flux_mixed", 0.5),)))
    again = latents(pair, lambda model: workflows.text_to_latent(model))

    assert torch.equal(plain, again)
    assert float((lora - plain).abs().max() / plain.std()) > 0.1
    assert not torch.equal(lora, half)


def test_a_lora_that_is_scheduled_by_hooks_comes_and_goes(pair: Pair) -> None:
    """Hooks write into weights and back; blocks cannot take that, so what they write is kept beside."""
    first = latents(pair, lambda model: workflows.hooked_lora(model, "flux_mixed"))
    latents(pair, workflows.text_to_latent)
    again = latents(pair, lambda model: workflows.hooked_lora(model, "flux_mixed"))

    assert torch.equal(first, again)


def test_two_samplers_on_one_model(pair: Pair) -> None:
    """With and without a LoRA in one prompt: two patchers on the same layers."""
    def flow(model: str) -> workflows.Workflow:
        one = workflows.text_to_latent(model, loras=LORA, prefix="out_lora")
        two = workflows.text_to_latent(model)
        return one | {"plain": {**two["sample"], "inputs": {**two["sample"]["inputs"], "latent_image": ["sample", 0]}},
                      "save_plain": {**two["save"], "inputs": {**two["save"]["inputs"], "samples": ["plain", 0]}}}

    latents(pair, flow)


def test_the_wrong_file_gives_something_else(pair: Pair) -> None:
    """The comparison can fail."""
    pair.alone.run(workflows.text_to_latent(twin(pair)))
    pair.plugin.run(workflows.text_to_latent("flux_mixed_other.gguf"))

    expected = pair.alone.latents()
    assert float((expected - pair.plugin.latents()).abs().max() / expected.std()) > 0.01


def test_weights_are_mapped_and_swap_without_a_copy(npu_pair: Pair) -> None:
    """Two models take turns on a device that holds one: nothing comes back from the device, and one mapping a file stays."""
    server = npu_pair.plugin
    server.run(workflows.both("middle_q8_a.gguf", "middle_q8_b.gguf"))
    maps = [line for line in server.maps("middle_q8_a") if "rw-p" in line]  # the other is the header
    before, read = server.device()["to_host"], server.storage_bytes()
    server.run(workflows.both("middle_q8_a.gguf", "middle_q8_b.gguf", seed=2))

    assert server.device()["to_host"] - before < 1 * MB
    assert server.storage_bytes() - read < 1 * MB
    assert len(maps) == 1
    assert [line for line in server.maps("middle_q8_a") if "rw-p" in line] == maps
    mapped = {event["file"]: event for event in server.events("weights.mapped")}["middle_q8_a.gguf"]
    assert (mapped["bytes"] > 40 * MB, mapped["copied_bytes"] < 1 * MB) == (True, True)


def test_a_workflow_that_comes_back_reads_nothing(npu_pair: Pair, models: Path) -> None:
    """A, B, A in prompts of their own, between which ComfyUI drops A's model: one mapping, and nothing from the disk."""
    server = npu_pair.plugin
    empty(server)
    maps = []
    for name in ("middle_q8_a.gguf", "middle_q8_b.gguf", "middle_q8_a.gguf"):
        read = server.storage_bytes()
        server.run(workflows.text_to_latent(name))
        maps.append([line for line in server.maps("middle_q8_a") if "rw-p" in line])

    assert server.storage_bytes() - read < (models / "diffusion_models" / name).stat().st_size / 100
    assert [len(found) for found in maps] == [1, 1, 1]
    assert maps[0] == maps[2]


def test_a_model_that_nobody_knows_is_named_by_its_architecture(cpu_pair: Pair, own_model: Callable[[str, str], Path]) -> None:
    """ComfyUI says which file it was, and a line what the file takes itself for."""
    file = own_model("unknown", f"diffusion_models/{FILE}")
    save(file, "gpt-nobody", {"some.weight": numpy.ones((32, 256), numpy.float32),
                              "more.weight": (numpy.zeros((32, 272), numpy.uint8), gguf.GGMLQuantizationType.Q8_0)})
    with pytest.raises(PromptFailed, match=file.name):
        cpu_pair.plugin.run(workflows.text_to_latent(file.name))
    assert "The GGUF file says that it is: gpt-nobody" in cpu_pair.plugin.log()


def test_a_model_that_does_not_fit_streams_from_the_mapping(npu_pair: Pair) -> None:
    """Part of it stays off the device, mapped, and the latents are those of the twin that fits."""
    npu_pair.alone.run(workflows.text_to_latent("middle_q8_a_bf16"))
    server = npu_pair.plugin
    with shrunk(server, 1230):
        server.run(workflows.text_to_latent("middle_q8_a.gguf"))
        server.run(workflows.text_to_latent("middle_q8_a.gguf", loras=(("middle", 1.0),), prefix="lora"))
        server.run(workflows.text_to_latent("middle_q8_a.gguf", seed=2, prefix="other"))
        placed = [event for event in server.events("model.placed") if event["model"] == "Flux"][-1]

        assert troubles(server) == []
        assert torch.equal(npu_pair.alone.latents(), server.latents())
        assert placed["device_bytes"] > 1 * MB
        assert placed["mapped_bytes"] > 5 * MB
        assert placed["host_bytes"] < 1 * MB


def test_a_weight_dtype_is_said_not_to_apply(pair: Pair) -> None:
    """The blocks of a file cannot become fp8; the result is that of the default, and a line says so."""
    pair.plugin.run(workflows.text_to_latent(FILE))
    expected = pair.plugin.latents()
    pair.plugin.run(workflows.text_to_latent(FILE, weight_dtype="fp8_e4m3fn"))

    assert torch.equal(expected, pair.plugin.latents())
    assert "is not applied: the weights of a GGUF file stay as they are" in pair.plugin.log()


def test_gguf_files_are_listed_where_a_diffusion_model_is_chosen(pair: Pair) -> None:
    """And nowhere else: most folders share one set of extensions."""
    diffusion = pair.plugin.choices("UNETLoader", "unet_name")
    assert FILE in diffusion
    assert not [name for kind, option in (("CheckpointLoaderSimple", "ckpt_name"), ("VAELoader", "vae_name"),
                                          ("LoraLoaderModelOnly", "lora_name"))
                for name in pair.plugin.choices(kind, option) if name.endswith(".gguf")]


@pytest.mark.parametrize(("spoil", "words"), [
    pytest.param(lambda data: data[:len(data) // 2], "", id="truncated"),
    pytest.param(lambda data: b"GGUF" + (99).to_bytes(4, "little") + data[8:], "version", id="a version to come"),
    pytest.param(lambda data: b"nope" + data[4:], "", id="no GGUF"),
    pytest.param(lambda data: b"", "", id="no bytes"),
])
def test_a_bad_file_is_an_error_of_one_prompt(cpu_pair: Pair, own_model, spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    """The error names the file, and the next prompt succeeds."""
    file = own_model("spoilt", f"diffusion_models/{FILE}")
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(PromptFailed) as failure:
        cpu_pair.plugin.run(workflows.text_to_latent(file.name))
    assert (words or file.name) in str(failure.value)
    assert cpu_pair.plugin.maps(file.name) == []
    latents(cpu_pair, workflows.text_to_latent)
