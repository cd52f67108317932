"""ComfyUI in a worker takes a model off the device that it needs for another; what was taken off comes back for its turn."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import pytest
import torch
import torch.distributed
from conftest import TREES, VERSIONS
from support import tiny

pytest.importorskip("ray")

from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.models import Model
from residency.policies.ray_shard.worker.ports import open_port
from residency.policies.ray_shard.worker.weights import MODES
from support import deep, evictions

ALL = sorted(name for name, (_, part) in evictions.CASES.items() if part == "all")
PARTLY = sorted(set(evictions.CASES) - set(ALL))


@pytest.fixture(scope="module", params=[VERSIONS[0], VERSIONS[-1]])
def cases(request: pytest.FixtureRequest, simulated_npu: None) -> dict[str, dict[str, Any]]:
    """*Simulated*: with the oldest and the newest ComfyUI."""
    return evictions.found(TREES / request.param)


@pytest.mark.parametrize("name", sorted(evictions.CASES))
def test_each_answer_is_that_of_a_device_of_its_own(cases: dict[str, dict[str, Any]], name: str) -> None:
    """Bit for bit, patches too."""
    assert [turn["same"] for turn in cases[name]["turns"]] == [True] * 4


@pytest.mark.parametrize("name", ALL)
def test_what_had_to_go_lies_where_it_was_built(cases: dict[str, dict[str, Any]], name: str) -> None:
    """Not in RAM of the worker's own, though ComfyUI copies it there."""
    assert [(turn["other"], turn["home"]) for turn in cases[name]["turns"]] == [(0.0, True)] * 4


@pytest.mark.parametrize("name", PARTLY)
def test_where_a_part_is_enough_the_rest_stays(cases: dict[str, dict[str, Any]], name: str) -> None:
    """And what went is brought back."""
    first, *later = (turn["other"] for turn in cases[name]["turns"])
    assert first == 0.0
    assert all(0.3 < there < 0.7 for there in later)


@pytest.mark.parametrize("name", sorted(evictions.CASES))
def test_released_it_is_as_built(cases: dict[str, dict[str, Any]], name: str) -> None:
    """Nothing is on the device, and nothing was copied."""
    assert cases[name]["back"]
    assert cases[name]["left"] == 0


@pytest.fixture
def unet() -> Iterator[Model]:
    """With a LoRA, on the CPU."""
    with torch.inference_mode():
        patcher = tiny.patcher()
        remote = RemoteModel(tiny.with_lora(patcher))
        model = Model(patcher.model, deep.CPU, deep.CPU)
        model.patch("LoRA", pack(remote.patches(), known=remote.known()))
        yield model
        model.release()


def evict(share: float | None = None) -> None:
    """The only model, or a share of it, as ComfyUI's `free_memory` does."""
    loaded = comfy.model_management.current_loaded_models
    one = loaded.pop()
    if not one.model_unload(None if share is None else share * one.model_loaded_memory()):
        loaded.append(one)


def test_it_is_placed_no_more_often_than_it_was_taken_off(unet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded partly is whole as it is."""
    placed: list[Any] = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr("comfy.model_management.load_models_gpu",
                        lambda models, **options: placed.extend(models) or load(models, **options))
    first = unet.predict(tiny.arguments())
    for share, times in ((0.5, 2), (None, 3)):
        evict(share)
        assert all(torch.equal(unet.predict(tiny.arguments()), first) for _ in range(2))
        assert len(placed) == times

    unet._patcher.partially_unload(deep.CPU, unet._patcher.loaded_size() // 2)
    monkeypatch.setattr("comfy.model_management.load_models_gpu", lambda models, **options: placed.extend(models))
    for _ in range(2):
        unet.predict(tiny.arguments())
    assert len(placed) == 4


@pytest.fixture
def no_global_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_global_group")
@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_model_whose_blocks_are_shared_out(mode: str) -> None:
    """Its share comes back as well, and then goes home."""
    with torch.inference_mode():
        patcher = deep.PATCHERS["flux"]()
        remote = RemoteModel(deep.lora(patcher))
        model = Model(patcher.model, deep.CPU, deep.CPU)
        model.patch("LoRA", pack(remote.patches(), known=remote.known()))
        lying = {name: value.data_ptr() for name, value in patcher.model.named_parameters()}
        group = Group(0, 1, f"127.0.0.1:{open_port()}")
        owned = MODES[mode](group, (1.0,))
        first = model.predict(deep.arguments("flux"), owned)
        evict()
        assert torch.equal(model.predict(deep.arguments("flux"), owned), first)
        model.release()
        group.close()
    assert {name: value.data_ptr() for name, value in patcher.model.named_parameters()} == lying
