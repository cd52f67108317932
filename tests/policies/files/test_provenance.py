"""Where tensors' bytes come from, on real files and mappings; and the same bytes mapped again."""
from __future__ import annotations

import gc
import mmap
import os
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from residency.policies.files import pages
from residency.policies.files.bank import Bank
from residency.policies.files.identity import Identity
from residency.policies.files.maps import Maps, view
from residency.policies.files.provenance import FileChanged, Finder, Provenance, extent
from safetensors.torch import load_file, save_file
from support import gguf_files

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists mappings")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file of random bytes."""
    file = tmp_path / "weights with a space.bin"
    file.write_bytes(os.urandom(SIZE))
    return str(file)


def mapped(path: str, shared: bool = False) -> torch.Tensor:
    return torch.from_file(path, shared=shared, size=SIZE, dtype=torch.uint8)


def again(found: Provenance | None, tensor: torch.Tensor, maps: Maps | None = None) -> torch.Tensor:
    """The tensor that a provenance gives."""
    assert found is not None
    return (maps or Maps()).tensor(found, tensor.dtype, tensor.shape, tensor.stride())


@linux
class TestFinding:
    def test_a_mapped_tensor_is_a_place_in_its_file(self, path: str) -> None:
        """To the byte."""
        part = mapped(path)[3 * PAGE + 100:9 * PAGE]

        assert Finder().find(part) == Provenance(path, Identity.of(path), 3 * PAGE + 100)

    def test_every_tensor_of_a_safetensors_file_is_found(self, tmp_path: Path) -> None:
        """Each gives its own bytes again."""
        file = str(tmp_path / "model.safetensors")
        save_file({f"t{index}": torch.randn(64, 32 + index) for index in range(9)}, file)
        tensors = load_file(file)
        finder = Finder()

        assert all(torch.equal(again(finder.find(tensor), tensor), tensor) for tensor in tensors.values())

    def test_a_strided_view_is_found_with_all_that_it_spans(self, path: str) -> None:
        """Its last byte counts, not its number of elements."""
        tensor = mapped(path).view(torch.int16).view(64, -1)[::2, 3:1000].t()
        found = Finder().find(tensor)

        assert torch.equal(again(found, tensor), tensor)
        assert again(found, tensor).stride() == tensor.stride()

    def test_a_clone_has_no_file(self, path: str) -> None:
        """The control."""
        assert Finder().find(mapped(path).clone()) is None

    def test_less_than_a_page_is_not_looked_up(self, path: str) -> None:
        """Nor is nothing at all."""
        assert Finder().find(mapped(path)[:100]) is None
        assert Finder().find(mapped(path)[:0]) is None

    def test_a_written_page_is_private_and_its_neighbours_are_not(self, path: str) -> None:
        """What was written to one tensor says nothing about another."""
        tensor = mapped(path)
        tensor[5 * PAGE] += 1
        finder = Finder()

        assert finder.find(tensor) is None
        assert finder.find(tensor[4 * PAGE:5 * PAGE + 1]) is None
        assert finder.find(tensor[:5 * PAGE]) is not None
        assert finder.find(tensor[6 * PAGE:]) is not None

    def test_a_write_after_the_finder_was_made_is_seen(self, path: str) -> None:
        """Pages are asked for when a tensor is."""
        tensor, finder = mapped(path), Finder()
        tensor[0] += 1

        assert finder.find(tensor) is None

    def test_memory_that_writes_to_the_file_has_no_provenance(self, path: str) -> None:
        """A later write would show in the other process."""
        assert Finder().find(mapped(path, shared=True)) is None

    def test_a_read_only_mapping_is_found(self, path: str) -> None:
        """Numpy's, for instance, which GGUF readers use."""
        array = numpy.memmap(path, mode="c")[PAGE:]
        shared = numpy.frombuffer(mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ), numpy.uint8)
        with warnings.catch_warnings():  # of memory that is not writable, which torch speaks of once
            warnings.simplefilter("ignore")
            tensor = torch.from_numpy(shared)

        assert again(Finder().find(torch.from_numpy(array)), torch.from_numpy(array)).tolist() == array.tolist()
        assert Finder().find(tensor) is not None

    def test_a_replaced_or_removed_file_is_not_named(self, path: str, tmp_path: Path) -> None:
        """What lies under the name now is another file."""
        tensor = mapped(path)
        other = tmp_path / "other"
        other.write_bytes(os.urandom(SIZE))
        os.replace(other, path)
        assert Finder().find(tensor) is None
        os.unlink(path)
        assert Finder().find(tensor) is None

    def test_a_file_cut_short_under_its_mapping_is_an_error_and_no_crash(self, path: str) -> None:
        """To read such a tensor, even to copy it, would end the process."""
        tensor = mapped(path)
        os.truncate(path, 10 * PAGE)

        with pytest.raises(FileChanged, match=r"weights with a space.bin.*Load the model again"):
            Finder().find(tensor)

    def test_a_mapping_split_by_advice_is_one(self, path: str) -> None:
        """The kernel lists it in pieces."""
        mapping = mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_COPY)
        mapping.madvise(mmap.MADV_RANDOM, 4 * PAGE, 8 * PAGE)
        assert len([region for region in pages.mapped_files() if region.path == path]) == 3

        tensor = torch.frombuffer(mapping, dtype=torch.uint8)

        assert torch.equal(again(Finder().find(tensor), tensor), tensor)

    def test_file_systems_that_list_other_numbers_are_recognised(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As btrfs does: a mapping of our own is listed with the same numbers, another file's with others."""
        tensor = mapped(path)
        listed = pages.mapped_files

        def renumbered() -> list[pages.Region]:
            return [region._replace(listed=(999, region.listed[1])) for region in listed()]

        monkeypatch.setattr(pages, "mapped_files", renumbered)
        assert Finder().find(tensor) is not None
        finder = Finder()
        monkeypatch.setattr(pages, "mapped_files", listed)
        assert finder.find(tensor) is None

    def test_three_thousand_tensors_cost_one_look_at_the_mappings(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The list is read when the finder is made."""
        tensor, reads, listed = mapped(path), [], pages.mapped_files
        monkeypatch.setattr(pages, "mapped_files", lambda: reads.append(1) or listed())
        finder = Finder()

        assert all(finder.find(tensor[index:]) is not None for index in range(3000))
        assert len(reads) == 1


class TestWhereTheSystemListsNothing:
    """Windows and macOS: the bank knows the offset, and the bytes are compared."""

    @pytest.fixture(autouse=True)
    def blind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pages, "mapped_files", lambda: [])
        monkeypatch.setattr(pages, "written", lambda start, end: None)

    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        name = str(tmp_path / "model.safetensors")
        save_file({"a": torch.randn(64, 64), "b": torch.randn(64, 64).bfloat16()}, name)
        return name

    def test_leased_tensors_are_found(self, file: str) -> None:
        bank = Bank()
        tensors = bank.lease(file).tensors
        finder = Finder(bank)

        assert all(torch.equal(again(finder.find(tensor), tensor), tensor) for tensor in tensors.values())

    def test_gguf_blocks_are_found(self, tmp_path: Path) -> None:
        array = numpy.random.default_rng(1).standard_normal((64, 128), dtype=numpy.float32)
        blocks = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        file = gguf_files.save(tmp_path / "m.gguf", "flux", {"a": array, "b": (blocks, gguf.GGMLQuantizationType.Q8_0)})
        bank = Bank()
        tensors = bank.lease(file).tensors
        finder = Finder(bank)

        assert all(torch.equal(again(finder.find(tensor), tensor), tensor) for tensor in tensors.values())

    def test_written_tensors_are_not(self, file: str) -> None:
        bank = Bank()
        tensors = bank.lease(file).tensors
        tensors["a"][5, 5] += 1

        assert Finder(bank).find(tensors["a"]) is None
        assert Finder(bank).find(tensors["b"]) is not None

    def test_without_a_bank_or_with_tensors_of_others_nothing_is_found(self, file: str) -> None:
        bank = Bank()
        tensors = load_file(file)
        bank.adopt(file, [tensors["b"]])

        assert Finder(bank).find(tensors["b"]) is None
        assert Finder().find(tensors["b"]) is None


@linux
def test_without_a_word_on_pages_the_bytes_decide(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sandboxes list mappings but not pages."""
    monkeypatch.setattr(pages, "written", lambda start, end: None)
    tensor = mapped(path)
    assert Finder().find(tensor) is not None
    tensor[7] ^= 1
    assert Finder().find(tensor) is None


class TestMapping:
    def found(self, path: str, offset: int = 0) -> Provenance:
        return Provenance(path, Identity.of(path), offset)

    def test_tensors_of_one_file_share_a_mapping_that_goes_with_the_last(self, path: str) -> None:
        maps = Maps()
        one, two = (maps.tensor(self.found(path, at), torch.uint8, (PAGE,), (1,)) for at in (0, PAGE))
        assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
        del one
        gc.collect()
        assert maps.paths() == [path]
        del two
        gc.collect()
        assert maps.paths() == []

    def test_what_is_written_stays_in_this_process(self, path: str) -> None:
        before = Path(path).read_bytes()
        Maps().tensor(self.found(path), torch.uint8, (SIZE,), (1,)).fill_(7)

        assert Path(path).read_bytes() == before

    @pytest.mark.parametrize("harm", ["overwritten", "truncated", "replaced", "removed"])
    def test_a_changed_file_is_an_error_that_names_it(self, path: str, harm: str, tmp_path: Path) -> None:
        maps, found = Maps(), self.found(path)
        kept = maps.tensor(found, torch.uint8, (PAGE,), (1,))
        if harm == "overwritten":
            Path(path).write_bytes(os.urandom(SIZE))
            os.utime(path, ns=(1, 1))
        elif harm == "truncated":
            os.truncate(path, PAGE)
        elif harm == "replaced":
            (tmp_path / "other").write_bytes(Path(path).read_bytes())
            os.replace(tmp_path / "other", path)
        else:
            os.unlink(path)

        with pytest.raises(FileChanged) as error:
            maps.tensor(found, torch.uint8, (PAGE,), (1,))
        assert path in str(error.value)
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        assert kept.numel() == PAGE

    def test_an_offset_that_the_dtype_cannot_have_is_copied(self, path: str) -> None:
        tensor = Maps().tensor(self.found(path, 3), torch.float32, (8, 8), (8, 1))

        assert tensor.view(torch.uint8).flatten().tolist() == list(Path(path).read_bytes()[3:3 + 256])

    @pytest.mark.parametrize("offset, shape, stride", [(SIZE - 4, (2,), (1,)), (-4, (1,), (1,)), (0, (2,), (SIZE,)),
                                                       (0, (-1,), (1,)), (0, (2, 2), (1,)), (0, (2,), (-1,)),
                                                       (2**62, (2**62,), (1,))])
    def test_lies_about_places_are_errors(self, path: str, offset: int, shape: Any, stride: Any) -> None:
        with pytest.raises(ValueError, match="weights with a space"):
            Maps().tensor(self.found(path, offset), torch.float32, shape, stride)

    def test_a_lie_about_the_size_does_not_lengthen_the_file(self, path: str) -> None:
        found = replace(self.found(path), identity=replace(Identity.of(path), size=2 * SIZE))

        with pytest.raises(FileChanged):
            Maps().tensor(found, torch.uint8, (2 * SIZE,), (1,))
        assert os.path.getsize(path) == SIZE

    def test_nothing_is_somewhere_too(self) -> None:
        assert view(torch.UntypedStorage(0), 0, torch.float32, (0, 3), (3, 1)).shape == (0, 3)
        assert extent(4, (0, 3), (3, 1)) == 0
        assert extent(4, (), ()) == 4

    @pytest.mark.parametrize("inference", [True, False])
    def test_tensors_are_of_the_callers_inference_mode(self, path: str, inference: bool) -> None:
        with torch.inference_mode(inference):
            assert Maps().tensor(self.found(path), torch.uint8, (PAGE,), (1,)).is_inference() is inference
