"""Where a parameter's bytes are at home, and what happens to a mapping that is written to or pinned."""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residency.policies.files import pages
from residency.policies.files.bank import Bank
from residency.policies.files.parameters import Home, Homes, fingerprint, is_plain, parts, put
from residency.policies.memory import Residency
from residency.policies.requests import (
    MoveModule,
    MoveWeights,
    OffloadPart,
    OffloadWeights,
    PinMemory,
    PinWeight,
    WriteInPlace,
)
from residency.telemetry.sinks import Ring
from torch import nn

Save = Callable[..., str]
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
          torch.uint8, torch.int16, torch.int64, torch.bool]


class Scaled(torch.Tensor):
    """A quantised weight as packs make them: a wrapper of bytes and scales that looks like bfloat16."""

    bulk: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, bulk: torch.Tensor, scale: torch.Tensor) -> Scaled:
        wrapper = torch.Tensor._make_wrapper_subclass(cls, bulk.shape, dtype=torch.bfloat16, device=bulk.device)
        wrapper.bulk, wrapper.scale = bulk, scale
        return wrapper  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["bulk", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].bulk, args[0].scale)
        raise NotImplementedError(func)


class Opaque(Scaled):
    """A wrapper that does not tell its parts."""

    @property
    def __tensor_flatten__(self) -> Any:
        raise AttributeError


def value(tensor: torch.Tensor) -> int:
    mark = fingerprint(tensor)
    assert mark is not None
    return mark


