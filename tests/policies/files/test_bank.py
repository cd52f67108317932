"""One mapping of each file, lent out, taken back and let go of."""
from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from residency.policies.files import bank as bank_module
from residency.policies.files import pages
from residency.policies.files.bank import Bank, Lease
from residency.telemetry.sinks import Ring
from safetensors.torch import load_file, save_file

Save = Callable[..., str]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def maps(path: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if os.path.basename(path) in line]


def give_back(lease: Lease) -> None:
    lease.tensors.clear()
    gc.collect()


def write_elsewhere(path: str) -> None:
    """Same size, other bytes, in place."""
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(0, 10**18))


def test_a_lease_has_the_files_tensors_and_metadata(save: Save) -> None:
    """What the stock reader gives, but in the mapping."""
    path = save(metadata={"key": "value"}, one=torch.arange(6.0).reshape(2, 3), two=torch.ones(5, dtype=torch.bfloat16))
    lease = Bank().lease(path)
    expected = load_file(path)
    assert set(expected) == set(lease.tensors)
    for name, tensor in expected.items():
        assert tensor.dtype == lease.tensors[name].dtype
        assert torch.equal(tensor, lease.tensors[name])
        assert lease.file.start <= lease.tensors[name].data_ptr() < lease.file.end
    assert lease.metadata == {"key": "value"}
    assert (lease.fresh, lease.file.name) == (True, "model.safetensors")


def test_tensors_are_made_in_the_callers_inference_mode(save: Save) -> None:
    """What loads inside inference mode is an inference tensor, as with the stock reader."""
    path = save()
    assert not Bank().lease(path).tensors["weight"].is_inference()
    with torch.inference_mode():
        assert Bank().lease(path).tensors["weight"].is_inference()


@linux
def test_the_next_load_reuses_the_mapping_once_the_tensors_are_gone(save: Save) -> None:
    """Same addresses, one mapping in the process."""
    bank, path = Bank(), save()
    first = bank.lease(path)
    address = first.tensors["weight"].data_ptr()
    give_back(first)
    second = bank.lease(path)
    assert not second.fresh
    assert second.file is first.file
    assert address == second.tensors["weight"].data_ptr()
    assert len(maps(path)) == 1


@linux
def test_while_tensors_live_another_load_gets_a_mapping_of_its_own(save: Save) -> None:
    """What one model writes in place never shows in another."""
    bank, path = Bank(), save()
    first, second = bank.lease(path), bank.lease(path)
    assert second.fresh
    assert first.tensors["weight"].data_ptr() != second.tensors["weight"].data_ptr()
    assert len(maps(path)) == 2
    first.tensors["weight"].zero_()
    assert torch.equal(torch.arange(1024.0), second.tensors["weight"])
    assert torch.equal(torch.arange(1024.0), load_file(path)["weight"])


@linux
def test_one_tensor_that_lives_keeps_the_mapping_leased(save: Save) -> None:
    """A view counts, whichever tensor of the file it was cut from."""
    bank, path = Bank(), save(one=torch.ones(8), two=torch.ones(8), three=torch.ones(8))
    for name in ("one", "two", "three"):
        lease = bank.lease(path)
        view = lease.tensors[name][2:4]
        give_back(lease)
        assert bank.live() == [lease.file]
        assert bank.lease(path).file is not lease.file
        del view
        gc.collect()
        assert not lease.file.in_use()
        bank.empty()


@linux
def test_a_link_to_a_file_is_served_from_the_bank_too(save: Save, tmp_path: Path) -> None:
    """Model folders are often links into a download cache."""
    link = tmp_path / "linked.safetensors"
    link.symlink_to(save("blob"))
    bank = Bank()
    give_back(bank.lease(str(link)))
    lease = bank.lease(str(link))
    assert not lease.fresh
    assert lease.file.name == "linked.safetensors"


@linux
def test_a_link_that_points_elsewhere_is_not_served_from_the_bank(save: Save, tmp_path: Path, ring: Ring) -> None:
    """The new file is read; the old one is looked for under its own name."""
    link = tmp_path / "linked.safetensors"
    link.symlink_to(save("old"))
    bank = Bank()
    first = bank.lease(str(link))
    assert pages.is_mapped(first.file.start, first.file.end, first.file.target) is True
    give_back(first)
    link.unlink()
    link.symlink_to(save("new", weight=torch.zeros(1024)))
    lease = bank.lease(str(link))
    assert lease.fresh
    assert torch.equal(torch.zeros(1024), lease.tensors["weight"])
    assert os.path.basename(first.file.target) == "old"
    bank.sweep(2**30)
    assert [event.fields["unmapped"] for event in ring.named("weights.released")] == [True]


