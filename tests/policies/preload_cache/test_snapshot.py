"""Snapshots: weights in private memory, files that are gone after the thaw, devices that are chosen anew."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from residency.policies import Tools
from residency.policies.models import Recipe
from residency.policies.preload_cache import PreloadCache, Settings
from residency.policies.preload_cache.snapshot import materialised
from residency.policies.requests import FindFile, ListFiles, ReadWeights, Request, RunPrompt
from residency.telemetry.sinks import Ring
from safetensors.torch import save_file
from support.loads import Loader

File = Callable[..., Path]


@pytest.fixture
def policy(tools: Tools, ram: dict[str, int]) -> Iterator[PreloadCache]:
    made = PreloadCache(Settings(snapshot=True), tools)
    made._watch.wake = lambda: None  # type: ignore[method-assign]
    made.start()
    yield made
    made.close()


@pytest.fixture
def loader(policy: PreloadCache) -> Loader:
    return Loader(policy)


def ask(policy: PreloadCache, request: Request, host: Any) -> Any:
    decision = policy.decide(request)
    return host if decision is None else decision.act(lambda asked=None: host)


def test_what_is_read_is_copied_out_of_the_mapping(policy: PreloadCache, tools: Tools, tmp_path: Path) -> None:
    """The same values, and no byte of them in the file's mapping."""
    path = str(tmp_path / "a.safetensors")
    save_file({"weight": torch.arange(64.0)}, path)
    lease = tools.bank.lease(path)
    mapped = lease.tensors["weight"]

    read, metadata = ask(policy, ReadWeights(path, with_metadata=True, on_cpu=True), (dict(lease.tensors), {"a": "b"}))

    assert (torch.equal(read["weight"], mapped), metadata) == (True, {"a": "b"})
    assert tools.bank.file_of(mapped) is not None
    assert tools.bank.file_of(read["weight"]) is None


def test_lists_and_other_devices_are_handed_on(policy: PreloadCache) -> None:
    """Some files hold a list; what goes to a device directly is not in RAM."""
    assert ask(policy, ReadWeights("a.pt", with_metadata=False, on_cpu=True), [1, 2]) == [1, 2]
    assert policy.decide(ReadWeights("a.pt", with_metadata=False, on_cpu=False)) is None


def test_quantised_weights_are_copied_part_by_part() -> None:
    """What a tensor is made of, not what it stands for."""
    gguf = pytest.importorskip("residency.hooks.gguf_weights.layout")
    blocks = torch.randint(0, 255, (4, 34), dtype=torch.uint8)
    weight = gguf.wrap(blocks, 8, (4, 32))
    copied = materialised(weight)
    assert type(copied) is type(weight)
    assert torch.equal(copied._qdata, blocks)
    assert copied._qdata.data_ptr() != blocks.data_ptr()


def test_a_file_that_is_missing_after_the_thaw_is_served_and_found(loader: Loader, file: File, policy: PreloadCache) -> None:
    """By its name in the list, and by its path."""
    path = file("a")
    loader(path, recipe=Recipe("vaes", ("sub/a",)))
    path.unlink()
    assert ask(policy, RunPrompt("1", lambda: None), "ran") == "ran"
    assert ask(policy, ListFiles("vae"), ["b"]) == ["b", "sub/a"]
    assert ask(policy, ListFiles("loras"), ["b"]) == ["b"]
    assert ask(policy, FindFile("vae", "sub/a"), None) == str(path)
    assert ask(policy, FindFile("vae", "none"), None) is None
    assert (loader(path), loader.calls) == ("model 2", 1)


def test_a_folder_that_is_missing_after_the_thaw_lists_what_is_held(loader: Loader, file: File, policy: PreloadCache) -> None:
    """Where nothing is held the host's error goes up."""
    loader(file("a"), recipe=Recipe("vaes", ("a",)))

    def host(asked: Any = None) -> Any:
        raise FileNotFoundError

    decision = policy.decide(ListFiles("vae"))
    assert decision is not None
    assert decision.act(host) == ["a"]
    assert policy.decide(ListFiles("loras")) is None


def test_a_file_on_another_device_is_the_same_by_its_size_and_time(loader: Loader, file: File) -> None:
    """After the thaw inodes are others; a changed file is still another one."""
    path = file("a", 1)
    loader(path)
    stat = path.stat()
    path.rename(path.with_name("old"))
    file("a", 1)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert path.stat().st_ino != stat.st_ino
    assert (loader(path), loader.calls) == ("model 2", 1)
    file("a", 2)
    assert (loader(path), loader.calls) == ("model 1", 2)


def test_devices_are_chosen_anew_once(loader: Loader, file: File, tools: Tools, policy: PreloadCache, ring: Ring) -> None:
    """At the first prompt, before it runs; what is kept follows."""
    models: Any = tools.host.models
    server: Any = tools.host.server
    loader(file("a"), options={"devices": {"VAE": "cpu and cpu"}})
    server.started()
    models.now = {"diffusion model": "cuda:0 and cpu"}
    for _ in range(2):
        ask(policy, RunPrompt("1", lambda: None), "ran")
    assert [event.fields["devices"] for event in ring.named("snapshot.restored")] == [{"diffusion model": "cuda:0 and cpu"}]
    assert (models.woken, loader.kept[0].followed) == (1, 1)
    assert loader(file("b"), options={"devices": {"VAE": "cuda:0 and cpu"}}) == "model 1"


def test_where_no_device_changed_nothing_is_touched(loader: Loader, file: File, tools: Tools, policy: PreloadCache) -> None:
    """A thaw on the same machine."""
    server: Any = tools.host.server
    loader(file("a"))
    server.started()
    ask(policy, RunPrompt("1", lambda: None), "ran")
    assert loader.kept[0].followed == 0
