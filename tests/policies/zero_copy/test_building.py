"""Models built over a file's mapping are the models that ComfyUI builds, without the copy."""
from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from residency.policies.requests import FillModule
from residency.telemetry.sinks import Ring
from safetensors.torch import load_file
from torch import nn

Save = Callable[..., str]


class Net(nn.Module):
    """One of everything that ComfyUI's models are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False))
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(7)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights for a `Net`, buffers with their own dtypes."""
    return {key: torch.randn(value.shape).to(dtype) if value.is_floating_point() else value + 3
            for key, value in Net().state_dict().items()}


def plain(module: nn.Module, path: str) -> nn.Module:
    """The model that ComfyUI alone builds."""
    module.load_state_dict(load_file(path), strict=False)
    return module


def assert_same(expected: nn.Module, actual: nn.Module) -> None:
    left, right = expected.state_dict(), actual.state_dict()
    assert list(left) == list(right)
    for key, value in left.items():
        assert (value.dtype, value.shape) == (right[key].dtype, right[key].shape), key
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("inference", [True, False], ids=["inference mode", "outside of it"])
def test_a_model_of_the_files_dtype_is_the_files_mapping(inference: bool, house: Any, save: Save) -> None:
    """Every parameter's address lies in the mapping, and every value is the file's."""
    path = save(**weights())
    with torch.inference_mode(inference):
        net = house.load(Net(), path)
        assert all(house.mapped(parameter) for parameter in net.parameters())
        assert_same(plain(Net(), path), net)


