"""What of the host's computing becomes a request, and a model in use that gives its place on the device back."""
from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from residency.hooks import HookRegistry, computing, host, sampling
from residency.hooks.shrinking import give_back, place_anew
from residency.policies.computing import ComputeAll, ComputeImage, ComputeStep, ComputeTiles, IgnoreError
from residency.policies.requests import Request
from residency.policies.sampling import SampleStep
from residency.telemetry.sinks import Ring

CPU, DEVICE = torch.device("cpu"), torch.device("meta")


class Asked:
    """The hooks on stand-ins for the host's functions; `request` is what the last call became."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.request: Request | None = None
        hooks = (*computing.HOOKS, sampling.HOOKS[0])
        self.registry = HookRegistry(hooks, self._answer)
        for hook in hooks:
            site = hook.seam.resolve()
            stand_in: Any = lambda *args, **kwargs: "host"  # noqa: E731
            stand_in.__signature__ = inspect.signature(site.original)
            if hook.asks is not IgnoreError:
                monkeypatch.setattr(site.owner, site.name, stand_in)
        self.registry.sync({hook.asks for hook in hooks})

    def _answer(self, request: Request, host: Callable[[Request], Any]) -> Any:
        self.request = request
        return host(request)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, ring: Ring) -> Iterator[Asked]:
    asked = Asked(monkeypatch)
    yield asked
    asked.registry.remove_all()
    assert not ring.named("hook.failed")


def patcher(device: torch.device = DEVICE) -> Any:
    return comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), load_device=device, offload_device=CPU)


def step(device: torch.device = DEVICE, **options: Any) -> Any:
    return comfy.samplers._calc_cond_batch(SimpleNamespace(current_patcher=patcher(device)), [], None, None, options)


def sd(kind: str, device: torch.device = DEVICE) -> Any:
    made = object.__new__(getattr(comfy.sd, kind))
    made.patcher = patcher(device)
    return made


def test_a_sampling_step(asked: Asked) -> None:
    """With the model that runs it."""
    assert step(transformer_options={"wrappers": {"diffusion_model": {"key": []}}, "patches": {}}) == "host"
    assert isinstance(asked.request, SampleStep)
    assert asked.request.alone
    assert (asked.request.what, asked.request.device) == ("a sampling step", DEVICE)


@pytest.mark.parametrize("options", [
    {"model_function_wrapper": print}, {"transformer_options": {"patches": {"attn1_patch": [print]}}},
    {"transformer_options": {"patches_replace": {"dit": {0: print}}}},
    {"transformer_options": {"wrappers": {"diffusion_model": {"easycache": [print]}}}},
], ids=lambda options: str(options)[:50])
def test_a_step_that_packs_take_part_in_is_not_repeated(asked: Asked, options: dict[str, Any]) -> None:
    """They may count steps: the sampling is repeated then, which starts them anew."""
    assert step(**options) == "host"
    assert isinstance(asked.request, SampleStep)
    assert not asked.request.alone
    assert not asked.request.branches()


@pytest.mark.parametrize(("call", "kind", "what"), [
    (lambda device: comfy.sample.sample(patcher(device), *[None] * 8), ComputeAll, "sampling"),
    (lambda device: comfy.sample.sample_custom(patcher(device), *[None] * 7), ComputeAll, "sampling"),
    (lambda device: comfy.samplers.CFGGuider(patcher(device)).sample(None, None, None, None), ComputeAll, "sampling"),
    (lambda device: sd("CLIP", device).encode_from_tokens_scheduled({}), ComputeAll, "text encoding"),
    (lambda device: sd("CLIP", device).encode_from_tokens({}), ComputeStep, "a text encoding"),
    (lambda device: sd("CLIP", device).generate({}), ComputeStep, "text generation"),
    (lambda device: sd("VAE", device).decode(None), ComputeImage, "a VAE decode"),
    (lambda device: sd("VAE", device).encode(None), ComputeImage, "a VAE encode"),
    (lambda device: sd("VAE", device).decode_tiled(None), ComputeStep, "a tiled VAE decode"),
    (lambda device: sd("VAE", device).encode_tiled(None), ComputeStep, "a tiled VAE encode"),
])
def test_everything_else_that_is_computed(asked: Asked, call: Callable[[torch.device], Any], kind: type, what: str) -> None:
    """On a device; on the CPU it is nobody's business."""
    assert call(CPU) == "host"
    assert asked.request is None
    assert call(DEVICE) == "host"
    assert type(asked.request) is kind
    assert asked.request.what == what


@pytest.mark.parametrize("name", ["decode_tiled_", "decode_tiled_1d", "encode_tiled_3d", "_decode_tiled_owned"])
def test_tiles(asked: Asked, name: str) -> None:
    """The host's way out when a decode or an encode ran out of memory."""
    assert getattr(sd("VAE"), name)(None) == "host"
    assert asked.request == ComputeTiles()


def test_a_guider_of_a_packs_own_without_a_patcher_is_left_alone(asked: Asked) -> None:
    """It is no error of the hook either."""
    guider = object.__new__(comfy.samplers.CFGGuider)
    assert guider.sample(None, None, None, None) == "host"
    assert asked.request is None


def test_random_numbers_are_put_back(asked: Asked) -> None:
    """To where they were when the host was called."""
    torch.manual_seed(5)
    step()
    assert isinstance(asked.request, SampleStep)
    first = torch.randn(3)
    asked.request.rewind()
    assert torch.equal(first, torch.randn(3))