def raw(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Random elements of any dtype, by their bytes."""
    if dtype is torch.bool:
        return torch.randint(0, 2, (size,)).bool()
    return torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 7, 8, 33])
def test_a_fingerprint_changes_with_any_bit_of_any_element(dtype: torch.dtype, size: int) -> None:
    """Odd byte counts, eight-bit floats and the sign of zero included."""
    tensor = raw(size, dtype)
    before = value(tensor)
    assert value(tensor.clone()) == before
    flat = tensor.view(torch.uint8)
    for at in range(flat.numel()):
        for bit in (1, 128):
            if dtype is torch.bool and bit == 128:
                continue
            flat[at] ^= bit
            assert value(tensor) != before
            flat[at] ^= bit
    assert value(tensor) == before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=70), st.data())
def test_a_fingerprint_changes_with_any_single_change(content: list[int], data: st.DataObject) -> None:
    """Whatever the bytes and however many."""
    tensor = torch.tensor(content, dtype=torch.uint8)
    at, new = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
    before = value(tensor)
    changed = tensor.clone()
    changed[at] = new
    assert (value(changed) == before) == (new == content[at])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_change_that_follows_a_pattern_is_seen(dtype: torch.dtype) -> None:
    """The sign of any row or column, or of everything, and exchanged rows and columns: plain sums would cancel."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = fingerprint(weight)
    changed = [-weight, weight.flip(0), weight.flip(1), weight.roll(1, 0)]
    for index in range(256):
        changed += [weight.clone(), weight.clone()]
        changed[-2][index] *= -1
        changed[-1][:, index] *= -1

    assert all(fingerprint(tensor) != before for tensor in changed)


def test_a_fingerprint_does_not_depend_on_where_the_bytes_are() -> None:
    """A view that begins in the middle of a word has the fingerprint of its copy."""
    for dtype in (torch.bfloat16, torch.int8, torch.float32):
        base = raw(40, dtype)
        for start in range(5):
            view = base[start:start + 32]
            assert value(view) == value(view.clone())


def test_a_fingerprint_takes_scalars_empty_tensors_and_parameters() -> None:
    """Shapes do not matter."""
    assert value(torch.tensor(3, dtype=torch.int64)) == value(torch.tensor([3], dtype=torch.int64))
    assert fingerprint(torch.empty(0)) is None
    assert value(nn.Parameter(torch.tensor(3, dtype=torch.int64), requires_grad=False)) == value(torch.tensor(3))
    with torch.inference_mode():
        inside = value(torch.tensor([1, 2], dtype=torch.int64))
    assert inside == value(torch.tensor([1, 2], dtype=torch.int64))


def test_a_fingerprint_is_not_taken_where_it_cannot_be() -> None:
    """A transposed view, and a wrapper that does not tell its parts."""
    assert fingerprint(torch.ones(4, 3).t()) is None
    assert fingerprint(Opaque(torch.ones(4, dtype=torch.int8), torch.ones(1))) is None


def test_the_fingerprint_of_a_wrapper_sees_all_its_parts() -> None:
    """Bytes and scales, and which is which."""
    bulk, scale = raw(32, torch.int8), torch.ones(1)
    before = value(Scaled(bulk, scale))
    assert value(nn.Parameter(Scaled(bulk, scale), requires_grad=False)) == before
    assert value(Scaled(bulk, scale * 2)) != before
    other = bulk.clone()
    other[5] += 1
    assert value(Scaled(other, scale)) != before
    assert value(Scaled(bulk, other)) != value(Scaled(other, bulk))


def test_what_is_plain_and_what_is_not() -> None:
    """Dense tensors and parameters, not what packs derive from them."""
    assert is_plain(torch.ones(1))
    assert is_plain(nn.Parameter(torch.ones(1)))
    assert not is_plain(Scaled(torch.ones(1, dtype=torch.int8), torch.ones(1)))
    assert not is_plain(torch.empty(1, device="meta"))
    assert not is_plain(torch.ones(2, 2).to_sparse())
    assert not is_plain("text")


def test_a_wrapper_in_a_parameter_has_the_wrappers_parts() -> None:
    """And one that does not tell has none."""
    bulk, scale = torch.ones(4, dtype=torch.int8), torch.ones(1)
    assert [part.data_ptr() for part in parts(nn.Parameter(Scaled(bulk, scale), requires_grad=False))] == [
        bulk.data_ptr(), scale.data_ptr()]
    assert parts(Opaque(bulk, scale)) == []


@pytest.mark.parametrize("made", [True, False], ids=["made in inference mode", "made outside"])
@pytest.mark.parametrize("given_", [True, False], ids=["inference tensor", "normal tensor"])
@pytest.mark.parametrize("inside", [True, False], ids=["put inside", "put outside"])
def test_put_keeps_the_parameter_object(made: bool, given_: bool, inside: bool) -> None:
    """Whoever holds the Parameter sees the new bytes, in and out of inference mode."""
    with torch.inference_mode(made):
        leaf = nn.Linear(4, 4)
    with torch.inference_mode(given_):
        tensor = torch.randn(4, 4)
    before = leaf.weight
    with torch.inference_mode(inside):
        put(leaf, "weight", tensor)
    assert leaf.weight is before
    assert tensor.data_ptr() == leaf.weight.data_ptr()


@pytest.mark.parametrize("made", [True, False], ids=["made in inference mode", "made outside"])
@pytest.mark.parametrize("inside", [True, False], ids=["put inside", "put outside"])
def test_put_replaces_the_parameter_where_the_kinds_differ(made: bool, inside: bool) -> None:
    """A wrapper's `.data =` would leave its bytes behind."""
    leaf = nn.Linear(4, 4)
    plain = leaf.weight
    with torch.inference_mode(made):
        wrapper = Scaled(torch.ones(4, 4, dtype=torch.int8), torch.ones(1))
    with torch.inference_mode(inside):
        put(leaf, "weight", wrapper)
    assert leaf.weight is not plain
    assert isinstance(leaf.weight.data, Scaled)
    assert not leaf.weight.requires_grad
    put(leaf, "weight", torch.zeros(4, 4))
    assert is_plain(leaf.weight)
    leaf.register_parameter("bias", None)
    put(leaf, "bias", torch.zeros(4))
    assert isinstance(leaf.bias, nn.Parameter)


@pytest.fixture
def path(save: Save) -> str:
    return save(weight=torch.randn(8, 8), bias=torch.randn(8))


@pytest.fixture
def linear(house: Any, path: str) -> nn.Linear:
    """A layer that is a file's mapping, as after a build."""
    net = nn.Linear(8, 8)
    house.load(net, path)
    assert house.mapped(net.weight)
    return net


@pytest.fixture
def homes(house: Any) -> Iterator[Homes]:
    yield house.policy._offloader._homes


def test_a_parameter_that_is_a_mapping_has_a_home_there(house: Any, linear: nn.Linear, homes: Homes) -> None:
    """With the name under which a patch finds it."""
    outer = nn.Sequential(nn.Identity(), linear)
    homes.note_all(outer)
    found = {name: (leaf, own, home) for name, leaf, own, _, home in homes.of(outer)}
    assert set(found) == {"1.weight", "1.bias"}
    leaf, own, home = found["1.weight"]
    assert (leaf, own) == (linear, "weight")
    assert home.tensor.data_ptr() == linear.weight.data_ptr()
    assert home.file is house.bank.file_of(linear.weight)
    assert homes.files(outer) == {home.file}
    assert {name for name, *_ in homes.of(linear)} == {"weight", "bias"}


def test_private_parameters_have_no_home(linear: nn.Linear, homes: Homes) -> None:
    """Only what is a file's mapping is noted, and nothing is noted of an absent parameter."""
    stranger = nn.Sequential(nn.Linear(4, 4, bias=False))
    homes.note_all(stranger)
    assert list(homes.of(stranger)) == []
    assert homes.files(stranger) == set()
    assert homes.get(stranger[0]) == {}


def test_the_first_home_stays_until_it_is_forgotten(house: Any, linear: nn.Linear, homes: Homes, save: Save) -> None:
    """A mapped tensor that is noted again changes nothing."""
    homes.note_all(linear)
    first = homes.get(linear)["weight"]
    homes.note(linear, "weight", house.read(save("other.safetensors", weight=torch.randn(8, 8)))["weight"])
    assert homes.get(linear)["weight"] is first
    homes.forget(linear, "weight")
    homes.forget(linear, "weight")
    homes.forget(nn.Linear(1, 1), "weight")
    assert set(homes.get(linear)) == {"bias"}


def test_a_home_of_another_shape_or_dtype_is_not_this_parameters(linear: nn.Linear, homes: Homes) -> None:
    """Somebody put another tensor there."""
    homes.note_all(linear)
    linear.weight = nn.Parameter(torch.zeros(8, 4))
    linear.bias = nn.Parameter(torch.zeros(8).half())
    assert list(homes.of(linear)) == []
    linear.register_parameter("bias", None)
    assert list(homes.of(linear)) == []


def test_a_home_does_not_keep_a_dead_model(house: Any, linear: nn.Linear, homes: Homes, path: str) -> None:
    """The mapping is idle once the module is gone."""
    homes.note_all(linear)
    net = nn.Linear(8, 8)
    house.load(net, path)
    homes.note_all(net)
    assert len(house.bank.live()) == 2
    del net
    gc.collect()
    assert len(house.bank.live()) == 1


def test_the_home_of_a_wrapper_is_decided_by_its_bulk(house: Any, homes: Homes, save: Save) -> None:
    """Its scales may be private."""
    bulk = house.read(save(bulk=torch.ones(8, 8, dtype=torch.int8)))["bulk"]
    leaf = nn.Linear(8, 8, bias=False)
    put(leaf, "weight", Scaled(bulk, torch.ones(1)))
    homes.note_all(leaf)
    home = homes.get(leaf)["weight"]
    assert fingerprint(home.tensor) == fingerprint(leaf.weight)
    assert home.file is house.bank.file_of(bulk)
    put(leaf, "weight", Scaled(bulk + 1, torch.ones(1)))
    assert fingerprint(home.tensor) != fingerprint(leaf.weight)


def test_a_wrapper_of_the_same_looks_has_another_fingerprint(house: Any, homes: Homes, save: Save) -> None:
    """A pack may quantise a layer that was mapped; shape and dtype look the same."""
    weight = house.read(save(weight=torch.ones(8, 8, dtype=torch.bfloat16)))["weight"]
    home = Home(weight, house.bank.file_of(weight))
    wrapper = nn.Parameter(Scaled(torch.ones(8, 8, dtype=torch.int8), torch.ones(1)), requires_grad=False)
    assert home.fits(wrapper)
    assert fingerprint(home.tensor) != fingerprint(wrapper)


def test_a_move_notes_homes_and_passes_the_hosts_answer_on(house: Any, linear: nn.Linear, homes: Homes,
                                                           weights_of: Any) -> None:
    """What is mapped when it leaves is where it may come back to."""
    assert house.ask(MoveWeights(weights_of(linear), CPU)) == "host"
    assert set(homes.get(linear)) == {"weight", "bias"}


@pytest.mark.parametrize("kind", [MoveWeights, OffloadWeights, OffloadPart])
def test_weights_that_the_host_streams_are_left_alone(kind: Any, house: Any, linear: nn.Linear, homes: Homes,
                                                      weights_of: Any) -> None:
    """Dynamic VRAM keeps its own mapping."""
    homes.note_all(linear)
    assert house.policy.decide(kind(weights_of(linear, streamed_by_host=True), CPU)) is None


@pytest.mark.parametrize("device", [None, torch.device("meta")])
def test_weights_that_do_not_leave_for_ram_are_left_alone(device: Any, house: Any, linear: nn.Linear, homes: Homes,
                                                          weights_of: Any) -> None:
    """None is staying put; another device is the host's business."""
    homes.note_all(linear)
    assert house.policy.decide(OffloadPart(weights_of(linear), device)) is None


@pytest.mark.parametrize("device", [None, torch.device("meta"), CPU])
def test_a_patch_at_use_ends_wherever_the_weights_go(device: Any, house: Any, linear: nn.Linear, homes: Homes,
                                                     weights_of: Any) -> None:
    """The host takes its patches back each time, and stays put where the next patch is another."""
    homes.note_all(linear)
    weights = weights_of(linear)
    assert house.ask(OffloadWeights(weights, device)) == "host"
    assert not weights.patching


def test_a_part_that_leaves_keeps_its_patches(house: Any, linear: nn.Linear, homes: Homes, weights_of: Any) -> None:
    """What stays on the device goes on being patched."""
    homes.note_all(linear)
    weights = weights_of(linear)
    assert house.ask(OffloadPart(weights, CPU)) == "host"
    assert weights.patching


def test_an_offload_of_weights_without_a_home_is_left_alone(house: Any, weights_of: Any) -> None:
    """Nothing to swap back to."""
    assert house.policy.decide(OffloadWeights(weights_of(nn.Linear(4, 4)), CPU)) is None


def test_an_offload_of_what_never_left_changes_nothing(house: Any, linear: nn.Linear, homes: Homes, weights_of: Any,
                                                       ring: Ring) -> None:
    """The mapping is the mapping still, and there is nothing to report."""
    homes.note_all(linear)
    address = linear.weight.data_ptr()
    assert house.ask(OffloadWeights(weights_of(linear), CPU)) == "host"
    assert address == linear.weight.data_ptr()
    assert ring.named("weights.restored") == []


def test_a_module_that_is_in_ram_already_is_left_alone(house: Any, linear: nn.Linear, homes: Homes) -> None:
    """`module.to("cpu")` of a mapped module copies nothing."""
    homes.note_all(linear)
    assert house.policy.decide(MoveModule(linear, CPU)) is None
    assert house.policy.decide(MoveModule(linear, None)) is None
    assert house.policy.decide(MoveModule(nn.Linear(2, 2), CPU)) is None


def _add_one(request: Any) -> str:
    with torch.no_grad():
        getattr(request.module, request.name).add_(1)
    return "written"


def test_a_write_in_place_goes_to_a_private_copy(house: Any, linear: nn.Linear, path: str) -> None:
    """The mapping stays pristine, so that the next load may have it; the file stays as it is."""
    before, content, mapped = linear.weight.detach().clone(), Path(path).read_bytes(), linear.weight.detach()
    file = house.bank.file_of(linear.weight)
    assert house.ask(WriteInPlace(linear, "weight"), _add_one) == "written"
    assert not house.mapped(linear.weight)
    assert torch.equal(before + 1, linear.weight)
    assert torch.equal(before, mapped)
    assert content == Path(path).read_bytes()
    assert pages.is_pristine(file.start, file.end, file.target) in (True, None)


def test_a_write_to_a_private_parameter_is_left_alone(house: Any, linear: nn.Linear) -> None:
    """There is no mapping to protect; absent parameters and wrappers are the host's."""
    put(linear, "bias", linear.bias.detach().clone())
    assert house.policy.decide(WriteInPlace(linear, "bias")) is None
    assert house.policy.decide(WriteInPlace(linear, "nothing")) is None
    put(linear, "weight", Scaled(torch.ones(8, 8, dtype=torch.int8), torch.ones(1)))
    assert house.policy.decide(WriteInPlace(linear, "weight")) is None


def test_a_copy_that_was_put_back_becomes_the_mapping_again(house: Any, linear: nn.Linear, weights_of: Any) -> None:
    """A hook adds and the host restores; nothing of it stays in RAM."""
    address, before = linear.weight.data_ptr(), linear.weight.detach().clone()
    house.ask(WriteInPlace(linear, "weight"), _add_one)

    def restores(request: Any) -> None:
        with torch.no_grad():
            linear.weight.copy_(before)

    house.ask(OffloadWeights(weights_of(linear, kept_by_host={"weight"}), CPU), restores)
    assert address == linear.weight.data_ptr()


def test_a_copy_that_was_not_put_back_stays(house: Any, linear: nn.Linear, weights_of: Any) -> None:
    """What was written is the model's."""
    house.ask(WriteInPlace(linear, "weight"), _add_one)
    written = linear.weight.detach().clone()
    house.ask(OffloadWeights(weights_of(linear), CPU))
    assert not house.mapped(linear.weight)
    assert torch.equal(written, linear.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_only_the_same_bits_count_as_put_back(dtype: torch.dtype, house: Any, save: Save, weights_of: Any) -> None:
    """Minus zero is not zero, and not-a-number is itself."""
    content = torch.tensor([0.0, 1.0, float("nan"), 2.0]).repeat(4, 1).to(dtype)
    net = house.load(nn.Linear(4, 4, bias=False).to(dtype), save(weight=content))
    address = net.weight.data_ptr()
    house.ask(WriteInPlace(net, "weight"), lambda request: None)
    with torch.no_grad():
        net.weight.view(torch.uint8).view(-1)[dtype.itemsize - 1] ^= 128
    house.ask(OffloadWeights(weights_of(net), CPU))
    assert address != net.weight.data_ptr()
    house.policy._copies._written.setdefault(net, set()).add("weight")
    with torch.no_grad():
        net.weight.view(torch.uint8).view(-1)[dtype.itemsize - 1] ^= 128
    house.ask(OffloadWeights(weights_of(net), CPU))
    assert address == net.weight.data_ptr()


def test_a_weight_to_be_pinned_is_copied_within_the_budget(house: Any, linear: nn.Linear, weights_of: Any) -> None:
    """The host pins the copy, and the ledger knows of it."""
    before, seen = linear.weight.detach().clone(), []
    outer = nn.Sequential(linear)
    answer = house.ask(PinWeight(weights_of(outer), "0.weight"), lambda request: seen.append(house.mapped(linear.weight)))
    assert (answer, seen) == (None, [False])
    assert torch.equal(before, linear.weight)
    assert house.mapped(linear.bias)
    ledger = house.tools.ledger
    assert ledger.room("other", Residency.PINNED) == 2**30 - 256
    house.ask(PinWeight(weights_of(outer), "0.bias"))
    assert ledger.room("other", Residency.PINNED) == 2**30 - 256 - 32


def test_beyond_the_budget_weights_stay_mapped(house: Any, linear: nn.Linear, weights_of: Any,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """They stream from the mapping, unpinned."""
    monkeypatch.setattr(house.tools.ledger, "room", lambda owner, residency: 256)
    house.ask(PinWeight(weights_of(linear), "weight"))
    assert not house.mapped(linear.weight)
    assert house.policy.decide(PinWeight(weights_of(linear), "bias")) is None
    assert house.mapped(linear.bias)


def test_a_weight_that_is_pinned_again_and_again_is_counted_once(house: Any, linear: nn.Linear, weights_of: Any,
                                                                 homes: Homes) -> None:
    """Between two prompts it was on the device and came home; the copy is a new one each time."""
    for _ in range(5):
        house.ask(PinWeight(weights_of(linear), "weight"))
        assert not house.mapped(linear.weight)
        assert house.tools.ledger.room("other", Residency.PINNED) == 2**30 - 256
        put(linear, "weight", homes.get(linear)["weight"].tensor)


def test_pinned_bytes_of_a_dead_model_are_given_back(house: Any, path: str, weights_of: Any) -> None:
    """The books follow the modules."""
    net = house.load(nn.Linear(8, 8), path)
    house.ask(PinWeight(weights_of(net), "weight"))
    del net
    gc.collect()
    house.policy.prompt_ended()
    assert house.tools.ledger._kept["zero_copy", Residency.PINNED] == 0


def test_where_the_host_does_not_pin_nothing_is_copied(house: Any, linear: nn.Linear, weights_of: Any) -> None:
    """A copy that is not pinned would only cost RAM."""
    house.tools.host.memory.pins = False
    assert house.policy.decide(PinWeight(weights_of(linear), "weight")) is None


def test_private_weights_and_absent_ones_are_pinned_by_the_host(house: Any, linear: nn.Linear, weights_of: Any) -> None:
    """No opinion."""
    put(linear, "weight", linear.weight.detach().clone())
    assert house.policy.decide(PinWeight(weights_of(linear), "weight")) is None
    assert house.policy.decide(PinWeight(weights_of(linear), "nothing")) is None


def test_mapped_memory_is_not_pinned_where_it_is(house: Any, linear: nn.Linear) -> None:
    """Pinning would copy each page in the kernel, behind everybody's back."""
    asked: list[Any] = []
    assert house.ask(PinMemory(linear.weight), asked.append) is False
    assert house.ask(PinMemory(linear.weight.detach()[3:]), asked.append) is False
    assert house.ask(PinMemory(Scaled(linear.weight.detach(), torch.ones(1))), asked.append) is False
    assert asked == []
    assert house.ask(PinMemory(torch.ones(4))) == "host"
    assert house.ask(PinMemory(torch.empty(0))) == "host"


def test_homes_of_a_bank_that_let_go_are_still_homes(save: Save) -> None:
    """The mapping lives as long as its tensors, kept by the bank or not."""
    bank = Bank()
    leaf = nn.Linear(8, 8, bias=False)
    lease = bank.lease(save(weight=torch.randn(8, 8)))
    put(leaf, "weight", lease.tensors.pop("weight"))
    bank.empty()
    homes = Homes(bank)
    homes.note_all(leaf)
    assert set(homes.get(leaf)) == {"weight"}
