"""Nodes that read GGUF files by themselves are found by what they do, and open them as the stock loader does."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import comfy.sd
import folder_paths
import nodes
import pytest
from residency.hooks import HookRegistry, loader_nodes
from residency.policies.requests import OpenModel, Request

_PACK = '''
import comfy.sd


class Loader:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, file_name, dequant_dtype=None, patch_on_device=False):
        if False:
            comfy.sd.load_diffusion_model_state_dict({})
        return ("pack's", file_name, dequant_dtype)


class Advanced(Loader):
    pass


class Merger:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "merge"

    def merge(self, model):
        return (model,)


class TextLoader:
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    def load(self, file_name):
        return (comfy.sd.load_diffusion_model_state_dict({}),)


class Broken:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "nothing"
'''


class Host:
    """A registry that opens models as stock, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.registry = HookRegistry((), self.answer)

    def answer(self, request: Request, host: Callable[[Request], Any]) -> Any:
        self.asked.append(request)
        assert isinstance(request, OpenModel)
        return host(replace(request, stock=True))

    def add(self) -> None:
        self.registry.add(loader_nodes.found(), {OpenModel})


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("fake_pack")
    monkeypatch.setitem(sys.modules, "fake_pack", module)
    exec(_PACK, vars(module))
    kinds = (module.Loader, module.Advanced, module.Merger, module.TextLoader, module.Broken)
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", {kind.__name__: kind for kind in kinds} | {"Again": module.Loader})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"unet_gguf": ([], {".gguf"}), "diffusion_models": ([], set())})
    monkeypatch.setattr(folder_paths, "get_full_path",
                        lambda folder, name: f"/{folder}/{name}" if (folder, name) == ("unet_gguf", "a.gguf") else None)
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda path, model_options: f"stock {path}")
    return module


@pytest.fixture
def host(pack: Any) -> Iterator[Host]:
    made = Host()
    yield made
    made.registry.remove_all()


def test_nodes_are_found_by_what_they_do(pack: Any) -> None:
    """A model loader that hands the host a state dict, where it is defined; not a merger, not a node without its function."""
    assert {"fake_pack.Loader.load"} == {hook.name for hook in loader_nodes.found()}


@pytest.mark.parametrize("call", [
    lambda node: node.load("a.gguf", "float16"),
    lambda node: node.load(dequant_dtype="float16", file_name="a.gguf"),
])
def test_a_model_is_opened_as_the_stock_node_opens_it(pack: Any, host: Host, call: Callable[[Any], Any]) -> None:
    """What the user chose besides the file is named; a default is no choice."""
    host.add()

    assert ("stock /unet_gguf/a.gguf",) == call(pack.Advanced())
    assert [OpenModel("/unet_gguf/a.gguf", {"dequant_dtype": "float16"})] == host.asked


@pytest.mark.parametrize("arguments", [("gone.gguf",), ("a.safetensors",), ("a.gguf", "b.gguf")])
def test_what_is_not_one_gguf_file_is_the_nodes_own(pack: Any, host: Host, arguments: tuple[str, ...]) -> None:
    """One that is not there, another format, and two of them."""
    host.add()

    assert "pack's" == pack.Loader().load(*arguments)[0]
    assert not host.asked


def test_nodes_that_come_later_are_found_once(pack: Any, host: Host) -> None:
    """The list is gone through before each prompt."""
    host.add()
    wrapped = vars(pack.Loader)["load"]
    host.add()

    assert wrapped is vars(pack.Loader)["load"]
    assert ["fake_pack.Loader.load"] == list(host.registry.entries)


def test_a_node_is_its_own_again_when_the_hooks_are_removed(pack: Any, host: Host) -> None:
    """Nothing of ours stays on the class."""
    original = vars(pack.Loader)["load"]
    host.add()
    assert original is not vars(pack.Loader)["load"]

    host.registry.remove_all()

    assert original is vars(pack.Loader)["load"]
