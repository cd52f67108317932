"""What is foretold of a budget is what ComfyUI's own patcher then does with it."""
from __future__ import annotations

import uuid

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residency.hooks.weights import PatcherWeights

CPU = torch.device("cpu")
ROW = 64 * 4


class Model(torch.nn.Module):
    """Linear layers with so many rows each, and weights that no layer of the host's holds."""

    def __init__(self, rows: list[int], foreign: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(comfy.ops.manual_cast.Linear(64, count, bias=False) for count in rows)
        if foreign:
            self.norm = torch.nn.LayerNorm(foreign)
        self.manual_cast_dtype = None


def patcher(rows: list[int], foreign: int = 0) -> comfy.model_patcher.ModelPatcher:
    made = comfy.model_patcher.ModelPatcher(Model(rows, foreign), CPU, CPU)
    comfy.model_management.cleanup_models()
    return made


shapes = st.lists(st.integers(1, 40), min_size=1, max_size=12)
budgets = st.lists(st.integers(-3000, 12000), min_size=1, max_size=5)


@settings(deadline=None, max_examples=150)
@given(shapes, budgets, st.integers(0, 2))
def test_the_host_loads_what_was_foreseen(rows: list[int], budgets: list[int], streams: int) -> None:
    """One budget after another, larger and smaller, whatever is on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "NUM_STREAMS", streams)
        model = patcher(rows)
        for budget in budgets:
            more = budget * 8 + 0.5
            foreseen = PatcherWeights(model).foreseen(more)
            model.partially_load(CPU, more)
            assert PatcherWeights(model).on_device() == foreseen


@settings(deadline=None, max_examples=150)
@given(shapes, st.integers(0, 120_000))
def test_a_limit_is_kept_to_the_byte_and_short_by_one_module_at_most(rows: list[int], limit: int) -> None:
    """And it is used: what else is off the device would not fit."""
    model = patcher(rows)
    load, split = model.load, limit < model.model_size()
    model.load = lambda *args, **kwargs: load(*args, **kwargs | {"full_load": False} if split else kwargs)
    for _ in range(2):
        weights = PatcherWeights(model)
        more = weights.more_for(limit) or 0.1
        assert weights.left_over(more, split) == 0
        foreseen = weights.foreseen(more, split)
        model.partially_load(CPU, more)
        held = PatcherWeights(model).on_device()
        assert held == foreseen <= limit
        assert held == model.model_size() or held > limit - max(rows) * ROW - 1024


def test_a_change_of_lora_is_foreseen() -> None:
    """Everything leaves the device first, so the budget is beside nothing."""
    model = patcher([10, 20, 30])
    model.partially_load(CPU, 40 * ROW)
    model.patches_uuid = uuid.uuid4()
    foreseen = PatcherWeights(model).foreseen(10 * ROW)
    model.partially_load(CPU, 10 * ROW)
    assert PatcherWeights(model).on_device() == foreseen


def test_the_dtype_that_a_text_encoder_computes_in_is_foreseen() -> None:
    """The host sets it as a patch of the model when it loads, and it makes streaming dearer."""
    model = patcher([30, 20, 10, 5])
    model.add_object_patch("manual_cast_dtype", torch.float64)
    foreseen = PatcherWeights(model).foreseen(50 * ROW)
    assert model.model.manual_cast_dtype is None
    model.partially_load(CPU, 50 * ROW)
    assert PatcherWeights(model).on_device() == foreseen


def test_what_stays_on_the_device_uncounted_is_known() -> None:
    """ComfyUI leaves a module there that does not fit into a smaller budget, and counts it as off; taken off, it is right."""
    model = patcher([30, 12, 10, 8])
    model.partially_load(CPU, 59.5 * ROW)
    held = PatcherWeights(model).on_device()
    more = next(more for more in range(0, 20 * ROW, 64) if PatcherWeights(model).left_over(more + 0.5))
    weights = PatcherWeights(model)
    weights.take_off()
    assert weights.on_device() == 0 < held
    assert weights.left_over(held + more) == 0
