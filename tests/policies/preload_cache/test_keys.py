"""What makes two loads the same."""
from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from residency.policies.preload_cache import keys
from residency.policies.requests import LoadModel


class Kind(Enum):
    SD3 = 3
    FLUX = 6


def key(*paths: Path, kind: str = "diffusion model", **options: Any) -> keys.Key:
    request = LoadModel(kind, tuple(map(str, paths)), options, lambda answer: None)
    return keys.of(request, keys.identities(request.paths))


@pytest.mark.parametrize("different", [
    {"model_options": {"dtype": torch.float8_e4m3fn}}, {"model_options": {"dtype": torch.float16, "fp8_optimizations": True}},
    {"model_options": {"load_device": torch.device("cpu")}}, {"clip_type": Kind.FLUX}, {"embedding_directory": ["/e", "/f"]},
    {"output_vae": 1}, {"output_vae": False}, {"devices": {"VAE": "cuda:1"}},
])
def test_every_option_that_matters_is_in_the_key(file: Callable[..., Path], different: dict[str, Any]) -> None:
    """One that differs is another entry."""
    same = {"model_options": {"dtype": torch.float16}, "clip_type": Kind.SD3, "embedding_directory": ["/e"], "output_vae": True,
            "devices": {"VAE": "cuda:0"}}
    path = file()
    assert key(path, **same) == key(path, **dict(reversed(same.items())))
    assert key(path, **same) != key(path, **{**same, **different})


def test_what_the_host_says_of_dynamic_memory_is_not(file: Callable[..., Path]) -> None:
    """A load that asks to be without it is never asked about; the others are the same."""
    path = file()
    assert key(path, disable_dynamic=False) == key(path)


def test_kinds_and_the_order_of_files_differ(file: Callable[..., Path]) -> None:
    """Two text encoders are told apart by their order."""
    one, two = file("a"), file("b")
    assert key(one, two) != key(two, one)
    assert key(one) != key(one, kind="VAE")


def test_a_link_and_a_hard_link_are_the_file(file: Callable[..., Path], tmp_path: Path) -> None:
    """Identity is the inode's."""
    path = file()
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    assert key(path) == key(tmp_path / "link") == key(tmp_path / "hard")


@pytest.mark.parametrize("value", [object(), torch.nn.Linear, lambda: 0, {"custom_operations": [torch.zeros(1)]}, {1, 2}])
def test_an_option_that_cannot_be_compared_is_named(file: Callable[..., Path], value: Any) -> None:
    """It is not guessed at."""
    with pytest.raises(keys.Incomparable, match=r"^options\.model_options\S* is a \w+, which cannot be compared$"):
        key(file(), model_options=value)


def test_a_file_that_is_not_there_is_the_hosts_to_refuse(tmp_path: Path) -> None:
    """There is no key for it."""
    with pytest.raises(FileNotFoundError):
        key(tmp_path / "none")
