"""Weights that a pack mapped by itself, as tensors of a class of its own, keep their mapping too."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from residency.policies.files.parameters import Homes, fingerprint, is_plain, parts, put, size
from residency.policies.files.subclasses import has_own_memory, memory, over
from residency.policies.requests import FillModule, MoveWeights, PinMemory, PinWeight, Request
from residency.telemetry.sinks import Ring
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
CPU = torch.device("cpu")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which file memory is mapped from")


class Blocks(torch.Tensor):
    """As packs have them: block bytes that look as large as the weights they stand for."""

    def __new__(cls, data: torch.Tensor, **attributes: Any) -> Blocks:
        return super().__new__(cls, data)  # type: ignore[call-arg]

    def __init__(self, data: torch.Tensor, **attributes: Any) -> None:
        super().__init__()
        self.__dict__.update(attributes)

    def detach(self) -> Blocks:
        return self

    def clone(self, *args: Any, **options: Any) -> Blocks:
        return self

    @property
    def shape(self) -> Any:
        return self.__dict__["logical"]


class Kept(nn.Parameter):
    """A parameter of a class of its own."""


def blocks(data: torch.Tensor, **attributes: Any) -> nn.Parameter:
    return nn.Parameter(Blocks(data, logical=torch.Size((4, 32)), kind=8, **attributes), requires_grad=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights with a space.gguf"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def model_of(file: Path) -> nn.Module:
    """A layer whose bytes are the file's, as `numpy.memmap` gives them: they cannot be written to."""
    leaf = nn.Linear(32, 4, bias=False)
    with torch.inference_mode():
        leaf._parameters["weight"] = blocks(torch.from_numpy(numpy.memmap(file, mode="r")[256:8448]).view(4, -1), patches=[1])
    return leaf


@pytest.fixture
def homes(house: Any) -> Homes:
    found: Homes = house.policy._offloader._homes
    return found


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_which_tensors_have_memory_of_their_own() -> None:
    """Subclasses that are no wrappers, in a parameter or not."""
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (4,), dtype=torch.int8)  # type: ignore[attr-defined]

    assert has_own_memory(Blocks(torch.ones(4)))
    assert has_own_memory(blocks(torch.ones(4)))
    assert has_own_memory(Kept(torch.ones(4)))
    assert not any(map(has_own_memory, (torch.ones(4), nn.Parameter(torch.ones(4)), wrapper, None, "text",
                                        Blocks(torch.empty(4, device="meta")))))


def test_the_memory_is_an_ordinary_tensor_of_its_real_shape() -> None:
    """Whatever the class says."""
    data = torch.arange(136, dtype=torch.uint8).view(4, 34)
    parameter = blocks(data)

    assert (4, 32) == parameter.shape
    assert is_plain(memory(parameter))
    assert (data.data_ptr(), data.shape) == (memory(parameter).data_ptr(), memory(parameter).shape)
    assert [data.data_ptr()] == [part.data_ptr() for part in parts(parameter)]
    assert 136 == size(parameter)
    assert fingerprint(data) == fingerprint(parameter)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", [Kept, blocks])
def test_other_memory_gets_the_class_and_the_attributes(kind: Any, inside: bool) -> None:
    """Those that the tensor has now, and it stays a parameter; in and out of inference mode."""
    parameter = kind(torch.ones(4, 34, dtype=torch.uint8), **({} if kind is blocks else {"requires_grad": False}))
    parameter.patches = ["a LoRA"]
    with torch.inference_mode():
        other = torch.zeros(4, 34, dtype=torch.uint8)

    with torch.inference_mode(inside):
        made = over(other, parameter)
        leaf = nn.Linear(2, 2)
        leaf._parameters["weight"] = parameter
        put(leaf, "weight", other)

    for found in (made, leaf.weight):
        assert type(parameter) is type(found)
        assert isinstance(found, nn.Parameter)
        assert ["a LoRA"] == found.patches  # type: ignore[comparison-overlap]
        assert parameter.shape == found.shape
        assert memory(found).data_ptr() == other.data_ptr()
    assert 1 == memory(parameter).max()


