"""A VAE as a worker has it: made again of what the host sent, asked with the host's own function."""
from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.utils
import pytest
import torch
from residency.hooks.remote import vae_remote_of
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker.models import Models
from support.vaes import taesd_vae

CPU = torch.device("cpu")
LATENTS = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
PIXELS = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def vae() -> Any:
    return taesd_vae()


def function_of(vae: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the host would ask for tiles."""
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(comfy.utils, "tiled_scale_multidim",
                        lambda samples, function, *args, **kwargs: found.append(function) or torch.zeros(1))
        getattr(vae, f"{way}_tiled_")(LATENTS if way == "decode" else PIXELS)
    return found[0]


def delivered(vae: Any, digest: str = "as it is") -> Any:
    """The worker's VAE."""
    remote = vae_remote_of(vae)
    assert remote is not None
    models = Models(CPU, CPU)
    with torch.inference_mode():
        models.add("vae", remote.kind, pack(remote.as_built()))
        models["vae"].patch(digest, pack(remote.patches(), known=remote.known()))
    return models["vae"]


def tile(worker: Any, vae: Any, function: Any, samples: torch.Tensor) -> torch.Tensor:
    remote = vae_remote_of(vae)
    assert remote is not None
    with torch.inference_mode():
        answer: torch.Tensor = worker.tile(pack(function, files=False, known=remote.known()), samples, 0.0)
        return answer


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_a_tile_is_the_hosts_to_the_last_bit(vae: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another VAE's is not."""
    function, samples = function_of(vae, way, monkeypatch), LATENTS if way == "decode" else PIXELS
    with torch.inference_mode():
        expected = function(samples)

    assert torch.equal(tile(delivered(vae), vae, function, samples), expected)
    assert not torch.equal(tile(delivered(taesd_vae(seed=2)), vae, function, samples), expected)


def test_it_is_asked_and_not_the_hosts(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function's VAE is the worker's, and so are its weights."""
    function = function_of(vae, "decode", monkeypatch)
    worker = delivered(vae)
    before = tile(worker, vae, function, LATENTS)
    with torch.inference_mode():
        for parameter in vae.first_stage_model.parameters():
            parameter.zero_()
        here = function(LATENTS)

    assert torch.equal(tile(worker, vae, function, LATENTS), before)
    assert not torch.equal(here, before)


def test_what_is_changed_in_the_vae_is_changed_there(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a copy of it that shares the model, as packs make them."""
    function = function_of(vae, "encode", monkeypatch)
    other = copy.copy(vae)
    other.process_input = lambda image: image * 0.5
    changed = function_of(other, "encode", monkeypatch)
    with torch.inference_mode():
        expected = changed(PIXELS)

    assert torch.equal(tile(delivered(other), other, changed, PIXELS), expected)
    assert not torch.equal(tile(delivered(vae), vae, function, PIXELS), expected)


def test_the_same_is_pickled_the_same(vae: Any) -> None:
    """So that it is sent once."""
    remote = vae_remote_of(vae)
    assert remote is not None
    assert pack(remote.patches(), known=remote.known()).data == pack(remote.patches(), known=remote.known()).data


def test_what_refers_to_the_vae_in_it_finds_the_workers(vae: Any) -> None:
    """Some of the host's estimates are closures over the VAE, and its patcher does not travel with them."""
    vae.memory_used_decode = lambda shape, dtype: vae
    worker = delivered(vae)

    assert worker._vae.memory_used_decode((1,), CPU) is worker._vae
    assert worker._vae.patcher.model is worker._vae.first_stage_model
    assert worker._vae.first_stage_model is not vae.first_stage_model


def test_what_is_patched_is_patched_there(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another digest is refused; released, its weights are as built."""
    function = function_of(vae, "decode", monkeypatch)
    plain = tile(delivered(vae), vae, function, LATENTS)
    name, weight = next((name, value) for name, value in vae.first_stage_model.state_dict().items()
                        if name.startswith("taesd_decoder") and value.ndim == 4)
    with torch.inference_mode():
        vae.patcher.add_patches({name: (torch.full_like(weight, 0.01),)})
        worker = delivered(vae, "patched")
        vae.patcher.patch_model()
        expected = function(LATENTS)

    assert torch.equal(tile(worker, vae, function, LATENTS), expected)
    assert not torch.equal(plain, expected)
    with pytest.raises(KeyError, match="patched"):
        worker.must_have("something else")
    worker.release()
    assert torch.equal(worker._vae.first_stage_model.state_dict()[name], weight)


def test_it_is_placed_anew_for_larger_tiles_only(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is room for them on the device, as the host would make it."""
    worker, function = delivered(vae), pack(1)
    placed: list[float] = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr("comfy.model_management.load_models_gpu",
                        lambda models, memory_required: placed.append(memory_required) or load(models, memory_required))
    monkeypatch.setattr("residency.policies.ray_shard.worker.models.unpack", lambda parcel, known: lambda samples: samples)
    for room in (10.0, 5.0, 10.0, 20.0):
        worker.tile(function, LATENTS, room)
    worker.release()

    assert placed == [10.0, 20.0]