def test_an_out_of_memory_that_the_host_only_logs(asked: Asked) -> None:
    """In the `except` block; other errors, and lines that are no error's, are logged as ever."""
    logging.error("plain")
    assert asked.request is None
    for error in (ValueError("bad"), torch.OutOfMemoryError("full")):
        try:
            raise error
        except Exception as caught:
            logging.error("ERROR lora %s", caught)
    assert asked.request == IgnoreError(error)


class TestMemory:
    def test_tells_an_out_of_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the host's own word where it has one; never where every error would be one."""
        memory, full = host.Memory(), torch.OutOfMemoryError("full")
        assert (memory.is_oom(full), memory.is_oom(RuntimeError("DefaultCPUAllocator: can't allocate memory"))) == (True, False)
        monkeypatch.delattr(comfy.model_management, "is_oom")
        assert (memory.is_oom(full), memory.is_oom(ValueError())) == (True, False)
        monkeypatch.setattr(comfy.model_management, "OOM_EXCEPTION", Exception)
        assert not memory.is_oom(full)

    def test_others_leave_and_those_in_use_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In use is what was placed last, and the model itself."""
        models = [patcher(CPU) for _ in range(3)]
        loaded = [comfy.model_management.LoadedModel(one) for one in models]
        loaded[1].currently_used = loaded[2].currently_used = False
        given: dict[str, Any] = {}
        monkeypatch.setattr(comfy.model_management, "current_loaded_models", loaded)
        monkeypatch.setattr(comfy.model_management, "free_memory",
                            lambda size, device, **more: given.update(more, device=device))
        host.Memory().free_others("meta", models[2].model)
        assert given == {"keep_loaded": [loaded[0], loaded[2]], "device": DEVICE}


class Layers(torch.nn.Module):
    """Some layers of the host's."""

    def __init__(self, ops: Any = comfy.ops.disable_weight_init) -> None:
        super().__init__()
        self.one, self.two = (ops.Linear(64, 64, bias=False) for _ in range(2))
        self.more = torch.nn.ModuleList(ops.Linear(64, 64, bias=False) for _ in range(4))
        for layer in (self.one, self.two, *self.more):
            torch.nn.init.eye_(layer.weight)
        self.device = CPU


class TestGivingBack:
    @pytest.fixture
    def patched(self) -> Any:
        """On its device, which the CPU plays, with a LoRA that adds one to a weight."""
        with torch.inference_mode():
            made = comfy.model_patcher.ModelPatcher(Layers(), load_device=CPU, offload_device=CPU)
            made.add_patches({"one.weight": (torch.ones(64, 64),)})
            made.partially_load(CPU, 1e32)
            yield made

    @staticmethod
    def sums(patcher: Any) -> list[float]:
        return [float(layer.weight.sum()) for layer in (patcher.model.one, patcher.model.two)]

    def test_weights_stay_patched_and_are_cast_at_use(self, patched: Any) -> None:
        """The host's own bookkeeping agrees."""
        assert self.sums(patched) == [64 * 65, 64]
        assert give_back(patched, 1e30) == patched.model_size()
        assert self.sums(patched) == [64 * 65, 64]
        assert patched.loaded_size() == 0
        assert patched.model.one.comfy_cast_weights
        assert patched.model.one.weight_function == []

    def test_patched_weights_are_moved_and_not_computed_again(self, patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another processor would give other last bits. What the host does by itself is not changed for later."""
        monkeypatch.setattr(comfy.lora, "calculate_weight", lambda *args, **kwargs: torch.zeros(64, 64))
        give_back(patched, 1e30)
        assert self.sums(patched) == [64 * 65, 64]
        assert "patch_weight_to_device" not in vars(patched)
        patched.partially_load(CPU, 1e32)
        assert self.sums(patched) == [0, 64]

    def test_a_part_of_it(self, patched: Any) -> None:
        """No more than about what was asked for."""
        given = give_back(patched, 100)
        assert 0 < given < patched.model_size()
        assert patched.loaded_size() == patched.model_size() - given

    def test_the_next_placing_patches_once(self, patched: Any) -> None:
        """And without the LoRA the file's weights are back. The control is the host without the mark: it patches twice."""
        give_back(patched, 1e30)
        patched.partially_load(CPU, 1e32)
        assert self.sums(patched) == [64 * 65, 64]
        patched.partially_unload(CPU, 1e32, force_patch_weights=True)
        patched.partially_load(CPU, 1e32)
        assert self.sums(patched) == [64 * (1 + 2 * 64), 64]

    def test_it_is_taken_off_patched(self, patched: Any) -> None:
        """The file's weights are what is left."""
        give_back(patched, 1e30)
        patched.unpatch_model(CPU)
        assert self.sums(patched) == [64, 64]

    def test_a_placing_that_patched_everything_is_undone_by_the_next(self, patched: Any) -> None:
        """It is like a model that gave all back."""
        patched.partially_load(CPU, 0.1, force_patch_weights=True)
        place_anew(patched)
        patched.partially_load(CPU, 1e32)
        assert self.sums(patched) == [64 * 65, 64]

    def test_torchs_own_layers_cannot_stream(self) -> None:
        """They would meet a weight on the CPU."""
        made = comfy.model_patcher.ModelPatcher(Layers(torch.nn), load_device=CPU, offload_device=CPU)
        with torch.inference_mode():
            made.partially_load(CPU, 1e32)
            assert give_back(made, 1e30) == 0
        assert made.loaded_size() == made.model_size()
