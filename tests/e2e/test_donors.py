"""Weights that live on a second card: the images stay, each card holds what the settings say, and nothing stays behind."""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import empty, shrunk, troubles
from support import workflows
from support.server import MB, Server

OWN, LENT = 31 * MB, 20 * MB
LORA = (("middle", 1.0),)
LARGEST = 4 * MB  # of the middle models' modules


def settings(devices: str) -> str:
    return f'[hybrid_split]\ndevices = "{devices}"\n'


ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the models are small
TWO_DEVICES = {"SIMNPU_DEVICES": "2", **ONE_THREAD}
DEVICES = settings(f"npu:0,{OWN}b; NPU:1, {LENT // MB} MB")


@pytest.fixture(scope="module")
def alone(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI on one device that holds every model."""
    with Server(COMFYUI, tmp_path_factory.mktemp("alone"), models, plugin=False, device_mb=1700, env=ONE_THREAD) as server:
        yield server


@pytest.fixture(scope="module")
def lending(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two devices, one of which lends 20 MB."""
    with Server(COMFYUI, tmp_path_factory.mktemp("lending"), models, device_mb=1300, settings=DEVICES,
                env=TWO_DEVICES) as server:
        yield server
        assert [event for event in troubles(server) if event.get("policy") != "hybrid_split, devices"] == []


@pytest.fixture
def change(lending: Server) -> Iterator[object]:
    """Changes `devices` for the next prompts of one test."""
    yield lambda devices: lending.settings(settings(devices))
    lending.settings(DEVICES)


def loaded(server: Server) -> str:
    """What ComfyUI's log says that it loaded last."""
    return re.findall(r"loaded partially; .*?, ([\d.]+ MB loaded, [\d.]+ MB offloaded)", server.log())[-1]


def same(alone: Server, lending: Server, flow: workflows.Workflow, twin: workflows.Workflow | None = None) -> torch.Tensor:
    alone.run(twin or flow)
    lending.run(flow)
    expected, found = alone.latents(), lending.latents()
    assert torch.isfinite(expected).all()
    assert torch.equal(expected, found), (expected - found).abs().max()
    return found


def test_latents_are_those_of_one_big_device_and_each_device_holds_its_share(alone: Server, lending: Server) -> None:
    """Counted on the devices themselves; short by less than a module, and no more moves with a warm prompt."""
    same(alone, lending, workflows.text_to_latent("middle_a"))
    own, lent = lending.used()
    placed = lending.events("donors.placed")
    same(alone, lending, workflows.text_to_latent("middle_a", seed=2))

    assert OWN - LARGEST < own <= OWN
    assert LENT - LARGEST < lent <= LENT
    assert placed[-1]["predicted_bytes"] == placed[-1]["observed_bytes"]
    assert 0.98 * lent <= placed[-1]["observed_bytes"]["npu:1"] <= lent
    assert lending.events("donors.placed") == placed
    assert lending.events("model.placed")[-1]["donor_bytes"]["npu:1"] == pytest.approx(lent, rel=0.02)


def test_another_model_gives_something_else(alone: Server, lending: Server) -> None:
    """The comparison can fail."""
    alone.run(workflows.text_to_latent("middle_a"))
    lending.run(workflows.text_to_latent("middle_b"))
    expected = alone.latents()

    assert float((expected - lending.latents()).abs().max() / expected.std()) > 0.01


def test_a_lora_is_rounded_as_by_comfyui_at_the_same_split(alone: Server, lending: Server, change) -> None:  # type: ignore[no-untyped-def]
    """Added at each use where a weight streams, also from another device; it does something, and leaves no trace. Nothing is
    copied back from a device."""
    def as_split(flow: workflows.Workflow) -> torch.Tensor:
        with shrunk(alone, 1265):  # it holds a part of the model
            alone.run(flow)
            change(f"npu:0,{float(loaded(alone).split()[0]) + 0.01}mb;npu:1,{LENT}b")
            return same(alone, lending, flow)

    plain = same(alone, lending, workflows.text_to_latent("middle_a"))
    before = lending.device()["to_host"]
    lora = as_split(workflows.text_to_latent("middle_a", loras=LORA))
    assert loaded(alone) == loaded(lending)
    assert lending.used()[1] > LENT - LARGEST
    assert torch.equal(plain, same(alone, lending, workflows.text_to_latent("middle_a")))
    assert lending.device()["to_host"] - before < MB
    hooked = as_split(workflows.hooked_lora("middle_a", "middle"))

    assert float((lora - plain).abs().max() / plain.std()) > 0.1
    assert not torch.equal(lora, hooked)


def test_gguf_blocks_are_lent(alone: Server, lending: Server, change) -> None:  # type: ignore[no-untyped-def]
    """The blocks go to the other device as they are in the file, and become dense where they are used."""
    change("npu:0,14mb;npu:1,12mb")
    for extra in ({}, {"loras": LORA}):
        lending.run(workflows.text_to_latent("middle_q8_a.gguf", **extra))
        assert 8 * MB < lending.used()[1] <= 12 * MB
        if not extra:
            alone.run(workflows.text_to_latent("middle_q8_a_bf16"))
            assert torch.equal(alone.latents(), lending.latents())


def test_quantised_weights_are_lent(alone: Server, lending: Server, change) -> None:  # type: ignore[no-untyped-def]
    """ComfyUI's own scaled fp8: bytes and scales."""
    change("npu:0,1mb;npu:1,1mb")
    same(alone, lending, workflows.text_to_latent("flux_quantised"))
    assert MB // 4 < lending.used()[1] <= MB


def test_another_model_on_the_lending_device_pushes_the_blocks_out(alone: Server, lending: Server) -> None:
    """ComfyUI makes room there for its own model, and our blocks leave first, without a copy."""
    same(alone, lending, workflows.text_to_latent("middle_a", seed=3))
    before, events = lending.device()["to_host"], len(lending.events("donors.left"))
    flow = workflows.text_to_latent("middle_b", seed=4)
    there = flow | {"there": workflows.node("SelectModelDevice", model=["model", 0], device="gpu:1")}
    there["sample"] = workflows.node("KSampler", **{**flow["sample"]["inputs"], "model": ["there", 0]})
    same(alone, lending, there, flow)

    left = lending.events("donors.left")[events:]
    assert (left[0]["device"], left[0]["reason"]) == ("npu:1", "room is needed there")
    assert lending.device()["to_host"] - before < MB
    same(alone, lending, workflows.text_to_latent("middle_a", seed=5))


def test_unloading_leaves_nothing_on_any_device(lending: Server) -> None:
    """`POST /free`: the blocks are the file's mapping again, without a copy."""
    lending.run(workflows.text_to_latent("middle_a", seed=6))
    assert lending.used()[1] > LENT - LARGEST
    before = lending.device()["to_host"]
    empty(lending)

    assert lending.used()[1] == 0
    assert lending.device()["to_host"] - before < MB


def test_settings_that_lend_no_more_take_the_blocks_back(alone: Server, lending: Server, change) -> None:  # type: ignore[no-untyped-def]
    """At the next prompt; a device that is not there is said once, and the prompt runs."""
    lending.run(workflows.text_to_latent("middle_a", seed=6))
    change(f"npu:0,{OWN}b;npu:5,20mb")
    for seed in (7, 8):
        same(alone, lending, workflows.text_to_latent("middle_a", seed=seed))

    assert lending.used()[1] == 0
    assert lending.events("donors.left")[-1]["reason"] == "it is not lent any more"
    declined = [event for event in troubles(lending) if event.get("policy") == "hybrid_split, devices"]
    assert [event["reason"] for event in declined] == ["there is no npu:5 here, there are npu:0, npu:1"]


def test_dynamic_vram_says_that_it_cannot(models: Path, simulated_npu: None, tmp_path: Path) -> None:
    """Nothing is put elsewhere, nothing is claimed, and it is said once."""
    with Server(COMFYUI, tmp_path, models, device_mb=1300, settings=DEVICES, dynamic_vram=True,
                env=TWO_DEVICES) as server:
        server.run(workflows.text_to_latent("middle_a"))
        declined = [event for event in server.events("policy.declined") if event["policy"] == "hybrid_split, devices"]

        assert len(declined) == 1
        assert "dynamic VRAM" in declined[0]["reason"]
        assert server.used()[1] == 0
        assert server.events("donors.placed") == []