@linux
def test_what_a_pack_mapped_is_at_home_in_its_file(house: Any, homes: Homes, file: Path, weights_of: Any, ring: Ring) -> None:
    """It is found by the system's list of mappings, and the pack is told to leave it there."""
    leaf = model_of(file)
    weights = weights_of(leaf)

    house.ask(MoveWeights(weights, CPU))

    (home,) = homes.get(leaf).values()
    assert weights.stays_mapped
    assert str(file) == home.file.path
    assert home.fits(leaf.weight)
    assert memory(leaf.weight).data_ptr() == home.tensor.data_ptr()
    (event,) = ring.named("weights.mapped")
    assert (file.name, 8192, 0) == tuple(event.fields[name] for name in ("file", "bytes", "copied_bytes"))
    assert house.mapped(memory(leaf.weight))


@linux
def test_what_went_home_is_the_packs_tensor_over_the_mapping(house: Any, homes: Homes, file: Path, weights_of: Any) -> None:
    """The attributes are those that it had on the device, and writes there are seen by its bytes."""
    leaf = model_of(file)
    house.ask(MoveWeights(weights_of(leaf), CPU))
    (home,) = homes.get(leaf).values()
    leaf._parameters["weight"] = blocks(memory(leaf.weight).clone(), patches=["a LoRA"])  # as it is on a device
    assert home.fits(leaf.weight)
    assert fingerprint(home.tensor) == fingerprint(leaf.weight)
    memory(leaf.weight)[3, 7] += 1
    assert fingerprint(home.tensor) != fingerprint(leaf.weight)

    put(leaf, "weight", home.tensor)

    assert ["a LoRA"] == leaf.weight.patches
    assert house.mapped(memory(leaf.weight))


@linux
def test_a_file_is_given_back_with_the_model(house: Any, file: Path, weights_of: Any) -> None:
    """Nothing of ours keeps a pack's mapping."""
    leaf = model_of(file)
    house.ask(MoveWeights(weights_of(leaf), CPU))
    assert [str(file)] == [each.path for each in house.bank.live()]

    del leaf

    assert [] == house.bank.live()
    house.policy.prompt_ended()
    assert str(file) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("where", ["private", "deleted", "untold"])
def test_what_nobody_can_name_is_the_packs(house: Any, homes: Homes, file: Path, weights_of: Any, where: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Private memory, a file that is gone, and a system without a list of mappings: the pack does as it does alone."""
    leaf = model_of(file)
    if where == "private":
        leaf._parameters["weight"] = blocks(torch.ones(4, 34, dtype=torch.uint8))
    elif where == "deleted":
        file.unlink()
    else:
        monkeypatch.setattr("builtins.open", lambda *args, **options: (_ for _ in ()).throw(FileNotFoundError()))
    weights = weights_of(leaf)

    assert "host" == house.ask(MoveWeights(weights, CPU))

    assert {} == homes.get(leaf)
    assert not weights.stays_mapped


@linux
def test_it_is_neither_copied_nor_page_locked(house: Any, file: Path, weights_of: Any) -> None:
    """The host page-locks tensors of its own kinds only, so a copy for that would be for nothing."""
    leaf = model_of(file)
    house.ask(MoveWeights(weights_of(leaf), CPU))

    assert house.policy.decide(PinWeight(weights_of(leaf), "weight")) is None
    assert house.ask(PinMemory(leaf.weight)) is False


def test_a_state_dict_with_a_packs_tensors_is_for_the_packs_layers(house: Any, save: Any) -> None:
    """Even with tensors in it that we mapped: a tokenizer beside the weights."""
    state_dict = {**house.read(save(bias=torch.ones(4))), "weight": Blocks(torch.ones(4, 32), logical=(4, 32))}
    module, asked = nn.Linear(32, 4), list[Request]()

    house.ask(FillModule(module, state_dict, False, lambda leaf: False, lambda leaf: None), asked.append)
    house.build(module, state_dict)

    assert state_dict is asked[0].state_dict  # type: ignore[attr-defined]
    assert torch.equal(torch.ones(4), module.bias)
