"""LoRA on GGUF weights in a worker: the blocks stay, no dense weight is kept, and the numbers are ComfyUI's own."""
from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from support import deep

pytest.importorskip("ray")

from residency.hooks.gguf_weights import is_gguf
from residency.hooks.gguf_weights import ops as gguf_ops
from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.parcels import Parcel, pack
from residency.policies.ray_shard.worker.models import Model, Models

CPU = deep.CPU
KEY = "diffusion_model.single_blocks.0.linear1.weight"


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    comfy.model_management.current_loaded_models.clear()


class Host:
    """A model over GGUF blocks, and what ComfyUI's own patcher, which writes dense weights, makes of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # where sums are rounded in another order
        self.patcher = deep.loaded(deep.gguf_weights(), custom_operations=gguf_ops.Ops, dtype=dtype)
        self.built = pack(RemoteModel(self.patcher).as_built())
        dense = {key: value.dequantize() if is_gguf(value) else value for key, value in deep.gguf_weights().items()}
        self.twin = deep.loaded(dense, dtype=dtype)

    def predict(self, patcher: Any, hooks: Any = None) -> torch.Tensor:
        comfy.model_management.load_models_gpu([patcher])
        patcher.pre_run()
        patcher.patch_hooks(hooks)
        answer: torch.Tensor = patcher.model._apply_model(**deep.arguments("flux in GGUF"))
        patcher.patch_hooks(None)
        patcher.detach()
        patcher.model.current_patcher = None
        comfy.model_management.current_loaded_models.clear()
        return answer

    def patches(self, patcher: Any, hooks: Any = None) -> Parcel:
        patcher.current_hooks = hooks
        remote = RemoteModel(patcher)
        try:
            parcel: Parcel = pickle.loads(pickle.dumps(pack(remote.patches(), known=remote.known())))
            return parcel
        finally:
            patcher.current_hooks = None

    def hooked(self, patcher: Any) -> tuple[Any, Any]:
        """(a clone that knows a scheduled LoRA, the group that turns it on)."""
        made, group = patcher.clone(), comfy.hooks.create_hook_lora({}, 1.0, 0.0)
        shape = patcher.model.get_parameter(KEY).shape
        change = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 0.05
        made.add_hook_patches(group.hooks[0], {KEY: ("diff", (change,))}, 1.0)
        return made, group


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    with torch.inference_mode():
        return Host(request.param)


def predicted(model: Model) -> torch.Tensor:
    return model.predict(deep.arguments("flux in GGUF"))


def layers(model: Model) -> list[Any]:
    return [layer for layer in model._model.modules() if is_gguf(getattr(layer, "weight", None))]


def held(model: Model) -> int:
    """Bytes of all tensors that its layers hold in whatever way, each once."""
    found: dict[int, int] = {}
    for module in model._model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            value = getattr(value, "_qdata", value)
            if isinstance(value, torch.Tensor):
                found[value.data_ptr()] = value.nbytes
    return sum(found.values())


def test_no_dense_weight_is_kept(host: Host, model: Model) -> None:
    """Placed with a LoRA the model holds the bytes that it was sent as, and ComfyUI has nothing to put back over blocks."""
    before = held(model)
    model.patch("lora", host.patches(deep.lora(host.patcher)))
    predicted(model)
    assert sum(layer.patch is not None for layer in layers(model)) > 5
    assert held(model) == before
    assert KEY not in model._patcher.backup


def test_a_lora_on_off_and_another_bit_for_bit(host: Host, model: Model) -> None:
    """With each strength that it is changed to, also after a release between."""
    patched = [host.patcher.clone(), deep.lora(host.patcher), deep.lora(host.patcher, 0.3)]
    expected = [host.predict(patcher) for patcher in patched]
    parcels = [host.patches(patcher) for patcher in patched]
    for turn in (1, 0, 1, 2, 1, 0, 2):
        model.patch(str(turn), parcels[turn])
        assert torch.equal(predicted(model), expected[turn])
        if turn == 2:
            model.release()
            assert torch.equal(predicted(model), expected[turn])
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert not torch.allclose(expected[1], expected[2], atol=1e-2)


@pytest.mark.parametrize("streams", [False, True])
def test_a_part_that_goes_and_comes_back_is_patched_once(host: Host, model: Model, streams: bool) -> None:
    """What ComfyUI takes off the device it streams with the LoRA in a list of its own."""
    patched = deep.lora(host.patcher)
    expected = host.predict(patched)
    model.patch("lora", host.patches(patched))
    first = predicted(model)
    model._patcher.partially_unload(CPU, 2**40)
    if not streams:
        model._patcher.partially_load(CPU, 2**40)
    made = model._apply(**_split(deep.arguments("flux in GGUF")))
    assert any(layer.weight_function for layer in layers(model)) == streams
    assert torch.equal(first, expected)
    torch.testing.assert_close(made, expected, rtol=0, atol=host.tolerance if streams else 0)


def _split(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"x": arguments.pop("x"), "arguments": arguments}


@pytest.mark.parametrize("lora", [False, True])
def test_a_scheduled_lora_comes_on_top_and_goes(host: Host, model: Model, lora: bool) -> None:
    """On, off and on, over the blocks alone and beside a LoRA of the ordinary kind."""
    patched, group = host.hooked(deep.lora(host.patcher) if lora else host.patcher)
    plain = deep.lora(host.patcher) if lora else host.patcher.clone()
    model.patch("plain", host.patches(plain))
    off = predicted(model)
    model.patch("on", host.patches(patched, group))
    on = predicted(model)
    assert not torch.allclose(off, on, atol=1e-2)
    twin, hooks = host.hooked(deep.lora(host.twin) if lora else host.twin)
    torch.testing.assert_close(on, host.predict(twin, hooks), rtol=0, atol=host.tolerance)
    for turn, hooks, expected in (("off", None, off), ("on", group, on), ("off", None, off)):
        model.patch(turn, host.patches(patched, hooks))
        assert torch.equal(predicted(model), expected)
        model.release()
        assert torch.equal(predicted(model), expected)
    model.patch("plain", host.patches(plain))
    assert torch.equal(predicted(model), off)


def test_patches_end_with_their_use(host: Host, model: Model) -> None:
    """A LoRA's weights do not outlive it."""
    model.patch("lora", host.patches(deep.lora(host.patcher)))
    predicted(model)
    gone = weakref.ref(model._patcher.patches[KEY][0][1][1][0])
    assert gone() is not None
    model.patch("plain", host.patches(host.patcher.clone()))
    predicted(model)
    gc.collect()
    assert gone() is None
    assert not any(layer.patch for layer in layers(model))


def test_a_lora_that_dynamic_vram_left_in_the_layers_stays_there(host: Host) -> None:
    """A model may be sent after ComfyUI computed with it."""
    patched = deep.lora(host.patcher)
    layer, remote = host.patcher.model.get_submodule(KEY.removesuffix(".weight")), RemoteModel(host.patcher)
    layer.weight_lowvram_function = left = comfy.model_patcher.LowVramPatch(KEY, patched.patches)
    try:
        with remote.unpaged():
            built = pack(remote.as_built())
        assert layer.weight_function[1] is left
    finally:
        layer.weight_lowvram_function = None
    made = Models(CPU, CPU)
    made.add("model", "diffusion_model", built)
    made["model"].patch("plain", host.patches(host.patcher.clone()))
    assert torch.equal(predicted(made["model"]), host.predict(host.patcher.clone()))
