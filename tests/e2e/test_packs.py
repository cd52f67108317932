"""In one process with ComfyUI-GGUF and ComfyUI-MultiGPU, loaded before us and after us.

`COMFYUI_GGUF_PATH` and `COMFYUI_MULTIGPU_PATH` name their folders; `COMFYUI_CALCUIS_GGUF_PATH`, if it is set, that of
calcuis/gguf, which is there too then.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import SMALL_DEVICE_MB
from support import workflows
from support.server import MB, TESTING_NODES, Server

pytestmark = pytest.mark.host


# Under the names that users have them by: MultiGPU looks for ComfyUI-GGUF's.
NAMES = {"COMFYUI_GGUF_PATH": "ComfyUI-GGUF", "COMFYUI_MULTIGPU_PATH": "ComfyUI-MultiGPU", "COMFYUI_CALCUIS_GGUF_PATH": "gguf"}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = {name: os.environ.get(name) for name in NAMES}
    if not paths["COMFYUI_GGUF_PATH"] or not paths["COMFYUI_MULTIGPU_PATH"]:
        pytest.skip("COMFYUI_GGUF_PATH and COMFYUI_MULTIGPU_PATH do not name the packs")
    links = [tmp_path_factory.mktemp("links") / NAMES[name] for name, path in paths.items() if path]
    for link, path in zip(links, filter(None, paths.values()), strict=True):
        link.symlink_to(path)
    return links


@pytest.fixture(scope="module", params=["packs first", "plugin first"])
def server(request: pytest.FixtureRequest, packs: list[Path], models: Path, simulated_npu: None,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(COMFYUI, tmp_path_factory.mktemp("packs"), models, device_mb=SMALL_DEVICE_MB, packs=packs,
                plugin_first=request.param == "plugin first") as server:
        yield server


def through_gguf(model: str = "middle_q8_a.gguf", kind: str = "UnetLoaderGGUF", **options: Any) -> workflows.Workflow:
    flow = workflows.text_to_latent(model, **options)
    flow["model"] = workflows.node(kind, unet_name=model)
    return flow


def test_comfyui_starts_with_all_of_us(server: Server) -> None:
    """No pack fails to import, and no hook of ours declines."""
    assert "IMPORT FAILED" not in server.log()
    assert server.events("hook.declined") == []
    assert len(server.events("plugin.started")) == 1


def test_workflows_run_and_models_swap(server: Server) -> None:
    """Stock and GGUF loaders work in turn, and what a prompt makes is what it made before."""
    server.run(workflows.both("middle_a", "middle_b"))
    first = server.latents("out_a")
    server.run(through_gguf())
    quantised = server.latents()
    server.run(workflows.both("middle_a", "middle_b", seed=2))
    server.run(workflows.both("middle_a", "middle_b"))
    server.run(through_gguf(seed=2))
    server.run(through_gguf())

    assert torch.equal(first, server.latents("out_a"))
    assert torch.equal(quantised, server.latents())
    assert [event for event in server.events() if event["event"] in ("hook.failed", "policy.failed")] == []


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_latents_are_those_of_the_packs_alone(server: Server, packs: list[Path], models: Path,
                                              tmp_path_factory: pytest.TempPathFactory) -> None:
    """ComfyUI-GGUF rounds to the compute dtype at each step of a dequantisation and we once, so within 2 %; the wrong file or a
    missing LoRA is ten times that."""
    lora = (("middle", 4.0),)
    flows = {"plain": {"seed": 3}, "lora": {"seed": 3, "loras": lora}, "other": {"seed": 3, "model": "middle_q8_b.gguf"}}
    with Server(COMFYUI, tmp_path_factory.mktemp("alone"), models, plugin=False, device_mb=SMALL_DEVICE_MB,
                packs=packs) as alone:
        for name, options in flows.items():
            for one in (alone, server):
                one.run(through_gguf(prefix=name, **options))
        expected, found = ({name: one.latents(name) for name in flows} for one in (alone, server))

    assert {name: error(found[name], expected[name]) < 0.02 for name in flows} == dict.fromkeys(flows, True)
    assert error(expected["lora"], expected["plain"]) > 0.2
    assert error(expected["other"], expected["plain"]) > 0.2


def test_the_packs_gguf_loaders_end_in_the_mapping(server: Server) -> None:
    """What the pack's own nodes open stays mapped, swaps without a copy from the device, and their options are answered."""
    def both(seed: int) -> workflows.Workflow:
        flow = workflows.both("middle_q8_a.gguf", "middle_q8_b.gguf", seed=seed)
        flow["model"] = workflows.node("UnetLoaderGGUF", unet_name="middle_q8_a.gguf")
        flow["model2"] = workflows.node("UnetLoaderGGUFAdvanced", unet_name="middle_q8_b.gguf", dequant_dtype="float16",
                                        patch_dtype="default", patch_on_device=True)
        return flow

    server.run(both(1))
    before = server.device()["to_host"]
    server.run(both(2))

    assert server.device()["to_host"] - before < 1 * MB
    assert "dequant_dtype = float16 is superseded" in server.log()
    assert "patch_on_device = True is superseded" in server.log()
    mapped = {event["file"]: event["bytes"] for event in server.events("weights.mapped")}
    assert mapped["middle_q8_a.gguf"] > 40 * MB
    assert mapped["middle_q8_b.gguf"] > 40 * MB


