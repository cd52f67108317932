"""GGUF text encoders through the stock loaders give what the same weights in a safetensors file give, bit for bit.

ComfyUI alone cannot open them, so it gets their twin: the same weights, dequantised to the float16 that it keeps these encoders
in on every device.
"""
from __future__ import annotations

import torch
from e2e.conftest import Pair, empty
from support import workflows
from support.server import MB

T5, T5_TWIN = "t5_base.gguf", "t5_base_fp16"
CLIP, CLIP_TWIN = "clip_l_q8.gguf", "clip_l_q8_fp16"


def with_encoder(clip: str) -> workflows.Workflow:
    return workflows.text_to_latent("flux_a", clip=clip)


def test_a_t5_with_llama_cpps_names(pair: Pair) -> None:
    """Five types in one file, the vocabulary among them; the tokenizer is ComfyUI's own."""
    first = pair.twins(with_encoder(T5_TWIN), with_encoder(T5))
    pair.plugin.run(with_encoder("t5_base_other.gguf"))  # another encoder gives something else: the comparison can fail
    other = pair.plugin.latents()
    again = pair.twins(with_encoder(T5_TWIN), with_encoder(T5))

    assert float((first - other).abs().max() / first.std()) > 0.01
    assert torch.equal(first, again)


def test_a_clip_with_its_own_names(pair: Pair) -> None:
    pair.twins(with_encoder(CLIP_TWIN), with_encoder(CLIP))


def test_two_encoders_of_which_one_is_gguf(pair: Pair) -> None:
    """Beside a plain safetensors file, and beside one in fp8. Both fill one module, so the second is what computes."""
    for first, second in (("clip_l_other", "{}"), ("{}", "clip_l_fp8")):
        alone, plugin = ((first.format(name), second.format(name)) for name in (CLIP_TWIN, CLIP))
        pair.twins(workflows.two_encoders("sd3", alone), workflows.two_encoders("sd3", plugin))


def test_blocks_stay_in_the_mapping(npu_pair: Pair) -> None:
    """A second prompt reads nothing and brings nothing back from the device."""
    server = npu_pair.plugin
    empty(server)
    server.run(with_encoder(T5))
    before, read = server.device()["to_host"], server.storage_bytes()
    server.run(workflows.text_to_latent("flux_b", clip=T5, seed=2))

    assert server.device()["to_host"] - before < 8 * MB
    assert server.storage_bytes() - read < 8 * MB
    mapped = {event["file"]: event for event in server.events("weights.mapped")}[T5]
    assert mapped["bytes"] > 60 * MB
    assert mapped["copied_bytes"] < 1 * MB


def test_gguf_files_are_listed_where_a_text_encoder_is_chosen(pair: Pair) -> None:
    for kind in ("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader", "QuadrupleCLIPLoader"):
        assert T5 in pair.plugin.choices(kind, "clip_name" if kind == "CLIPLoader" else "clip_name1")
