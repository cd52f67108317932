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
import torch
from residency.hooks import HookRegistry, loader_nodes
from residency.policies.requests import OpenModel, Request

_PACK = '''
import functools

import comfy.sd


def state_dict(path, with_metadata=False):
    return ({}, {"metadata": {}}) if with_metadata else {}


def logged(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)
    return call


class Loader:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, file_name, dequant_dtype=None, patch_on_device=False):
        if False:
            comfy.sd.load_diffusion_model_state_dict(state_dict(file_name))
        return ("pack's", file_name, dequant_dtype)


class Advanced(Loader):
    pass


class WithMetadata:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @logged
    def load(self, file_name):
        sd, extra = state_dict(file_name, True)
        return (opened(sd, **extra), "pack's")


def opened(sd, metadata=None):
    return [comfy.sd.load_diffusion_model_state_dict(each, metadata=metadata) for each in (sd,)]


class Merger:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "merge"

    def merge(self, model):
        return (model,)


class TextLoader:
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"

    def load_data(self, paths):
        return [state_dict(path) for path in paths]

    def load_patcher(self, paths, data):
        return comfy.sd.load_text_encoder_state_dicts(state_dicts=data)

    def load_clip(self, name, type="stable_diffusion", device="default"):
        if True:
            return ("pack's", name)
        return (self.load_patcher([name], self.load_data([name])),)


class FourTexts(TextLoader):
    def load_clip(self, name1, name2=None, name3=None, name4=None, name5=None, clip_type=None, *rest, **more):
        if rest or more:
            return ("pack's", rest, more)
        return (self.load_patcher([name1, name2, name3, name4], self.load_data([])),)


class Refiner(TextLoader):
    def load_clip(self, clip, name):
        return (self.load_patcher([name], clip), "pack's")


class OfAnotherKind:
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    def load(self, file_name):
        return (comfy.sd.load_diffusion_model_state_dict({}),)


class Later:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    async def load(self, file_name):
        return (comfy.sd.load_diffusion_model_state_dict({}),)


class Broken:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "nothing"


def made():
    class Local(Loader):
        def load(self, file_name):
            return (comfy.sd.load_diffusion_model_state_dict({}),)
    return Local
'''
FILES = {("unet_gguf", "a.gguf"), ("text_encoders", "l.safetensors"), ("text_encoders", "G.GGUF"), ("clip_gguf", "t5.gguf"),
         ("text_encoders", "llama.gguf")}


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
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)] + [module.made()]
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", {kind.__name__: kind for kind in kinds} | {"Again": module.Loader})
    folders = ("unet_gguf", "diffusion_models", "text_encoders", "clip_gguf", "embeddings")
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {folder: ([f"/{folder}"], set()) for folder in folders})
    monkeypatch.setattr(folder_paths, "get_full_path",
                        lambda folder, name: f"/{folder}/{name}" if (folder, name) in FILES else None)
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda path, model_options: f"stock {path}")
    monkeypatch.setattr(comfy.sd, "load_clip", lambda **arguments: arguments)
    return module


@pytest.fixture
def host(pack: Any) -> Iterator[Host]:
    made = Host()
    yield made
    made.registry.remove_all()


def test_nodes_are_found_by_what_they_do(pack: Any) -> None:
    """Loaders that hand the host state dicts, by themselves or through what they call, where they are defined; not what
    returns something else, not a node without its function, and none that cannot be hooked."""
    expected = {"Loader.load", "WithMetadata.load", "TextLoader.load_clip", "FourTexts.load_clip", "Refiner.load_clip"}

    assert {f"fake_pack.{name}" for name in expected} == {hook.name for hook in loader_nodes.found()}


@pytest.mark.parametrize("call", [
    lambda node: node.load("a.gguf", "float16"),
    lambda node: node.load(dequant_dtype="float16", file_name="a.gguf"),
])
def test_a_model_is_opened_as_the_stock_node_opens_it(pack: Any, host: Host, call: Callable[[Any], Any]) -> None:
    """What the user chose besides the file is named; a default is no choice."""
    host.add()

    assert ("stock /unet_gguf/a.gguf",) == call(pack.Advanced())
    assert [OpenModel(("/unet_gguf/a.gguf",), superseded={"dequant_dtype": "float16"})] == host.asked


def test_a_pack_that_reads_metadata_too_is_no_other(pack: Any, host: Host) -> None:
    """Whatever its own functions hand around."""
    host.add()

    assert ("stock /unet_gguf/a.gguf",) == pack.WithMetadata().load("a.gguf")