def test_a_model_built_in_inference_mode_from_tensors_read_outside_is_mapped(house: Any, save: Save) -> None:
    """Packs read in one place and build in another."""
    path = save(**weights())
    state_dict = house.read(path)
    with torch.inference_mode():
        net = Net()
        house.build(net, state_dict)
        assert house.mapped(net.conv.weight)
        assert_same(plain(Net(), path), net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_another_dtype_is_converted_exactly_as_by_torch(dtype: torch.dtype, house: Any, save: Save, ring: Ring) -> None:
    """Nothing is mapped where the host would convert, and the score says so."""
    path = save(**weights(dtype))
    net = house.load(Net(), path)
    assert not any(house.mapped(parameter) for parameter in net.parameters())
    assert_same(plain(Net(), path), net)
    event, = ring.named("weights.mapped")
    size = sum(parameter.nbytes for parameter in net.parameters())
    assert (event.fields["bytes"], event.fields["copied_bytes"]) == (0, size)


def test_a_file_of_mixed_dtypes_is_mapped_where_it_fits(house: Any, save: Save, ring: Ring) -> None:
    """Each parameter is judged by itself."""
    half = {key: value.half() if key.startswith("conv.") else value for key, value in weights().items()}
    path = save(**half)
    net = house.load(Net(), path)
    assert {name for name, parameter in net.named_parameters() if not house.mapped(parameter)} == {"conv.weight", "conv.bias"}
    assert_same(plain(Net(), path), net)
    event, = ring.named("weights.mapped")
    assert event.fields["copied_bytes"] == net.conv.weight.nbytes + net.conv.bias.nbytes
    assert event.fields["file"] == "model.safetensors"


def test_buffers_never_alias_the_mapping(house: Any, save: Save) -> None:
    """BatchNorm writes its buffers in place."""
    path = save(**weights())
    net = house.load(Net(), path)
    buffers = dict(net.named_buffers())
    assert not any(house.mapped(buffer) for buffer in buffers.values())
    assert int(buffers["norm.num_batches_tracked"]) == 3


def test_a_scalar_in_a_buffer_of_one_element_never_aliases_the_mapping(house: Any, save: Save) -> None:
    """Torch accepts one element for a scalar; the buffer is the module's own all the same."""
    changed = weights()
    changed["norm.num_batches_tracked"] = changed["norm.num_batches_tracked"].reshape(1)
    path = save(**changed)
    net = house.load(Net(), path)
    assert not house.mapped(net.norm.num_batches_tracked)
    assert_same(plain(Net(), path), net)


def test_a_buffer_that_is_not_saved_is_left_alone(house: Any, save: Save) -> None:
    """Torch calls such a key unexpected and does not load it."""
    def make() -> nn.Module:
        module = nn.Linear(4, 4)
        module.register_buffer("positions", torch.arange(4), persistent=False)
        return module

    path = save(weight=torch.randn(4, 4), bias=torch.randn(4), positions=torch.zeros(4, dtype=torch.int64))
    net = make()
    result = house.build(net, house.read(path))
    assert result.unexpected_keys == ["positions"]
    assert torch.equal(torch.arange(4), net.positions)
    assert house.mapped(net.weight)


def test_tied_weights_stay_tied(house: Any, save: Save) -> None:
    """One parameter under two names is one parameter after, and the last name wins as it does in torch."""
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
        module[1].weight = module[0].weight
        return module

    path = save(**{"1.weight": torch.randn(4, 4), "0.weight": torch.randn(4, 4).half(), "2.weight": torch.randn(4, 4),
                   "2.bias": torch.randn(4)})
    net = house.load(make(), path)
    assert net[0].weight is net[1].weight
    assert house.mapped(net[2].weight)
    assert_same(plain(make(), path), net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_module_under_two_names_is_filled_as_by_torch(dtype: torch.dtype, house: Any, save: Save) -> None:
    """The second name's weights win, in the module's dtype, and its buffers stay its own."""
    def make() -> nn.Module:
        module = nn.Module()
        module.one = module.two = nn.BatchNorm1d(4)
        return module

    path = save(**{f"{name}.{key}": torch.randn(4).to(dtype) for name in ("one", "two")
                   for key in ("weight", "bias", "running_mean", "running_var")})
    net = house.load(make(), path)
    assert net.one is net.two
    assert not any(house.mapped(buffer) for buffer in net.buffers())
    assert_same(plain(make(), path), net)


def test_a_shape_that_does_not_fit_is_reported_in_torchs_words(house: Any, save: Save) -> None:
    """The error that a user searches for is the one that ComfyUI alone gives."""
    changed = weights()
    changed["conv.weight"] = torch.randn(4, 3, 5, 5)
    path = save(**changed)
    with pytest.raises(RuntimeError) as expected:
        plain(Net(), path)
    with pytest.raises(RuntimeError) as actual:
        house.load(Net(), path)
    assert str(expected.value) == str(actual.value)


def test_missing_and_unexpected_keys_are_what_torch_says(house: Any, save: Save) -> None:
    """Loaders tell a model by these lists."""
    changed = weights()
    del changed["conv.bias"], changed["blocks.0.weight"]
    changed["stranger.weight"] = torch.randn(3)
    changed["blocks.9"] = torch.randn(3)
    path = save(**changed)
    expected = Net().load_state_dict(load_file(path), strict=False)
    actual = house.build(Net(), house.read(path))
    assert expected.missing_keys == actual.missing_keys
    assert expected.unexpected_keys == actual.unexpected_keys


def test_strict_loading_fails_with_torchs_own_error(house: Any, save: Save) -> None:
    """Word for word."""
    changed = weights()
    del changed["conv.bias"]
    changed["stranger"] = torch.randn(3)
    path = save(**changed)
    with pytest.raises(RuntimeError) as expected:
        Net().load_state_dict(load_file(path), strict=True)
    with pytest.raises(RuntimeError) as actual:
        house.load(Net(), path, strict=True)
    assert str(expected.value) == str(actual.value)


def test_values_that_are_no_tensors_reach_the_host(house: Any, save: Save) -> None:
    """Modules with extra state keep it in the state dict."""
    class Extra(nn.Linear):
        extra = None

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    state_dict = {**house.read(save(weight=torch.randn(4, 4), bias=torch.randn(4))), "_extra_state": "kept"}
    net = Extra(4, 4)
    house.build(net, state_dict)
    assert net.extra == "kept"
    assert house.mapped(net.weight)


def test_the_versions_of_modules_reach_the_host(house: Any, save: Save) -> None:
    """`_metadata` decides how torch reads old state dicts."""
    seen: list[Any] = []

    class Versioned(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
            seen.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    plain_dict = copy.copy(Net().state_dict())
    plain_dict.clear()
    plain_dict.update(house.read(save(weight=torch.randn(4, 4), bias=torch.randn(4))))
    plain_dict._metadata[""] = {"version": 41}
    house.build(Versioned(4, 4), plain_dict)
    assert seen == [41]


def test_what_is_not_contiguous_is_copied(house: Any, save: Save) -> None:
    """A transposed view of a mapping would change how kernels read it."""
    lease = house.read(save(weight=torch.randn(8, 4), bias=torch.randn(8)))
    net = nn.Linear(8, 4, bias=False)
    house.build(net, {"weight": lease["weight"].t()})
    assert not house.mapped(net.weight)
    assert net.weight.is_contiguous()
    assert torch.equal(lease["weight"].t(), net.weight)


def test_a_parameter_in_another_memory_format_keeps_it(house: Any, save: Save) -> None:
    """Models in channels_last stay in channels_last."""
    path = save(weight=torch.randn(4, 3, 3, 3), bias=torch.randn(4))
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    house.load(net, path)
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(load_file(path)["weight"], net.weight)
    assert house.mapped(net.bias)


def test_a_misaligned_tensor_is_copied(house: Any, tmp_path: Path, ring: Ring) -> None:
    """A file may pack its tensors without alignment, which some kernels cannot read."""
    weight, bias = torch.randn(4, 4), torch.randn(4)
    header = json.dumps({"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
                         "weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [3, 67]},
                         "bias": {"dtype": "F32", "shape": [4], "data_offsets": [67, 83]}}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "packed.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"odd" + weight.numpy().tobytes() + bias.numpy().tobytes())
    net = nn.Linear(4, 4)
    house.load(net, str(path))
    assert not house.mapped(net.weight)
    assert net.weight.data_ptr() % 4 == 0
    assert torch.equal(weight, net.weight)
    assert torch.equal(bias, net.bias)
    event, = ring.named("weights.mapped")
    assert (event.fields["bytes"], event.fields["copied_bytes"]) == (0, 80)


def test_requires_grad_stays_as_the_module_has_it(house: Any, save: Save) -> None:
    """Training nodes ask for it."""
    net = nn.Linear(4, 4)
    net.bias.requires_grad_(False)
    house.load(net, save(weight=torch.randn(4, 4), bias=torch.randn(4)))
    assert (net.weight.requires_grad, net.bias.requires_grad) == (True, False)


def test_writing_to_a_mapped_model_leaves_the_file_alone(house: Any, save: Save) -> None:
    """The mapping is copy-on-write."""
    path = save(**weights())
    before = Path(path).read_bytes()
    net = house.load(Net(), path)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert before == Path(path).read_bytes()


def test_one_file_in_two_models_is_two_mappings(house: Any, save: Save) -> None:
    """What a hook writes into one never shows in the other."""
    path = save(**weights())
    one, two = house.load(Net(), path), house.load(Net(), path)
    with torch.no_grad():
        one.conv.weight.zero_()
    assert_same(plain(Net(), path), two)


def test_outside_of_a_build_nothing_is_assigned(house: Any, save: Save) -> None:
    """`load_state_dict` belongs to every torch program."""
    state_dict = house.read(save(weight=torch.randn(4, 4), bias=torch.randn(4)))
    net = nn.Linear(4, 4)
    house.fill(net, state_dict)
    assert not house.mapped(net.weight)
    assert torch.equal(state_dict["weight"], net.weight)


def test_a_host_that_assigns_itself_is_left_alone(house: Any, save: Save) -> None:
    """It knows what it does."""
    state_dict = house.read(save(weight=torch.randn(4, 4).half(), bias=torch.randn(4).half()))
    net = nn.Linear(4, 4)
    house.build(net, state_dict, assign=True)
    assert net.weight.dtype == torch.float16
    assert house.mapped(net.weight)


def test_a_state_dict_from_elsewhere_is_left_alone(house: Any) -> None:
    """Without a byte from a mapping there is nothing to decide."""
    request = FillModule(nn.Linear(4, 4), {"weight": torch.randn(4, 4)}, False, lambda leaf: True, lambda leaf: None)
    assert house.policy.decide(request) is None
    net = nn.Linear(4, 4)
    before = net.weight
    house.build(net, {"weight": torch.randn(4, 4)})
    assert net.weight is before


def test_a_failed_build_leaves_no_trace(house: Any, save: Save) -> None:
    """The next `load_state_dict` outside of a build is nobody's build."""
    changed = weights()
    changed["scale"] = torch.randn(3)
    with pytest.raises(RuntimeError):
        house.load(Net(), save(**changed))
    net = nn.Linear(4, 4)
    house.fill(net, house.read(save("second.safetensors", weight=torch.randn(4, 4), bias=torch.randn(4))))
    assert not house.mapped(net.weight)


class Copies(nn.Linear):
    """A pack's layer that copies its weights itself."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])


def test_a_class_that_copies_its_weights_is_found_out_and_left_alone(house: Any, save: Save, ring: Ring) -> None:
    """What was predicted is compared with what is found, and said once."""
    path = save(weight=torch.randn(1024, 512))
    net = house.load(Copies(512, 1024, bias=False), path)
    assert not house.mapped(net.weight)
    event, = ring.named("policy.ineffective")
    assert (event.fields["predicted_bytes"], event.fields["observed_bytes"]) == (2**21, 0)
    assert "Copies" in event.fields["reason"]
    effect = house.policy.prompt_ended()
    assert (effect.predicted_bytes, effect.observed_bytes) == (2**21, 0)
    again = house.load(Copies(512, 1024, bias=False), path)
    assert torch.equal(load_file(path)["weight"], again.weight)
    assert len(ring.named("policy.ineffective")) == 1
    assert house.policy.prompt_ended().predicted_bytes == 0
    assert house.mapped(house.load(nn.Linear(512, 1024, bias=False), path).weight)


def test_a_small_model_that_copies_is_not_worth_a_warning(house: Any, save: Save, ring: Ring) -> None:
    """A few KB more or less."""
    house.load(Copies(4, 4, bias=False), save(weight=torch.randn(4, 4)))
    assert ring.named("policy.ineffective") == []


def test_the_effect_of_a_prompt_is_what_was_mapped(house: Any, save: Save) -> None:
    """Predicted and observed bytes, counted from prompt to prompt."""
    net = house.load(Net(), save(**weights()))
    size = sum(parameter.nbytes for parameter in net.parameters())
    effect = house.policy.prompt_ended()
    assert (effect.predicted_bytes, effect.observed_bytes) == (size, size)
    effect = house.policy.prompt_ended()
    assert (effect.predicted_bytes, effect.observed_bytes) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_keep_file_dtype_castable_weights_stay_narrow_and_mapped(dtype: torch.dtype, narrow_house: Any,
                                                                      save: Save) -> None:
    """The host casts them at each use; layers that it cannot cast are converted."""
    path = save(**weights(dtype))
    net = narrow_house.load(Net(), path)
    kept = {"blocks.0.weight", "blocks.0.bias", "blocks.2.weight"}
    for name, parameter in net.named_parameters():
        assert (dtype if name in kept else torch.float32) == parameter.dtype
        assert (name in kept) == narrow_house.mapped(parameter)
    assert set(narrow_house.cast_at_use) == {net.blocks[0], net.blocks[2]}
    for key, value in plain(Net(), path).state_dict().items():
        assert torch.equal(value, net.state_dict()[key].to(value.dtype))


@pytest.mark.parametrize(("narrow", "wide"), [
    (torch.float8_e4m3fn, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16), (torch.int8, torch.float32), (torch.float64, torch.float32)])
def test_with_keep_file_dtype_only_what_widens_exactly_stays(narrow: torch.dtype, wide: torch.dtype, narrow_house: Any,
                                                             save: Save, ring: Ring) -> None:
    """Eight-bit floats have scales, and a cast that rounds is not the cast on load."""
    path = save(weight=(torch.randn(4, 4) * 5).to(narrow), bias=torch.randn(4).to(narrow))
    net = narrow_house.load(nn.Linear(4, 4).to(wide), path)
    assert net.weight.dtype == wide
    assert narrow_house.cast_at_use == []
    assert ring.named("policy.failed") == []
    assert_same(plain(nn.Linear(4, 4).to(wide), path), net)


def test_weights_that_will_be_patched_are_widened_exactly(narrow_house: Any, save: Save, weights_of: Any) -> None:
    """A LoRA rounds as it does in ComfyUI alone; what is not patched stays in the mapping."""
    from residency.policies.requests import MoveWeights

    path = save(**weights(torch.bfloat16))
    net = narrow_house.load(Net(), path)
    patched = {"blocks.0.weight", "conv.weight", "no.such.weight", "blocks.0.nothing"}
    move = MoveWeights(weights_of(net, to_patch=patched), torch.device("cpu"))
    assert narrow_house.ask(move) == "host"
    assert net.blocks[0].weight.dtype == torch.float32
    assert torch.equal(plain(Net(), path).blocks[0].weight, net.blocks[0].weight)
    assert not narrow_house.mapped(net.blocks[0].weight)
    assert net.blocks[2].weight.dtype == torch.bfloat16
    assert narrow_house.mapped(net.blocks[2].weight)
    widened = net.blocks[0].weight
    narrow_house.ask(move)
    assert net.blocks[0].weight is widened


def test_a_model_inside_a_model_is_one_build(house: Any, save: Save, ring: Ring) -> None:
    """A checkpoint builds its VAE inside; both are mapped, and the score is one line."""
    from residency.policies.requests import BuildModel

    state_dict = house.read(save(weight=torch.randn(4, 4), bias=torch.randn(4)))
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    house.ask(BuildModel("checkpoint"), lambda request: (house.fill(one, state_dict), house.build(two, state_dict)))
    assert house.mapped(one.weight)
    assert house.mapped(two.weight)
    assert len(ring.named("weights.mapped")) == 1
    assert [event.fields["reason"] for event in ring.named("policy.decided") if event.fields["request"] == "BuildModel"] == [
        "checkpoint: parameters are the file's mapping"]
