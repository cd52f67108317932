"""What the host is taught about GGUF files, and how it is taken back."""
from __future__ import annotations

import sys
from collections.abc import Iterator

import folder_paths
import gguf
import pytest
from residency.hooks.host import Formats


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