@pytest.mark.parametrize("arguments", [("gone.gguf",), ("a.safetensors",), ("a.gguf", "b.gguf"), ("a.gguf", "l.safetensors"),
                                       ("a.gguf", torch.zeros(2))])
def test_what_is_not_one_gguf_file_is_the_nodes_own(pack: Any, host: Host, arguments: tuple[Any, ...]) -> None:
    """One that is not there, another format, two of them, and a node that takes more than choices."""
    host.add()

    assert "pack's" == pack.Loader().load(*arguments)[0]
    assert not host.asked


@pytest.mark.parametrize(("chosen", "kind"), [({}, "STABLE_DIFFUSION"), ({"type": "wan"}, "WAN"), ({"type": "nonsense"},
                                              "STABLE_DIFFUSION"), ({"type": "SD3", "device": "default"}, "SD3")])
def test_a_text_encoder_is_opened_as_the_stock_node_opens_it(pack: Any, host: Host, chosen: dict[str, Any], kind: str) -> None:
    """With the type that the user chose, or that the node has as its default."""
    host.add()

    (opened,) = pack.TextLoader().load_clip("t5.gguf", **chosen)

    assert {"ckpt_paths": ["/clip_gguf/t5.gguf"], "embedding_directory": ["/embeddings"],
            "clip_type": comfy.sd.CLIPType[kind], "model_options": {}} == opened
    (asked,) = host.asked
    assert asked.text_encoder
    assert not asked.superseded


def test_a_text_encoder_may_stay_on_the_cpu(pack: Any, host: Host) -> None:
    """As on the stock node; and any other device is the pack's to understand."""
    host.add()

    (opened,) = pack.TextLoader().load_clip("t5.gguf", device="cpu")

    assert dict.fromkeys(("load_device", "offload_device"), torch.device("cpu")) == opened["model_options"]
    assert [{}] == [asked.superseded for asked in host.asked]
    host.asked.clear()
    assert ("pack's", "t5.gguf") == pack.TextLoader().load_clip("t5.gguf", device="cuda:1")
    assert not host.asked


def test_several_files_make_one_encoder(pack: Any, host: Host) -> None:
    """In the order of the choices, GGUF or not; the type is known by what it is, whatever it is called."""
    host.add()

    (opened,) = pack.FourTexts().load_clip("l.safetensors", name4="llama.gguf", name3="t5.gguf", name2="G.GGUF",
                                           clip_type="hidream")

    assert ["/text_encoders/l.safetensors", "/text_encoders/G.GGUF", "/clip_gguf/t5.gguf",
            "/text_encoders/llama.gguf"] == opened["ckpt_paths"]
    assert comfy.sd.CLIPType.HIDREAM is opened["clip_type"]
    assert [{}] == [asked.superseded for asked in host.asked]


@pytest.mark.parametrize(("arguments", "more"), [
    (("t5.gguf", None, None, None, None, None, "rest"), {"later": 1}), (("l.safetensors",), {"name9": ["t5.gguf"]}),
])
def test_what_the_node_hands_on_unseen_is_its_own(pack: Any, host: Host, arguments: tuple[Any, ...],
                                                  more: dict[str, Any]) -> None:
    """There may be a file in it."""
    host.add()

    assert "pack's" == pack.FourTexts().load_clip(*arguments, **more)[0]
    assert not host.asked


@pytest.mark.parametrize("call", [
    lambda pack: pack.TextLoader().load_clip("l.safetensors"), lambda pack: pack.TextLoader().load_clip("gone.gguf"),
    lambda pack: pack.Refiner().load_clip([], "l.safetensors"),
])
def test_encoders_without_gguf_are_the_nodes_own(pack: Any, host: Host, call: Callable[[Any], Any],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """And files that are not there."""
    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", lambda state_dicts: "by the pack")
    host.add()

    assert "pack's" in call(pack)
    assert not host.asked


def test_nodes_that_come_later_are_found_once(pack: Any, host: Host) -> None:
    """The list is gone through before each prompt."""
    host.add()
    wrapped, entries = vars(pack.Loader)["load"], list(host.registry.entries)
    host.add()

    assert wrapped is vars(pack.Loader)["load"]
    assert entries == list(host.registry.entries)


def test_a_node_is_its_own_again_when_the_hooks_are_removed(pack: Any, host: Host) -> None:
    """Nothing of ours stays on the class."""
    original = vars(pack.Loader)["load"]
    host.add()
    assert original is not vars(pack.Loader)["load"]

    host.registry.remove_all()

    assert original is vars(pack.Loader)["load"]
