"""The host's start and its routes, on a real aiohttp application; and its stock loaders, asked by name."""
from __future__ import annotations

import asyncio
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.sd
import folder_paths
import nodes
import pytest
import torch
from aiohttp import web
from residency.hooks import devices
from residency.hooks import models as models_module
from residency.hooks.models import Models
from residency.hooks.startup import Server
from residency.policies.models import Recipe

PATH = "/residency/status"


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the host's module `server` has once it made its server."""
    found = types.SimpleNamespace(app=web.Application(), routes=web.RouteTableDef())
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=found)))
    return found


def run(instance: Any, then: Callable[[], None] = lambda: None) -> None:
    """Starts the application as the host does, with its routes."""
    async def start() -> None:
        instance.app.add_routes(instance.routes)
        runner = web.AppRunner(instance.app)
        await runner.setup()
        then()
        await runner.cleanup()

    asyncio.run(start())


@pytest.mark.parametrize("wait", [True, False])
def test_work_runs_before_the_port_opens_or_beside_it(instance: Any, wait: bool) -> None:
    """Either way in a thread that does not hold up the end of the process."""
    go, seen = threading.Event(), []

    def work() -> None:
        go.wait(0.2 if wait else 10)
        seen.append(threading.current_thread().daemon)

    Server().at_start(wait, work)
    run(instance, lambda: seen.append("open"))
    go.set()
    assert seen[0] == (True if wait else "open")


def test_work_starts_at_once_where_nothing_is_to_start(instance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy was turned on later, or the host is a library."""
    run(instance)
    done = threading.Event()
    Server().at_start(True, done.set)
    assert done.wait(10)
    monkeypatch.delitem(sys.modules, "server")
    done.clear()
    Server().at_start(True, done.set)
    assert done.wait(10)


def answered(instance: Any, path: str) -> tuple[int, str]:
    async def ask() -> tuple[int, str]:
        from aiohttp.test_utils import TestClient, TestServer

        instance.app.add_routes(instance.routes)
        async with TestClient(TestServer(instance.app)) as client:
            response = await client.get(path)
            return response.status, await response.text()

    return asyncio.run(ask())


def test_a_route_answers_with_json(instance: Any) -> None:
    """The last policy that published it is the one that is asked."""
    server = Server()
    server.publish(PATH, lambda: {"old": 1})
    server.publish(PATH, lambda: {"hits": 3})
    assert answered(instance, PATH) == (200, '{"hits": 3}')


def test_a_policy_that_is_turned_off_is_not_found(instance: Any) -> None:
    """It has nothing to tell."""
    Server().publish(PATH, lambda: None)
    assert answered(instance, PATH)[0] == 404


def test_a_route_that_comes_too_late_is_said(instance: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The running server takes no more."""
    run(instance)
    with caplog.at_level("INFO", "residency"):
        Server().publish(PATH, lambda: {})
    assert PATH in caplog.text


class TestModels:
    def test_options_are_the_nodes(self) -> None:
        """In the words of their lists."""
        found = Models()
        assert "fp8_e4m3fn_fast" in found.options("weight_dtype")
        assert {"flux", "sd3", "stable_diffusion"} <= set(found.options("type"))
        assert found.options("device") == ["default", "cpu"]
        assert "pixel_space" in found.choices("vaes")

    @pytest.mark.parametrize(("recipe", "owner", "name", "expected"), [
        (Recipe("checkpoints", ("c",)), nodes.CheckpointLoaderSimple, "load_checkpoint", ("c",)),
        (Recipe("diffusion_models", ("d",), weight_dtype="fp8_e5m2"), nodes.UNETLoader, "load_unet", ("d", "fp8_e5m2")),
        (Recipe("vaes", ("v",)), nodes.VAELoader, "load_vae", ("v",))])
    def test_the_stock_nodes_load(self, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, owner: Any, name: str,
                                  expected: tuple[str, ...]) -> None:
        """In inference mode, as in a prompt."""
        monkeypatch.setattr(owner, name, lambda self, *args: (args, torch.is_inference_mode_enabled()))
        assert Models().load(recipe) == (expected, True)

    def test_text_encoders_load_as_by_their_nodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One to four files."""
        monkeypatch.setattr(comfy.sd, "load_clip", lambda **arguments: arguments)
        monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: f"{kind}/{name}")
        found = Models().load(Recipe("text_encoders", ("a", "b", "c"), "sd3", "cpu"))
        assert found["ckpt_paths"] == ["text_encoders/a", "text_encoders/b", "text_encoders/c"]
        assert found["clip_type"] is comfy.sd.CLIPType.SD3
        assert found["model_options"] == {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}

    def test_an_accelerator_that_came_since_the_start_is_taken(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Where ComfyUI was told to use the CPU for want of one; asking touches no device before."""
        driver = tmp_path / "nvidiactl"
        monkeypatch.setattr(models_module, "_ACCELERATORS", (str(driver),))
        monkeypatch.setattr(comfy.model_management, "cpu_state", comfy.model_management.CPUState.CPU)
        monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.DISABLED)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(devices, "chosen", lambda: {"VAE": comfy.model_management.cpu_state.name})
        monkeypatch.setattr(comfy.cli_args.args, "cpu", True)
        found = Models()
        assert found.wake() == {}
        driver.touch()
        assert found.wake() == {"VAE": "GPU"}
        assert comfy.model_management.cpu_state is comfy.model_management.CPUState.GPU

    def test_an_accelerator_that_is_not_wanted_stays_unused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """It was there at the start, and the user said --cpu."""
        driver = tmp_path / "nvidiactl"
        driver.touch()
        monkeypatch.setattr(models_module, "_ACCELERATORS", (str(driver),))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(comfy.cli_args.args, "cpu", True)
        assert Models().wake() == {}