T5 = {"clip_name": "t5_base.gguf", "type": "stable_audio"}
TWO = {"clip_name1": "clip_l_scaled_fp8.safetensors", "clip_name2": "clip_l_q8.gguf", "type": "sd3"}
DISTORCH = {"virtual_vram_gb": 0.0, "donor_device": "cpu", "expert_mode_allocations": "", "eject_models": False}


@pytest.mark.parametrize(("kind", "model", "options"), [
    ("CLIPLoaderGGUF", "flux_a", T5),
    ("CLIPLoaderGGUFMultiGPU", "flux_a", {**T5, "device": "cpu"}),
    ("CLIPLoaderGGUFDisTorch2MultiGPU", "flux_a", {**T5, "device": "npu:0", **DISTORCH}),
    ("DualCLIPLoaderGGUF", "sd3", TWO),
    ("ClipLoaderGGUF", "flux_a", {**T5, "device": "default"}),
    ("DualClipLoaderGGUF", "sd3", {**TWO, "device": "cpu"}),
])
def test_the_packs_text_encoder_loaders_end_in_the_mapping(server: Server, packs: list[Path], kind: str, model: str,
                                                           options: dict[str, str]) -> None:
    """The latents are those of the stock loader with the same files."""
    if kind in ("ClipLoaderGGUF", "DualClipLoaderGGUF") and "gguf" not in {pack.name for pack in packs}:
        pytest.skip("COMFYUI_CALCUIS_GGUF_PATH does not name the pack")
    flow = workflows.text_to_latent(model)
    stock = "CLIPLoader" if options.get("clip_name") else "DualCLIPLoader"
    device = {"device": "cpu"} if options.get("device") == "cpu" else {}
    choices = {name: value for name, value in options.items() if name.startswith("clip_name") or name == "type"}
    flow["clip"] = workflows.node(stock, **choices, **device)
    server.run(flow)
    expected, before = server.latents(), len(server.events("policy.decided"))
    flow["clip"] = workflows.node(kind, **options)
    server.run(flow)

    assert torch.isfinite(expected).all()
    assert torch.equal(expected, server.latents())
    opened = [event["reason"] for event in server.events("policy.decided")[before:] if event["request"] == "OpenModel"]
    assert ["opened as the stock loader opens them"] == [reason.rpartition(": ")[2] for reason in opened]


@pytest.mark.parametrize("loader", ["UnetLoaderGGUF", "LoaderGGUF"])
def test_what_the_packs_open_in_their_own_way_keeps_its_mapping(packs: list[Path], models: Path, simulated_npu: None,
                                                                tmp_path: Path, loader: str) -> None:
    """Past our hook, as a node would that we cannot hook: nothing comes back from the device or is released from the file by
    way of it, and the latents are the pack's own."""
    if loader == "LoaderGGUF" and "gguf" not in {pack.name for pack in packs}:
        pytest.skip("COMFYUI_CALCUIS_GGUF_PATH does not name the pack")

    def flow(strength: float) -> workflows.Workflow:
        found = workflows.both("middle_q8_a.gguf", "middle_q8_b.gguf")
        for name in ("model", "model2"):
            found[name] = workflows.node("InThePacksWay", loader=loader, name=found[name]["inputs"]["unet_name"])
        found["lora"] = workflows.node("LoraLoaderModelOnly", model=["model", 0], lora_name="middle.safetensors",
                                       strength_model=strength)
        found["sample"]["inputs"]["model"] = ["lora", 0]
        return found

    latents: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    to_host = {}
    for plugin, found in latents.items():
        with Server(COMFYUI, tmp_path / str(plugin), models, plugin=plugin, device_mb=1235,
                    packs=[*packs, TESTING_NODES]) as server:
            for strength in (1.0, 0.0, 1.0):
                server.run(flow(strength))
                found += [server.latents("out_a"), server.latents("out_b")]
            to_host[plugin] = server.device()["to_host"]

    assert all(map(torch.equal, latents[False], latents[True]))
    assert float((latents[True][0] - latents[True][2]).abs().max() / latents[True][2].std()) > 0.1
    assert (to_host[False] > 80 * MB, to_host[True] < 2 * MB) == (True, True)


def test_the_report_says_what_was_shadowed(server: Server) -> None:
    """MultiGPU's DisTorch loader replaces a function that we wrapped; that is named once, and in the report."""
    flow = workflows.text_to_latent("flux_b")
    flow["model"] = workflows.node("UNETLoaderDisTorch2MultiGPU", unet_name="flux_b.safetensors", weight_dtype="default",
                                   compute_device="npu:0", virtual_vram_gb=0.0, donor_device="cpu", expert_mode_allocations="",
                                   eject_models=False)
    server.run(flow)
    expected = server.latents()
    for seed in (2, 1):
        server.run(workflows.text_to_latent("flux_b", seed=seed))
    assert torch.equal(expected, server.latents())
    shadowed = [event["hook"] for event in server.events("hook.shadowed")]

    assert len(shadowed) == len(set(shadowed))
    report = subprocess.run([sys.executable, "-m", "telemetry", "report", str(server.base / "user/residency/telemetry.jsonl")],
                            cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True).stdout
    for hook in shadowed:
        assert hook in report
    assert "comfy.model_management.load_models_gpu" in shadowed
