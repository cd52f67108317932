"""Nodes of packs that open GGUF files by themselves: by the stock loaders' way where it can be, and else from the mapping.

The pack in `support/packs/gguf_nodes` does what such packs do. What it opens is compared with the dequantised twin.
"""
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import Pair, troubles
from support import workflows
from support.server import GGUF_NODES, MB, Server, both

CLIP, TWIN = "clip_l_q8.gguf", "clip_l_q8_fp16.safetensors"


def with_stock(*files: str, **options: Any) -> workflows.Workflow:
    if len(files) > 1:
        return workflows.two_encoders("sd3", files)
    flow = workflows.text_to_latent("flux_a", clip=files[0])
    flow["clip"]["inputs"] |= options
    return flow


def with_pack(*files: str, **options: Any) -> workflows.Workflow:
    """The same with the pack's node."""
    flow = with_stock(*files)
    names = dict(zip(("name", "name2"), files, strict=False))
    flow["clip"] = workflows.node("TextEncoderOfAPack", type=flow["clip"]["inputs"]["type"], **names, **options)
    return flow


def test_a_text_encoder_ends_in_the_mapping(pair: Pair) -> None:
    """Its latents are the twin's, and another encoder's are not. What has no meaning for us is said so."""
    found = pair.twins(with_stock(TWIN), with_pack(CLIP, dequant_dtype="float16"))

    decided = [event["reason"] for event in pair.plugin.events("policy.decided") if event["request"] == "OpenModel"]
    mapped = {event["file"]: event for event in pair.plugin.events("weights.mapped")}[CLIP]
    assert f"{CLIP}: opened as the stock loader opens them" in decided
    assert "dequant_dtype = float16 is superseded" in pair.plugin.log()
    assert mapped["bytes"] > 100 * MB
    assert mapped["copied_bytes"] < 1 * MB
    other = pair.twins(with_stock("clip_l_other.safetensors"), with_pack("clip_l_other.safetensors"))
    assert float((other - found).abs().max() / found.std()) > 0.01


def test_a_gguf_file_beside_another_format(cpu_pair: Pair) -> None:
    """In float16, and in scaled fp8 on either side. Both fill one module, so the second is what computes."""
    for first, second in (("clip_l_other.safetensors", CLIP), ("clip_l_scaled_fp8.safetensors", CLIP),
                          (CLIP, "clip_l_scaled_fp8.safetensors")):
        twins = [{CLIP: TWIN}.get(name, name.replace("fp8", "fp16")) for name in (first, second)]
        cpu_pair.twins(with_stock(*twins), with_pack(first, second))


def test_an_encoder_that_shall_stay_on_the_cpu_does(npu_pair: Pair) -> None:
    """By the option that the stock node has too."""
    before = len(npu_pair.plugin.events("model.placed"))
    npu_pair.twins(with_stock(TWIN, device="cpu"), with_pack(CLIP, device="cpu"))

    placed = [event for event in npu_pair.plugin.events("model.placed")[before:] if event["model"] == "SD1ClipModel"]
    assert {"cpu"} == {event["device"] for event in placed}


FILES = ("middle_q8_a.gguf", "middle_q8_b.gguf")


def in_the_packs_way(strength: float) -> workflows.Workflow:
    """Two models that take turns, opened by a node that cannot be hooked; the first has a LoRA."""
    flow = workflows.both(*FILES)
    for name, file in zip(("model", "model2"), FILES, strict=True):
        flow[name] = workflows.node("ModelOfAPack", name=file)
    flow["lora"] = workflows.node("LoraLoaderModelOnly", model=["model", 0], lora_name="middle.safetensors",
                                  strength_model=strength)
    flow["sample"]["inputs"]["model"] = ["lora", 0]
    return flow


@pytest.mark.parametrize("device_mb", [1280, 1235], ids=["one fits", "none fits"])
def test_what_a_pack_opens_in_its_own_way_keeps_its_mapping(models: Path, simulated_npu: None, tmp_path: Path,
                                                            device_mb: int) -> None:
    """Nothing comes back from the device, nothing is copied out of the file, and the latents are the pack's own."""
    latents: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    to_host, private = {}, {}
    options = {"models": models, "device_mb": device_mb, "packs": [GGUF_NODES]}
    with both(partial(Server, COMFYUI, tmp_path / "alone", plugin=False, **options),
              partial(Server, COMFYUI, tmp_path / "plugin", **options)) as servers:
        for server in servers:
            start = server.private_bytes()
            for strength in (1.0, 0.0, 1.0):
                server.run(in_the_packs_way(strength))
                latents[server.plugin] += [server.latents("out_a"), server.latents("out_b")]
            to_host[server.plugin] = server.device()["to_host"]
            private[server.plugin] = server.private_bytes() - start
        assert troubles(server) == []
    mapped = {event["file"]: event["bytes"] for event in server.events("weights.mapped")}

    assert all(map(torch.equal, latents[False], latents[True]))
    lora, _, plain, *_, again, _ = latents[True]
    assert torch.equal(lora, again)
    assert float((lora - plain).abs().max() / plain.std()) > 0.1
    assert (to_host[False] > 80 * MB, to_host[True] < 2 * MB) == (True, True)
    assert private[False] - private[True] > 255 * MB  # of which 236 are the text encoder's
    assert {mapped[file] > 40 * MB for file in FILES} == {True}
