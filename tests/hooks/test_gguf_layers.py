"""Layers over GGUF blocks compute what the host's layers compute with the same weights dequantised."""
from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.ops
import comfy.utils
import gguf
import numpy
import pytest
import torch
from residency.hooks import HookRegistry, all_hooks
from residency.hooks.gguf_weights import is_gguf, keeps_file_format, weighted
from residency.hooks.gguf_weights import ops as gguf_ops
from residency.hooks.gguf_weights.layout import wrap
from residency.hooks.weights import PatcherWeights
from residency.policies.files.bank import Bank
from residency.policies.requests import PatchWeight, Request, WriteInPlace
from safetensors.torch import load_file

Ops = gguf_ops.Ops
CPU = torch.device("cpu")
ROWS, COLUMNS = 8, 64
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def blocks(seed: int = 1, rows: int = ROWS) -> torch.Tensor:
    """Q8_0 weights, as they come from a file."""
    array = numpy.random.default_rng(seed).standard_normal((rows, COLUMNS), dtype=numpy.float32)
    return wrap(torch.from_numpy(gguf.quants.quantize(array, Q8_0)), int(Q8_0), (rows, COLUMNS))


class Model(torch.nn.Module):
    """One linear layer, in a model that the host can patch."""

    def __init__(self, ops: Any, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.layer = ops.Linear(COLUMNS, ROWS, dtype=dtype)
        self.device = CPU
        self.load_state_dict({"layer.weight": weight, "layer.bias": torch.arange(ROWS, dtype=torch.float32)}, strict=True)


def pair(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """The host's patchers of a model over blocks, and of one over the same weights dequantised."""
    ours, theirs = Model(Ops, blocks(), dtype), Model(comfy.ops.manual_cast, blocks().dequantize(), dtype)
    return tuple(comfy.model_patcher.ModelPatcher(model, CPU, CPU) for model in (ours, theirs))  # type: ignore[return-value]


def lora(seed: int = 3) -> dict[str, Any]:
    """A difference for the layer's weight."""
    return {"layer.weight": ("diff", (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)),))}


def run(patcher: Any, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return patcher.model.layer(torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).to(dtype))  # type: ignore[no-any-return]


@pytest.fixture
def live() -> Iterator[None]:
    """The hooks on writes and patches, answered as zero_copy answers them."""

    class Listener:
        chain = None

        def prompt_starts(self) -> None: ...

    def answer(request: Request, host: Any) -> Any:
        if isinstance(request, PatchWeight):
            return request.at_use()
        if isinstance(request, WriteInPlace) and request.beside is not None:
            return request.beside()
        return host(request)

    hooks = [hook for hook in all_hooks(Bank(), Listener()) if hook.asks in (PatchWeight, WriteInPlace)]
    registry = HookRegistry(hooks, answer)
    registry.sync({PatchWeight, WriteInPlace})
    yield
    registry.remove_all()


