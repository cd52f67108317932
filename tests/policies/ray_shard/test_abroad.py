"""What is asked of workers on other hosts before a parcel is sent, and what is sent beside it."""
from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("ray")

from residency.policies.files.bank import Bank
from residency.policies.ray_shard import abroad, actor, freight
from residency.policies.ray_shard.freight import Freighter
from residency.policies.ray_shard.workers import Worker
from residency.telemetry.sinks import Ring


class Handle:
    """A worker's process; `has` is what it says of each file."""

    def __init__(self, has: bool) -> None:
        self.has, self.asked = has, list[tuple[Any, ...]]()
        self.ask = self

    def remote(self, what: str, *arguments: Any) -> Any:
        self.asked.append((what, *arguments))
        return [self.has] * len(arguments[0]) if what == "has" else None

    def heard(self, what: str) -> list[tuple[Any, ...]]:
        return [tuple(arguments) for name, *arguments in self.asked if name == what]


class Crew:
    def gather(self, asked: Mapping[Worker, Any], seconds: float) -> list[Any]:
        return list(asked.values())

    def tell(self, *arguments: Any) -> None: ...


class Remote:
    """A model whose weights are a file's."""

    kind = "diffusion_model"

    def __init__(self, path: str) -> None:
        self.module = torch.nn.Module()
        for name, value in load_file(path).items():
            self.module.register_parameter(name, torch.nn.Parameter(value, False))
        self.lora: dict[str, torch.Tensor] = {}

    def as_built(self) -> Any:
        return self.module

    def unpaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def token(self) -> object:
        return len(self.lora)

    def patches(self) -> Mapping[str, Any]:
        return self.lora

    def known(self) -> Mapping[int, str]:
        return {}


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was put into the store."""
    stored: list[Any] = []

    class Store:
        exceptions = freight.ray.exceptions

        @staticmethod
        def put(value: Any) -> Any:
            stored.append(value)
            return value

    monkeypatch.setattr(abroad, "ray", Store)
    monkeypatch.setattr(freight, "ray", Store)
    return stored


@pytest.fixture
def path(tmp_path: Path) -> str:
    save_file({"one": torch.randn(600, 600), "two": torch.randn(2000)}, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def hire(*hosts: tuple[str, bool]) -> list[Worker]:
    return [Worker(rank, "cpu", 1.0, Handle(has), host=host) for rank, (host, has) in enumerate(hosts)]


def deliver(remote: Remote, workers: Sequence[Worker]) -> Callable[[], Any]:
    freighter = Freighter(cast(Any, Crew()), Bank())
    freighter.pack(cast(Any, remote))

    def again() -> Any:
        return freighter.deliver(cast(Any, remote), workers)

    again()
    return again


def pieces(stored: list[Any]) -> list[Any]:
    return [one for one in stored if isinstance(one, abroad.Pieces)]


def test_workers_of_this_machine_are_asked_nothing(path: str, stored: list[Any], ring: Ring) -> None:
    """They map the file."""
    workers = hire(("", False), ("", False))
    deliver(Remote(path), workers)
    assert [len(worker.handle.heard("load")[0]) for worker in workers] == [3, 3]
    assert not any(worker.handle.heard("has") for worker in workers)
    assert "sent_bytes" not in ring.named("shard.loaded")[0].fields


def test_a_host_that_has_the_file_is_sent_nothing(path: str, stored: list[Any], ring: Ring) -> None:
    """It was asked first."""
    (worker,) = hire(("box", True))
    deliver(Remote(path), [worker])
    assert [what for what, *_ in worker.handle.asked] == ["has", "load", "patch"]
    assert len(worker.handle.heard("load")[0]) == 3
    assert pieces(stored) == []
    assert "sent_bytes" not in ring.named("shard.loaded")[0].fields


def test_what_is_missing_is_stored_once_for_all(path: str, stored: list[Any], ring: Ring) -> None:
    """Those who lack it get it with the model; who is replaced gets the same."""
    workers = hire(("", False), ("box", False), ("box", False), ("other", True))
    again = deliver(Remote(path), workers)
    (sent,) = pieces(stored)
    assert [worker.handle.heard("load")[0][3:] for worker in workers] == [(), (sent,), (sent,), ()]
    assert ring.named("shard.loaded")[0].fields["sent_bytes"] == {"box": 600 * 600 * 4 + 2000 * 4}
    workers[1].forget()
    again()
    assert workers[1].handle.heard("load")[1][3:] == (sent,)
    assert len(pieces(stored)) == 1


def test_a_loras_file_is_looked_for_too(path: str, stored: list[Any], tmp_path: Path) -> None:
    """By itself, when it comes."""
    remote, (worker,) = Remote(path), hire(("box", False))
    again = deliver(remote, [worker])
    shutil.copy(path, tmp_path / "lora.safetensors")
    remote.lora = load_file(tmp_path / "lora.safetensors")
    again()
    assert len(worker.handle.heard("has")) == 2
    sent = worker.handle.heard("patch")[1][3:]
    assert [one.name.path for one in sent] == [str(tmp_path / "lora.safetensors")]




@pytest.fixture
def twin(tmp_path: Path) -> dict[str, Any]:
    """A machine with both."""
    for folder, file, package in (("ComfyUI", "comfyui_version.py", "comfy"), ("Residency", "__init__.py", "policies")):
        (tmp_path / folder / package / "deep").mkdir(parents=True)
        (tmp_path / folder / file).write_text(f'"""{folder}"""\n__version__ = "1.2.3"\n')
        (tmp_path / folder / package / "deep" / "code.py").write_text("x = 1\n")
    return {"root": str(tmp_path / "ComfyUI"), "folder": str(tmp_path / "Residency"), "host": "box"}


class TestTheSameThere:
    def test_what_is_the_same(self, twin: dict[str, Any]) -> None:
        """Whatever else is in the folders."""
        known = actor.sources(twin)
        Path(twin["root"], "output").mkdir()
        Path(twin["root"], "comfy", "notes.txt").write_text("mine")
        actor.must_be_alike({**twin, "sources": known})
        assert known["ComfyUI"][0] == "1.2.3"

    @pytest.mark.parametrize(("key", "words"), [("root", "ComfyUI is not at .*ComfyUI on host box: install it at the same"),
                                                ("folder", "Residency is not at .*Residency on host box")])
    def test_what_is_not_there(self, twin: dict[str, Any], key: str, words: str) -> None:
        """The path is named, and the cure."""
        known = actor.sources(twin)
        shutil.rmtree(twin[key])
        with pytest.raises(FileNotFoundError, match=words):
            actor.must_be_alike({**twin, "sources": known})

    @pytest.mark.parametrize(("key", "file", "words"), [
        ("root", "comfyui_version.py", r"ComfyUI at .* on host box is 9, and ComfyUI's machine has 1\.2\.3"),
        ("root", "comfy/deep/code.py", r"ComfyUI at .* has other sources, and ComfyUI's machine has 1\.2\.3: install the same"),
        ("root", "comfy/more.py", "other sources"),
        ("folder", "policies/deep/code.py", "Residency at .* other sources"),
    ])
    def test_what_is_another_one(self, twin: dict[str, Any], key: str, file: str, words: str) -> None:
        """By its version, or by its sources."""
        known = actor.sources(twin)
        Path(twin[key], file).write_text('__version__ = "9"')
        with pytest.raises(RuntimeError, match=words):
            actor.must_be_alike({**twin, "sources": known})

    def test_a_version_that_is_not_said(self, twin: dict[str, Any]) -> None:
        """The sources tell."""
        Path(twin["root"], "comfyui_version.py").unlink()
        assert actor.sources(twin)["ComfyUI"][0] == "an unknown version"

    def test_the_shell_looks_before_it_imports_anything(self, twin: dict[str, Any]) -> None:
        """What it would import may be another program."""
        shell = actor.Actor({})
        with pytest.raises(RuntimeError, match="other sources"):
            shell.start({**twin, "sources": {"ComfyUI": ("1.2.3", ""), "Residency": ("1.2.3", "")}}, {})
