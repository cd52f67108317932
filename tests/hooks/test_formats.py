"""What the host is taught about GGUF files, and how it is taken back."""
from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.memory_management
import folder_paths
import gguf
import pytest
import torch
from residency.hooks.host import Formats, Reading


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[str], set[str]]]:
    """Folders that share one set of extensions, as the host's do, and a list of files that is known already."""
    shared = {".safetensors"}
    kinds = "diffusion_models", "text_encoders", "loras"
    made: dict[str, tuple[list[str], set[str]]] = {kind: ([], shared) for kind in kinds}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", made)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {"diffusion_models": ([], {}, 0.0), "loras": ([], {}, 0.0)})
    return made


@pytest.fixture
def formats() -> Iterator[Formats]:
    made = Formats()
    yield made
    made.offer_gguf(False)


def test_files_are_offered_in_their_folders_only(formats: Formats, folders: dict[str, tuple[list[str], set[str]]]) -> None:
    """The set that other folders share stays as it is."""
    formats.offer_gguf(True)

    assert {"diffusion_models": True, "text_encoders": True, "loras": False} == {
        kind: ".gguf" in extensions for kind, (_, extensions) in folders.items()}


def test_an_offer_is_taken_back(formats: Formats, folders: dict[str, tuple[list[str], set[str]]]) -> None:
    """When the last who made it takes it back: with new settings, one policy starts before another is closed."""
    for offered in (True, True, False):
        formats.offer_gguf(offered)
    assert ".gguf" in folders["diffusion_models"][1]

    formats.offer_gguf(False)
    assert not any(".gguf" in extensions for _, extensions in folders.values())


def test_lists_of_files_are_made_anew(formats: Formats) -> None:
    """Of the folders that changed."""
    formats.offer_gguf(True)

    assert ["loras"] == list(folder_paths.filename_list_cache)


def test_a_folder_that_the_host_lacks_is_left_out(formats: Formats, folders: dict[str, tuple[list[str], set[str]]]) -> None:
    """Older hosts have other names."""
    del folders["text_encoders"]

    formats.offer_gguf(True)

    assert "text_encoders" not in folders


def test_the_gguf_packages_reader_is_its_own_again(formats: Formats) -> None:
    """Packs that read files by themselves get it."""
    before = gguf.GGUFReader
    formats.offer_gguf(True)
    assert gguf.GGUFReader is not before

    formats.offer_gguf(False)

    assert gguf.GGUFReader is before


def test_a_host_without_quantised_tensors_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package for them is missing, or an older one."""
    assert Formats().no_gguf() is None
    for name in ("layout", "ops", "saving"):
        monkeypatch.delitem(sys.modules, f"residency.hooks.gguf_weights.{name}", raising=False)
        monkeypatch.delattr(f"residency.hooks.gguf_weights.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "comfy_kitchen.tensor", None)

    assert str(Formats().no_gguf()).startswith("this ComfyUI has no quantised tensors (")


class TestLocating:
    """A host with dynamic VRAM reads a tensor from the file itself."""

    @pytest.fixture
    def tensor(self) -> torch.Tensor:
        return torch.zeros(4, dtype=torch.uint8)

    def test_a_tensor_carries_its_place_in_the_file(self, tensor: torch.Tensor, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
        """In the host's own words, and the host's own code reads it."""
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
        path = tmp_path / "file"
        path.write_bytes(b"0123456789")
        with path.open("rb") as file:
            Reading().locate(tensor, file, 3)
            copy = torch.empty_like(tensor)

            assert comfy.memory_management.read_tensor_file_slice_into(tensor, copy)
        assert bytes(copy.tolist()) == b"3456"

    def test_a_host_without_dynamic_vram_is_told_nothing(self, tensor: torch.Tensor, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"0123456789")
        with (tmp_path / "file").open("rb") as file:
            Reading().locate(tensor, file, 3)

        assert not hasattr(tensor.untyped_storage(), "_comfy_tensor_file_slice")

    @pytest.mark.parametrize("fields", [None, ("file_ref", "offset", "size", "something_new")])
    def test_a_host_that_reads_in_another_way_is_told_nothing(self, tensor: torch.Tensor, tmp_path: Path, fields: Any,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
        """It copies from the mapping then."""
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
        if fields is None:
            monkeypatch.delattr(comfy.memory_management, "TensorFileSlice")
        else:
            monkeypatch.setattr(comfy.memory_management, "TensorFileSlice", namedtuple("TensorFileSlice", fields))
        (tmp_path / "file").write_bytes(b"0123456789")
        with (tmp_path / "file").open("rb") as file:
            Reading().locate(tensor, file, 3)

        assert not hasattr(tensor.untyped_storage(), "_comfy_tensor_file_slice")