class TestFilling:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("inference", [True, False])
    def test_blocks_compute_what_dense_weights_compute(self, dtype: torch.dtype, inference: bool) -> None:
        """To the bit, in every dtype, in and out of inference mode."""
        with torch.inference_mode(inference):
            ours, theirs = pair(dtype)

            assert torch.equal(run(theirs, dtype), run(ours, dtype))
        assert is_gguf(ours.model.layer.weight)

    def test_a_weight_is_rounded_to_the_models_dtype_first(self) -> None:
        """Text encoders hold float16 and compute in float32."""
        ours, theirs = pair(torch.float16)

        assert torch.equal(run(theirs, torch.float32), run(ours, torch.float32))

    def test_blocks_are_those_of_the_file(self) -> None:
        """No copy is made of them, in inference mode or outside."""
        weight: Any = blocks()
        model = Model(Ops, weight)

        assert weight._qdata.data_ptr() == model.layer.weight.data_ptr()

    def test_what_is_absent_is_missing_and_zero(self) -> None:
        """As torch says it, and a layer that can still run."""
        layer = Ops.Linear(COLUMNS, ROWS, dtype=torch.bfloat16)

        assert ["weight", "bias"] == layer.load_state_dict({}, strict=False).missing_keys
        assert not layer(torch.ones(1, COLUMNS, dtype=torch.bfloat16)).any()

    def test_a_layer_without_a_bias_has_none(self) -> None:
        """And says so where the file has one."""
        layer = Ops.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)

        keys = layer.load_state_dict({"weight": blocks(), "bias": torch.ones(ROWS), "other": torch.ones(1)}, strict=False)

        assert ["bias", "other"] == keys.unexpected_keys
        assert layer.bias is None

    def test_a_wrong_shape_names_both(self) -> None:
        """The user sees which file is for another model."""
        layer = Ops.Linear(COLUMNS, ROWS, dtype=torch.bfloat16)

        with pytest.raises(RuntimeError, match=r"weight is \(9, 64\) in the file, and \(8, 64\) in the model"):
            layer.load_state_dict({"weight": blocks(rows=ROWS + 1), "bias": torch.ones(ROWS)})

    def test_a_plain_weight_of_the_models_dtype_is_the_hosts_to_patch(self) -> None:
        """Only a weight in the file's format has functions for the host's patches."""
        kept, plain = Model(Ops, blocks()).layer, Model(Ops, torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16)).layer

        assert (True, False) == (keeps_file_format(kept), keeps_file_format(plain))
        for name in ("convert_weight", "set_weight"):
            assert hasattr(kept, name)
            assert not hasattr(plain, name)

    def test_a_scaled_fp8_weight_becomes_dense(self) -> None:
        """Another text encoder may stand beside a GGUF file."""
        narrow = torch.ones(ROWS, COLUMNS).to(torch.float8_e4m3fn)
        layer = Ops.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)

        layer.load_state_dict({"weight": narrow, "weight_scale": torch.tensor(3.0)}, strict=False)

        assert torch.equal(torch.full((ROWS, COLUMNS), 3, dtype=torch.bfloat16), layer.weight)


class TestCompiling:
    def test_a_compiler_takes_layers_of_several_types(self) -> None:
        """Whose tables are constants of one graph."""
        kinds = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q5_1", "MXFP4")]
        array = numpy.random.default_rng(1).standard_normal((COLUMNS, COLUMNS), dtype=numpy.float32) / 8
        layers = torch.nn.Sequential(*(Ops.Linear(COLUMNS, COLUMNS, bias=False, dtype=torch.bfloat16) for _ in kinds))
        packed = [torch.from_numpy(gguf.quants.quantize(array, kind)) for kind in kinds]
        layers.load_state_dict({f"{index}.weight": wrap(blocks, int(kind), array.shape)
                                for index, (kind, blocks) in enumerate(zip(kinds, packed, strict=True))})
        numbers = torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).bfloat16()

        with torch.inference_mode():
            expected = layers(numbers)
            compiled = torch.compile(layers, backend="aot_eager")(numbers)

        assert torch.equal(expected, compiled)
        assert expected.std() > 0.01


class TestMoving:
    def test_a_move_takes_the_bytes_along(self) -> None:
        """Torch's own `to` would move the wrapper only."""
        model = Model(Ops, blocks())

        model.to("meta")

        assert (True, True) == (model.layer.weight._qdata.is_meta, model.layer.bias.is_meta)

    def test_a_move_to_where_it_is_changes_no_parameter(self) -> None:
        """A mapping stays one."""
        model = Model(Ops, blocks())
        before = model.layer.weight

        model.to(CPU)

        assert before is model.layer.weight

    def test_a_layer_dies_at_once(self) -> None:
        """It is in no reference cycle, so its memory is free when the host lets go."""
        model = Model(Ops, blocks())
        gone = weakref.ref(model.layer)
        gc.disable()
        try:
            run(comfy.model_patcher.ModelPatcher(model, CPU, CPU))
            del model
            assert gone() is None
        finally:
            gc.enable()