@linux
@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_file_that_changed_is_never_served_from_the_bank(change: str, save: Save) -> None:
    """Other bytes on disk, other bytes in the model."""
    bank, path = Bank(), save()
    give_back(bank.lease(path))
    if change == "in place":
        write_elsewhere(path)
    else:
        save_file({"weight": torch.zeros(1024)}, path + ".part")
        os.replace(path + ".part", path)
    lease = bank.lease(path)
    assert lease.fresh
    assert torch.equal(load_file(path)["weight"], lease.tensors["weight"])


@linux
def test_a_mapping_that_was_written_to_is_never_served_again(save: Save) -> None:
    """A merge in place stays in the model that it was made in; the file on disk does not change."""
    bank, path = Bank(), save()
    before = Path(path).read_bytes()
    first = bank.lease(path)
    first.tensors["weight"].add_(1)
    give_back(first)
    second = bank.lease(path)
    assert second.fresh
    assert torch.equal(torch.arange(1024.0), second.tensors["weight"])
    assert before == Path(path).read_bytes()


def test_where_the_system_does_not_tell_nothing_is_served_twice(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better read again than serve what a model wrote."""
    monkeypatch.setattr(pages, "is_pristine", lambda start, end, path: None)
    bank, path = Bank(), save()
    give_back(bank.lease(path))
    assert bank.lease(path).fresh


def test_the_file_of_a_tensor_is_known_by_its_address(save: Save) -> None:
    """However the tensor came about."""
    bank = Bank()
    lease = bank.lease(save(weight=torch.arange(64.0).reshape(8, 8)))
    bank.lease(save("other.safetensors"))
    weight = lease.tensors["weight"]
    for tensor in (weight, weight.view(64), weight[3:5, 1], weight.t(), torch.nn.Parameter(weight), weight.detach(),
                   weight.view(torch.int32), weight[-1, -1]):
        assert bank.file_of(tensor) is lease.file


def test_private_copies_empty_tensors_and_other_devices_have_no_file(save: Save) -> None:
    """Only a mapping's own bytes count."""
    bank = Bank()
    weight = bank.lease(save()).tensors["weight"]
    for tensor in (weight.clone(), weight + 0, weight[:0], torch.empty(0), torch.empty(4, device="meta")):
        assert bank.file_of(tensor) is None


def test_addresses_of_a_mapping_that_is_gone_belong_to_nobody(save: Save) -> None:
    """They may be anybody's soon."""
    bank = Bank()
    lease = bank.lease(save())
    weight = lease.tensors["weight"]
    lease.file.handle = None
    assert bank.file_of(weight) is lease.file
    end = lease.file.end
    start, lease.file.start = lease.file.start, 0
    lease.file.end = 2**63  # so that any tensor would be inside
    del weight
    give_back(lease)
    assert bank.file_of(torch.ones(4)) is None
    lease.file.start, lease.file.end = start, end


def test_a_sweep_keeps_the_most_recently_used_within_the_budget(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least recently used files go first, and what is kept is counted."""
    monkeypatch.setattr(bank_module, "KEEPS_IDLE", True)
    bank = Bank()
    paths = [save(f"{index}.safetensors") for index in range(3)]
    leases = [bank.lease(path) for path in paths]
    for age, lease in zip((1.0, 3.0, 2.0), leases, strict=True):
        lease.file.used = age
        give_back(lease)
    size = os.path.getsize(paths[0])
    assert bank.sweep(2 * size) == 2 * size
    assert [path for path in paths if any(file.path == path for file in bank._files)] == paths[1:]
    assert bank.sweep(2 * size - 1) == size
    assert [file.path for file in bank._files] == [paths[1]]
    assert bank.sweep(0) == 0
    assert bank._files == []


def test_a_sweep_keeps_one_mapping_of_each_file(save: Save) -> None:
    """Two mappings of one file cost no more memory, but are no use either."""
    bank, path = Bank(), save()
    leases = [bank.lease(path), bank.lease(path)]
    for lease in leases:
        give_back(lease)
    assert bank.sweep(2**30) in (os.path.getsize(path), 0)
    assert len(bank._files) <= 1


def test_a_sweep_leaves_what_is_in_use_and_does_not_count_it(save: Save) -> None:
    """A model's mapping is the model's, whatever the budget."""
    bank = Bank()
    lease = bank.lease(save())
    assert bank.sweep(0) == 0
    assert bank.live() == [lease.file]
    assert bank.file_of(lease.tensors["weight"]) is lease.file
    assert float(lease.tensors["weight"][5]) == 5.0


def test_a_sweep_lets_go_of_files_that_changed_or_are_gone(save: Save) -> None:
    """Nobody will ever ask for them."""
    bank, changed, gone = Bank(), save("changed.safetensors"), save("gone.safetensors")
    for path in (changed, gone):
        give_back(bank.lease(path))
    write_elsewhere(changed)
    os.unlink(gone)
    assert bank.sweep(2**30) == 0
    assert bank._files == []


def test_windows_keeps_nothing_idle(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle view costs commit in full and keeps the file from being replaced."""
    monkeypatch.setattr(bank_module, "KEEPS_IDLE", False)
    bank, path = Bank(), save()
    give_back(bank.lease(path))
    assert bank.sweep(2**30) == 0
    assert bank._files == []


@linux
def test_a_release_is_recorded_with_proof_that_the_file_is_unmapped(save: Save, ring: Ring) -> None:
    """After the last tensor, not before."""
    bank, path = Bank(), save()
    lease = bank.lease(path)
    bank.empty()
    assert ring.named("weights.released") == []
    assert len(maps(path)) == 1
    give_back(lease)
    bank.sweep(0)
    fields = [event.fields for event in ring.named("weights.released")]
    assert fields == [{"file": "model.safetensors", "bytes": os.path.getsize(path), "unmapped": True}]
    assert maps(path) == []


@pytest.mark.parametrize(("mapped", "unmapped"), [(True, False), (False, True), (None, None)])
def test_a_release_says_what_the_system_says(mapped: bool | None, unmapped: bool | None, save: Save, ring: Ring,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Still mapped, unmapped, or not told."""
    monkeypatch.setattr(pages, "is_mapped", lambda start, end, path: mapped)
    bank = Bank()
    give_back(bank.lease(save()))
    bank.empty()
    assert [event.fields["unmapped"] for event in ring.named("weights.released")] == [unmapped]


def test_emptying_lets_go_of_all_that_is_idle(save: Save) -> None:
    """What models still use stays until they are gone, and is not served again after."""
    bank = Bank()
    idle, used = save("idle.safetensors"), save("used.safetensors")
    give_back(bank.lease(idle))
    lease = bank.lease(used)
    bank.empty()
    assert bank._files == [lease.file] == bank.live()
    give_back(lease)
    assert bank.lease(used).fresh


def test_a_file_of_empty_tensors_or_none_can_be_leased(save: Save, tmp_path: Path) -> None:
    """There is nothing to map, and nothing to trip over."""
    bank = Bank()
    lease = bank.lease(save(nothing=torch.empty(0, 4)))
    assert lease.tensors["nothing"].shape == (0, 4)
    assert bank.file_of(lease.tensors["nothing"]) is None
    path = tmp_path / "none.safetensors"
    save_file({}, path)
    assert bank.lease(str(path)).tensors == {}
    bank.empty()


@linux
def test_what_torch_mapped_itself_is_adopted(tmp_path: Path, ring: Ring) -> None:
    """Zip files of torch are mapped by torch; the bank knows their addresses, and when they are gone."""
    path = str(tmp_path / "model.pt")
    torch.save({"one": torch.arange(1024.0), "two": torch.ones(8, dtype=torch.int8)}, path)
    bank = Bank()
    state_dict = torch.load(path, mmap=True, weights_only=True)
    file = bank.adopt(path, state_dict.values())
    assert bank.file_of(state_dict["one"][3:]) is file
    assert bank.file_of(state_dict["two"]) is file
    assert bank.file_of(torch.ones(8)) is None
    assert bank.live() == [file]
    state_dict.clear()
    gc.collect()
    assert bank.live() == []
    bank.sweep(2**30)
    assert bank._files == []
    assert [event.fields["unmapped"] for event in ring.named("weights.released")] == [True]


@linux
def test_what_torch_read_into_private_memory_is_not_adopted(tmp_path: Path) -> None:
    """A private tensor among the mapped ones, or nothing mapped at all, does not make strangers the file's."""
    path = str(tmp_path / "model.pt")
    torch.save({"one": torch.arange(1024.0)}, path)
    bank = Bank()
    private = torch.load(path, mmap=False, weights_only=True)
    assert bank.adopt(path, private.values()) is None
    assert bank.file_of(private["one"]) is None
    mapped = torch.load(path, mmap=True, weights_only=True)
    assert bank.adopt(path, [*mapped.values(), private["one"]]) is None
    assert bank.file_of(mapped["one"]) is None
