"""The exercise at start fires the hooks that need no prompt, and leaves no trace."""
from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import pytest
from residency.hooks import HookRegistry, all_hooks, computing, exercise, sampling
from residency.policies.computing import ScaleTiles
from residency.policies.files.bank import Bank
from residency.policies.requests import PatchWeight, PinMemory, Request
from residency.telemetry.sinks import Ring
from support.answers import Policies

EXERCISED = {
    "comfy.utils.load_torch_file",
    "torch.nn.modules.module.Module.load_state_dict",
    "comfy.model_management.load_models_gpu",
    "comfy.model_management.LoadedModel.model_load",
    "comfy.model_patcher.ModelPatcher.load",
    "comfy.model_patcher.ModelPatcher.patch_weight_to_device",
    "comfy.model_patcher.ModelPatcher.pin_weight_to_device",
    "comfy.model_management.pin_memory",
    "comfy.utils.copy_to_param",
    "comfy.model_management.free_memory",
    "comfy.model_management.LoadedModel.model_unload",
    "comfy.model_patcher.ModelPatcher.detach",
    "comfy.model_patcher.ModelPatcher.unpatch_model",
    "comfy.model_patcher.ModelPatcher.partially_unload",
    "torch.nn.modules.module.Module.to",
    "comfy.utils.tiled_scale_multidim",
}
# These want a model's real state dict or file, or a prompt.
NOT_EXERCISED = {
    "comfy.sd.load_diffusion_model",
    "comfy.sd.load_checkpoint_guess_config",
    "comfy.sd.load_clip",
    "nodes.VAELoader.load_vae",
    "folder_paths.get_filename_list",
    "folder_paths.get_full_path",
    "comfy.sd.load_diffusion_model_state_dict",
    "comfy.sd.load_state_dict_guess_config",
    "comfy.sd.load_text_encoder_state_dicts",
    "comfy.sd.VAE.__init__",
    "comfy.controlnet.load_controlnet_state_dict",
    "comfy.clip_vision.load_clipvision_from_sd",
    *(hook.name for hook in (*computing.HOOKS, *sampling.HOOKS)),  # they compute with a real model
    "execution.PromptExecutor.execute",
    "execution.PromptExecutor.reset",
}


class Listener:
    """Nobody to tell."""

    chain = None

    def prompt_starts(self) -> None: ...


HOOKS = all_hooks(Bank(), Listener())


@contextlib.contextmanager
def installed(without: str = "") -> Iterator[HookRegistry]:
    registry = HookRegistry([hook for hook in HOOKS if hook.name != without], Policies())
    registry.sync({hook.asks for hook in HOOKS})
    try:
        yield registry
    finally:
        registry.remove_all()


@pytest.fixture
def registry() -> Iterator[HookRegistry]:
    with installed() as registry:
        yield registry


def fired(registry: HookRegistry) -> set[str]:
    return {name for name, entry in registry.entries.items() if entry.hits}


def test_fires_every_hook_that_needs_no_prompt(registry: HookRegistry, ring: Ring) -> None:
    """A hook that is not on either list fails here: exercise it, or say why not."""
    exercise(registry)
    registry.tell()

    assert fired(registry) == EXERCISED
    assert set(registry.entries) - fired(registry) == NOT_EXERCISED
    assert {event.fields["hook"] for event in ring.named("hook.installed") if event.fields["exercised"]} == EXERCISED


def test_asks_nobody(registry: HookRegistry, ring: Ring) -> None:
    """Policies and telemetry do not hear of a model that no user knows."""
    exercise(registry)

    assert not registry._answer.asked
    assert not ring.events


def test_leaves_nothing_behind(registry: HookRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, no model that the host believes loaded."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = list(comfy.model_management.current_loaded_models)

    exercise(registry)

    assert not list(tmp_path.iterdir())
    assert loaded == comfy.model_management.current_loaded_models


def test_says_nothing(registry: HookRegistry, caplog: pytest.LogCaptureFixture) -> None:
    """The host's "loaded completely" would be about a model that no user knows; later lines come through."""
    caplog.set_level(logging.INFO)

    exercise(registry)
    logging.info("later")

    assert ["later"] == [record.message for record in caplog.records]


@pytest.mark.parametrize("name", sorted(EXERCISED))
def test_does_not_mind_an_absent_hook(name: str) -> None:
    """Without one hook the others fire all the same."""
    with installed(without=name) as registry:
        exercise(registry)

        assert EXERCISED - {name} == fired(registry)


def test_without_any_hook_does_nothing() -> None:
    """A plugin whose hooks all declined still starts."""
    exercise(HookRegistry((), Policies()))


def test_a_host_that_fails_half_way_is_not_our_end(registry: HookRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks before it are known to fire, the log's level is back, and calls are no longer only counted."""
    monkeypatch.delattr(comfy.model_patcher.ModelPatcher, "partially_load")
    before = logging.getLogger().level

    exercise(registry)

    assert before == logging.getLogger().level
    assert "comfy.model_management.LoadedModel.model_load" in fired(registry)
    assert "comfy.model_management.LoadedModel.model_unload" not in fired(registry)
    comfy.model_management.load_models_gpu([])
    assert registry._answer.asked


def test_an_interrupt_goes_up_and_the_log_is_heard_again(registry: HookRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the start stops the start, and nothing stays muted."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", interrupt)
    before = logging.getLogger().level

    with pytest.raises(KeyboardInterrupt):
        exercise(registry)

    assert before == logging.getLogger().level
    assert not registry._probing


def test_every_exercised_hook_understands_its_call(registry: HookRegistry, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls with the hooks live: each becomes its request, and no hook disarms itself."""
    monkeypatch.setattr(registry, "probing", contextlib.nullcontext)
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 1)  # else there is nothing to ask about pinning
    asked: list[Request] = []

    def answer(request: Request, host: Callable[[Request], Any]) -> Any:
        asked.append(request)
        return False if isinstance(request, PinMemory) else host(request)  # the host would need a GPU

    monkeypatch.setattr(registry, "_answer", answer)

    exercise(registry)

    assert not ring.named("hook.failed")
    elsewhere = {PatchWeight, ScaleTiles}  # questions about GGUF layers and VAEs only
    expected = {hook.asks for hook in HOOKS if hook.name in EXERCISED} - elsewhere
    assert expected == {type(request) for request in asked}