class TestPatching:
    def test_a_lora_is_added_as_the_host_adds_it(self, live: None) -> None:
        """The blocks stay, and the result is that of the dequantised twin."""
        ours, theirs = pair()
        for patcher in (ours, theirs):
            patcher.add_patches(lora(), 0.7)
            patcher.patch_model(CPU)

        assert torch.equal(run(theirs), run(ours))
        assert is_gguf(ours.model.layer.weight)

    def test_a_lora_is_applied_once_however_the_weights_stream(self, live: None) -> None:
        """Loaded, then partly unloaded, then loaded again."""
        ours, theirs = pair()
        for patcher in (ours, theirs):
            patcher.add_patches(lora())
            patcher.patch_model(CPU)
            patcher.partially_unload(CPU, 2**30)
        assert ours.model.layer.weight_function
        assert torch.allclose(run(theirs), run(ours), rtol=0.02)

        for patcher in (ours, theirs):
            patcher.partially_load(CPU, 2**30)
        assert not ours.model.layer.weight_function
        assert torch.equal(run(theirs), run(ours))

    def test_a_lora_ends_with_the_patches_of_the_host(self, live: None) -> None:
        """Even where nobody told the layer: its policy may be off by then."""
        ours, theirs = pair()
        plain = run(theirs)
        ours.add_patches(lora())
        ours.patch_model(CPU)
        assert not torch.equal(plain, run(ours))

        ours.unpatch_model(CPU)

        assert torch.equal(plain, run(ours))

    def test_the_next_lora_takes_the_place_of_the_last(self, live: None) -> None:
        """Clones share one model."""
        ours, theirs = pair()
        for seed in (3, 4):
            outputs = []
            for patcher in (ours, theirs):
                clone = patcher.clone()
                clone.add_patches(lora(seed))
                clone.partially_load(CPU, 2**30)
                outputs.append(run(clone))
            assert torch.equal(*outputs)

    def test_layers_forget_patches_that_ended(self, live: None) -> None:
        """A LoRA's weights do not outlive it."""
        ours, _ = pair()
        ours.add_patches(lora())
        ours.patch_model(CPU)

        PatcherWeights(ours).end_patches()

        assert ours.model.layer.patch is None

    def test_without_the_hooks_the_hosts_patch_is_undone_too(self) -> None:
        """The dense weight is kept beside the blocks until the host puts its backup back."""
        ours, theirs = pair()
        plain = run(theirs)
        for patcher in (ours, theirs):
            patcher.add_patches(lora())
            patcher.patch_model(CPU)
        assert torch.equal(run(theirs), run(ours))

        ours.unpatch_model(CPU)

        assert torch.equal(plain, run(ours))


