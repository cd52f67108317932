"""Stock workflows give the same latents with the plugin as without, bit for bit, at the same split between device and RAM.

Latents are compared because images of random weights saturate. Where a workflow decodes, the decoded image is encoded again
and compared as a latent too.
"""
from __future__ import annotations

import pytest
import torch
from e2e.conftest import Pair
from support import workflows

LORA_ONE, LORA_TWO = (("flux_one", 1.0),), (("flux_one", 0.6), ("flux_two", 0.8))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.std())


@pytest.mark.parametrize("workflow", [
    pytest.param(workflows.text_to_latent("flux_quantised"), id="quantised with comfy_quant"),
    pytest.param(workflows.text_to_latent("flux_a", weight_dtype="fp8_e4m3fn"), id="fp8 of a bf16 file"),
    pytest.param(workflows.text_to_latent("sd3", clip="clip_l_fp8", clip_type="sd3"), id="fp8 text encoder"),
    pytest.param(workflows.two_encoders("sd3", ("clip_l", "clip_l_other")), id="two text encoders"),
    pytest.param(workflows.hooked_lora("flux_a", "flux_one"), id="LoRA scheduled by hooks"),
    pytest.param(workflows.with_controlnet("flux_a", "flux"), id="ControlNet"),
    pytest.param(workflows.torch_file("flux_torch"), id="a .pt file"),
    pytest.param(workflows.both("middle_a", "middle_b"), id="two models that swap"),
])
def test_latents_are_equal(pair: Pair, workflow: workflows.Workflow) -> None:
    """Whatever the format and the patches, nobody can tell from the result that the plugin is there."""
    prefixes = ("out_a", "out_b") if "save2" in workflow else ("out",)

    pair.same(workflow, *prefixes)


@pytest.mark.parametrize("workflow", [
    pytest.param(workflows.text_to_latent("sd3", clip_type="sd3", vae="taesd"), id="TAESD"),
    pytest.param(workflows.video("wan", "wan"), id="Wan VAE"),
    pytest.param(workflows.from_checkpoint("sd3"), id="checkpoint"),
    pytest.param(workflows.from_checkpoint("sd3_fp32"), id="fp32 checkpoint"),
])
def test_latents_and_vae_are_equal(pair: Pair, workflow: workflows.Workflow) -> None:
    """A VAE's weights are mapped too, and it decodes and encodes the same."""
    pair.same(workflow, "out", "out_vae")


def test_a_controlnet_and_a_torch_file_are_mapped(pair: Pair) -> None:
    """Both count as mapped where their dtype is the model's; a ControlNet does something."""
    plain = pair.same(workflows.text_to_latent("flux_a"))
    controlled = pair.same(workflows.with_controlnet("flux_a", "flux"))
    pair.same(workflows.torch_file("flux_torch"))

    mapped = {event["file"]: event["bytes"] for event in pair.plugin.events("weights.mapped")}
    assert difference(plain, controlled) > 0.01
    assert mapped["flux.safetensors" if pair.plugin.simulated else "flux_torch.pt"] > 0


def test_lora_on_off_on(pair: Pair) -> None:
    """Patching, unpatching and patching again leaves no trace, and the LoRA does something."""
    on = pair.same(workflows.text_to_latent("flux_a", loras=LORA_ONE))
    off = pair.same(workflows.text_to_latent("flux_a"))
    again = pair.same(workflows.text_to_latent("flux_a", loras=LORA_ONE))

    assert torch.equal(on, again)
    assert difference(on, off) > 0.01


def test_two_lora_chains_on_one_file(pair: Pair) -> None:
    """Two chains share the model underneath; each keeps its own patches."""
    one = workflows.text_to_latent("flux_a", loras=LORA_ONE)
    two = workflows.text_to_latent("flux_a", loras=LORA_TWO, prefix="other")
    merged = {**one, **{f"other_{name}": node for name, node in two.items() if name in ("sample", "save")}}
    merged |= {"lora_a": two["lora0"], "lora_b": two["lora1"]}
    merged["lora_b"]["inputs"]["model"] = ["lora_a", 0]
    merged["other_sample"]["inputs"]["model"] = ["lora_b", 0]
    merged["other_save"]["inputs"]["samples"] = ["other_sample", 0]

    first = pair.same(merged, "out", "other")
    second = pair.same(merged | {"sample": {**one["sample"], "inputs": {**one["sample"]["inputs"], "seed": 5}}}, "out", "other")

    assert difference(first, second) > 0.01


def test_merged_models(pair: Pair) -> None:
    """A merge patches one model with the other's weights."""
    flow = workflows.text_to_latent("flux_a")
    flow["second"] = workflows.node("UNETLoader", unet_name="flux_b.safetensors", weight_dtype="default")
    flow["merge"] = workflows.node("ModelMergeSimple", model1=["model", 0], model2=["second", 0], ratio=0.4)
    flow["sample"]["inputs"]["model"] = ["merge", 0]

    merged = pair.same(flow)
    alone = pair.same(workflows.text_to_latent("flux_a"))

    assert difference(merged, alone) > 0.01


@pytest.mark.parametrize(("right", "wrong"), [
    pytest.param(workflows.text_to_latent("flux_a"), workflows.text_to_latent("flux_b"), id="the wrong file"),
    pytest.param(workflows.text_to_latent("flux_a", loras=LORA_TWO), workflows.text_to_latent("flux_a", loras=LORA_ONE),
                 id="the wrong LoRA"),
    pytest.param(workflows.hooked_lora("flux_a", "flux_one"), workflows.hooked_lora("flux_a", "flux_two"), id="the wrong hook"),
])
def test_negative_control(pair: Pair, right: workflows.Workflow, wrong: workflows.Workflow) -> None:
    """The comparison can fail: what must differ differs by far more than rounding."""
    pair.alone.run(right)
    expected = pair.alone.latents()
    pair.plugin.run(wrong)

    assert difference(expected, pair.plugin.latents()) > 0.01
