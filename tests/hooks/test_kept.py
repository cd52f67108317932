"""A loader's answer, kept: real patchers of the host over tiny modules."""
from __future__ import annotations

import gc
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from residency.hooks import devices, kept
from residency.policies.files.bank import Bank
from residency.policies.memory import Residency

CPU = torch.device("cpu")


class Model(torch.nn.Module):
    """Two layers, under the names that LoRA patches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(32, 32)
        self.second = torch.nn.Linear(32, 4, bias=False)
        self.device = CPU


def patcher() -> Any:
    with torch.inference_mode():
        return comfy.model_patcher.ModelPatcher(Model(), load_device=CPU, offload_device=CPU)


def vae() -> Any:
    made = object.__new__(comfy.sd.VAE)
    made.patcher = patcher()
    made.first_stage_model, made.device = made.patcher.model, CPU
    return made


def keep(answer: Any) -> kept.Kept:
    found = kept.keep(answer, Bank())
    assert found is not None
    return found


def test_what_is_lent_shares_the_weights_and_nothing_else() -> None:
    """Patches of one user are not another's."""
    one = keep(patcher())
    first, second = one.lend(), one.lend()
    assert first is not second
    assert first.model is second.model
    first.add_patches({"first.weight": ("diff", (torch.ones(32, 32),))})
    assert second.patches == {}
    assert one.lend().patches == {}


def test_a_vae_is_copied_as_the_hosts_device_node_copies_it() -> None:
    """It has no clone; what a pack sets on one is not on another."""
    one = keep(vae())
    first, second = one.lend(), one.lend()
    first.device = "another"
    assert second.device == CPU
    assert first.patcher is not second.patcher
    assert first.first_stage_model is second.first_stage_model


def test_a_checkpoint_is_lent_part_by_part() -> None:
    """What it did not give stays None; nodes get a tuple of their own."""
    (model, nothing, decoder, none) = keep((patcher(), None, vae(), None)).lend()
    assert (nothing, none) == (None, None)
    assert isinstance(model, comfy.model_patcher.ModelPatcher)
    assert isinstance(decoder, comfy.sd.VAE)


@pytest.mark.parametrize("answer", [None, (None, None), "text", (patcher, "text"), object()])
def test_what_cannot_be_copied_is_not_kept(answer: Any) -> None:
    """It is handed on as it is."""
    assert kept.keep(answer, Bank()) is None


def test_it_is_in_use_while_a_clone_of_a_clone_lives() -> None:
    """A LoRA's node clones what it was given, and drops that."""
    one = keep(patcher())
    lent = one.lend()
    chained = lent.clone()
    del lent
    gc.collect()
    assert one.in_use()
    del chained
    gc.collect()
    assert not one.in_use()


def test_a_model_of_its_own_is_made_without_the_cache() -> None:
    """Stand-ins and copies for other devices are loaded by the host's factory, which would otherwise come back to us."""
    seen = []

    def factory(path: str, disable_dynamic: bool = False) -> str:
        seen.append((path, disable_dynamic, kept.wanted_alone()))
        return path

    root = patcher()
    root.cached_patcher_init = (factory, ("a",), 0)
    lent = keep(root).lend()
    assert lent.cached_patcher_init[0](*lent.cached_patcher_init[1], disable_dynamic=True) == "a"
    assert (seen, kept.wanted_alone()) == ([("a", True, True)], False)
    assert lent.cached_patcher_init[2] == 0


class TestAltered:
    """What a pack did to the shared model, which ComfyUI alone would have dropped."""

    def test_nothing_happened(self) -> None:
        """Lending and loading change nothing."""
        one = keep(patcher())
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([one.lend()])
        assert one.altered() is None

    def test_a_lora_that_is_on_is_no_change(self) -> None:
        """Its originals are in the host's backup."""
        one = keep(patcher())
        lent = one.lend()
        lent.add_patches({"first.weight": ("diff", (torch.ones(32, 32),))})
        with torch.inference_mode():
            lent.patch_model(CPU)
            assert float(lent.model.first.weight.sum()) != 0
            assert one.altered() is None
            lent.unpatch_model(CPU)
        assert one.altered() is None

    def test_a_weight_that_was_widened_is_the_same(self) -> None:
        """Its values are."""
        root = patcher()
        root.model.second.weight.data = root.model.second.weight.data.to(torch.bfloat16)
        one = keep(root)
        root.model.second.weight.data = root.model.second.weight.data.float()
        assert one.altered() is None

    def test_a_weight_that_was_written_to(self) -> None:
        """In place, as merging and quantising packs do."""
        one = keep(patcher())
        with torch.inference_mode():
            one.modules()[0].get_parameter("second.weight").mul_(1.5)
        assert one.altered() == "another pack changed the weight 0.second.weight.0"

    def test_a_note_that_a_pack_left_on_the_model(self) -> None:
        """Where its weights are to go, for instance, which is not the next loader's wish."""
        one = keep(patcher())
        one.modules()[0]._allocation = "cuda:1,4gb"
        assert one.altered() == "another pack set _allocation on it"

    @pytest.mark.parametrize("change", [
        lambda model: setattr(model.first, "forward", lambda x: x),
        lambda model: setattr(model, "second", torch.nn.Identity()),
        lambda model: model.first.register_forward_pre_hook(lambda module, args: None),
        lambda model: setattr(model, "third", torch.nn.Linear(1, 1)),
    ])
    def test_layers_that_were_replaced_or_hung_upon(self, change: Any) -> None:
        """A forward of its own, another class, a hook, one more layer."""
        one = keep(patcher())
        change(one.modules()[0])
        assert one.altered() == "another pack changed its layers"


def test_bytes_are_counted_by_residency() -> None:
    """Buffers too; page-locked ones apart."""
    one = keep(patcher())
    model = one.modules()[0]
    model.register_buffer("table", torch.zeros(10))
    size = (32 * 32 + 32 + 32 * 4 + 10) * 4
    assert one.residency() == {Residency.HOST: size}
    pointer = model.get_parameter("first.weight").data_ptr()
    comfy.model_management.PINNED_MEMORY[pointer] = 4096
    try:
        assert one.residency() == {Residency.HOST: size - 4096, Residency.PINNED: 4096}
    finally:
        del comfy.model_management.PINNED_MEMORY[pointer]


def test_it_follows_the_hosts_devices_only_where_it_had_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that the user chose on the node stays."""
    chosen = patcher()
    chosen.load_device = torch.device("meta")
    followed, stays, decoder = keep(patcher()), keep(chosen), keep(vae())
    monkeypatch.setattr(devices, "role", lambda kind: ("there", "here"))
    for one in (followed, stays, decoder):
        one.follow_devices()
    assert (followed.lend().load_device, followed.lend().offload_device) == ("there", "here")
    assert stays.lend().load_device == torch.device("meta")
    assert decoder.lend().device == "there"