class TestKeepingDense:
    """A weight that stays on the device may stay dense there."""

    SIZE = ROWS * COLUMNS * 2

    @pytest.fixture
    def patcher(self) -> Any:
        with torch.inference_mode():  # as the host builds models
            ours, _ = pair()
        room = PatcherWeights(ours).dense_room()
        assert room is not None
        room.resize(self.SIZE)
        return ours

    def held(self, patcher: Any) -> int:
        return patcher.model.layer.room.held  # type: ignore[no-any-return]

    @torch.inference_mode()
    def test_it_is_found_at_the_next_use(self, patcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the same result, and without being dequantised."""
        first = run(patcher)
        assert self.held(patcher) == self.SIZE
        monkeypatch.setattr(weighted, "dense", None)

        assert torch.equal(first, run(patcher))

    @torch.inference_mode()
    @pytest.mark.parametrize("room", [SIZE - 1, 0])
    def test_it_goes_where_there_is_no_room(self, patcher: Any, room: int) -> None:
        first = run(patcher)
        PatcherWeights(patcher).dense_room().resize(room)  # type: ignore[union-attr]

        assert self.held(patcher) == 0
        assert torch.equal(first, run(patcher))
        assert self.held(patcher) == 0

    @torch.inference_mode()
    def test_a_lora_is_added_once(self, live: None, patcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kept weight has it; without it, or with another, the weight is made anew."""
        _, theirs = pair()
        plain = run(patcher)
        for seed in (3, 4):
            for each in (patcher, theirs):
                each.unpatch_model(CPU)
                each.patches.clear()
                each.add_patches(lora(seed))
                each.patch_model(CPU)
            expected = run(theirs)
            assert torch.equal(expected, run(patcher))
            with monkeypatch.context() as patch:
                patch.setattr(weighted, "dense", None)
                assert torch.equal(expected, run(patcher))
        patcher.unpatch_model(CPU)

        assert torch.equal(plain, run(patcher))
        assert self.held(patcher) == self.SIZE

    @torch.inference_mode()
    def test_it_goes_with_the_blocks(self, patcher: Any) -> None:
        """When they leave the device, and when the host drops what it keeps for one."""
        for leave in (lambda: patcher.model.to("meta"), PatcherWeights(patcher).drop_dense):
            run(patcher)
            assert self.held(patcher) == self.SIZE
            leave()
            assert self.held(patcher) == 0
            if patcher.model.layer.weight.is_meta:
                patcher.model.load_state_dict({"layer.weight": blocks(), "layer.bias": torch.ones(ROWS)})

    @torch.inference_mode()
    def test_what_a_hook_writes_is_used_in_its_place(self, live: None, patcher: Any) -> None:
        before, written = run(patcher), torch.randn(ROWS, COLUMNS)
        comfy.utils.copy_to_param(patcher.model, "layer.weight", written)

        assert not torch.equal(before, run(patcher))

    def test_outside_of_inference_mode_nothing_is_kept(self, patcher: Any) -> None:
        """A tensor of one mode is not one of the other."""
        run(patcher)

        assert self.held(patcher) == 0

    def test_a_model_of_numbers_has_no_room(self) -> None:
        _, theirs = pair()
        assert PatcherWeights(theirs).dense_room() is None


class TestDynamicPatching:
    """With dynamic VRAM the host gives a layer its LoRA as a function, and would quantise the patched weight anew."""

    def patched(self, patcher: Any, functions: list[Any]) -> Any:
        """As `ModelPatcherDynamic.load` leaves a layer."""
        layer = patcher.model.layer
        patcher.add_patches(lora())
        layer.weight_lowvram_function = comfy.model_patcher.LowVramPatch("layer.weight", patcher.patches)
        layer.weight_function = functions
        return layer

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_lora_on_blocks_runs_at_each_use(self, dtype: torch.dtype) -> None:
        """After which come the host's other functions; what it is added to is the model's dtype, also where that is narrower
        than the one computed in."""
        ours, theirs = pair()
        for functions in ([], [lambda weight: weight * 2]):
            layer = self.patched(ours, functions)
            assert layer.weight_lowvram_function is None
            theirs.model.layer.weight_function = [comfy.model_patcher.LowVramPatch("layer.weight", ours.patches), *functions]

            for _ in range(2):
                assert torch.equal(run(theirs, dtype), run(ours, dtype))
            ours.patches.clear()

    def test_the_lora_is_gone_when_the_host_takes_it(self) -> None:
        ours, theirs = pair()
        layer = self.patched(ours, [])

        layer.weight_lowvram_function = None

        assert torch.equal(run(theirs), run(ours))

    def test_a_lora_on_numbers_is_the_hosts(self) -> None:
        """It can keep a patched weight of these, in the model's dtype."""
        patcher = comfy.model_patcher.ModelPatcher(Model(Ops, torch.ones(ROWS, COLUMNS)), CPU, CPU)
        layer = self.patched(patcher, [])

        assert layer.weight_lowvram_function.key == "layer.weight"
        assert layer.weight_function == []
        assert (layer.weight_comfy_model_dtype, layer.bias_comfy_model_dtype) == (torch.bfloat16, torch.bfloat16)


class TestWriting:
    @pytest.mark.parametrize("weight", [blocks(), torch.randn(ROWS, COLUMNS)], ids=["blocks", "another dtype"])
    def test_a_written_weight_is_used_until_the_files_is_back(self, live: None, weight: torch.Tensor) -> None:
        """What a scheduled hook writes stands beside the file's weight."""
        model = Model(Ops, weight)
        patcher = comfy.model_patcher.ModelPatcher(model, CPU, CPU)
        own, before, written = model.layer.weight, run(patcher), torch.randn(ROWS, COLUMNS)
        backup = own.to(device=CPU, copy=True)

        comfy.utils.copy_to_param(model, "layer.weight", written)
        assert own is model.layer.weight
        expected = torch.nn.functional.linear(torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).bfloat16(),
                                              written.bfloat16(), model.layer.bias)
        assert torch.equal(expected, run(patcher))

        comfy.utils.copy_to_param(model, "layer.weight", backup)
        assert model.layer.written is None
        assert torch.equal(before, run(patcher))

    def test_a_scheduled_hook_comes_on_top_of_the_models_lora(self, live: None) -> None:
        """Where the weights are loaded, and where they stream."""
        ours, theirs = pair(torch.float32)
        hooked = ("diff", (torch.randn(ROWS, COLUMNS),))
        for patcher in (ours, theirs):
            patcher.add_patches(lora())
            patcher.patch_model(CPU)
            patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
            key = "layer.weight"
            patcher.patch_hook_weight_to_device(None, {key: [(1.0, hooked, 1.0, None, None)]}, key, {key: []}, None)
        expected = run(theirs, torch.float32)
        torch.testing.assert_close(expected, run(ours, torch.float32))

        ours.partially_unload(CPU, 2**30)
        torch.testing.assert_close(expected, run(ours, torch.float32))


class TestSaving:
    @pytest.mark.parametrize("patched", [True, False])
    @pytest.mark.parametrize("loaded", [True, False])
    def test_a_model_is_saved_dense(self, live: None, tmp_path: Path, patched: bool, loaded: bool) -> None:
        """With its LoRA, as the host saves the dequantised twin."""
        saved = []
        for index, patcher in enumerate(pair()):
            if patched:
                patcher.add_patches(lora())
            patcher.patch_model(CPU, lowvram_model_memory=0 if loaded else 1)
            path = str(tmp_path / f"{index}.safetensors")
            comfy.utils.save_torch_file(patcher.model_state_dict_for_saving(), path)
            saved.append(load_file(path))

        assert list(saved[0]) == list(saved[1])
        assert torch.equal(saved[0]["layer.weight"], saved[1]["layer.weight"])

    def test_a_state_dict_costs_no_memory(self) -> None:
        """The host asks for it to learn names and sizes."""
        model = Model(Ops, blocks())
        value: Any = model.state_dict()["layer.weight"]

        assert model.layer.weight.data_ptr() == value.data_ptr()
        assert value.nbytes == ROWS * COLUMNS // 32 * 34


class TestEmbedding:
    def pair(self, rows: int = ROWS) -> tuple[Any, Any]:
        ours, theirs = Ops.Embedding(ROWS, COLUMNS, dtype=torch.float16), comfy.ops.manual_cast.Embedding(ROWS, COLUMNS,
                                                                                                          dtype=torch.float16)
        ours.load_state_dict({"weight": blocks(rows=rows)})
        dense = torch.zeros(ROWS, COLUMNS)
        dense[:rows] = blocks(rows=rows).dequantize()
        theirs.load_state_dict({"weight": dense})
        return ours, theirs

    @pytest.mark.parametrize("rows", [ROWS, ROWS - 2])
    @pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("altered", [False, True])
    def test_rows_are_those_of_the_dense_table(self, monkeypatch: pytest.MonkeyPatch, rows: int, out_dtype: Any,
                                               altered: bool) -> None:
        """All of them, twice the same, and those that the file leaves out; by rows, and where somebody altered the weight."""
        monkeypatch.setattr(gguf_ops, "SMALL", 1)
        ours, theirs = self.pair(rows)
        if altered:
            ours.write(ours.weight.dequantize())
        tokens = torch.tensor([[0, 3, 3], [ROWS - 1, 1, 5]])

        found, expected = ours(tokens, out_dtype=out_dtype), theirs(tokens, out_dtype=out_dtype)

        assert expected.dtype == found.dtype
        assert torch.equal(expected, found)
