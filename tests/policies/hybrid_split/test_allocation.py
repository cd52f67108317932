"""The strings that say where weights live: what they mean, and in which words they are refused."""
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from residency import policies
from residency.policies.hybrid_split.allocation import Allocation, normal
from residency.settings import SettingsError, load

GB, MB = 2**30, 2**20
TOTALS = {"cuda:0": 24 * GB, "cuda:1": 8 * GB, "cpu": 64 * GB}


def total_of(device: str) -> int:
    return TOTALS.get(device, 0)


def donors(text: str, model: int = 20 * GB, compute: str = "cuda:0") -> list[tuple[str, int]]:
    return [share[:2] for share in Allocation.parse(text).donors(compute, model, total_of)]


def share(text: str, model: int = 20 * GB, device: str = "cuda:0") -> int | None:
    return Allocation.parse(text).bytes_for(device, model, total_of)


def test_bytes_percent_fractions_and_the_rest() -> None:
    """Of 20 GB: 8 GB, a quarter of the model, half of the device's 8 GB, and what is left."""
    assert share("cuda:0,8gb;cpu,*") == 8 * GB
    assert share("cuda:0,25%;cpu,*") == 5 * GB
    assert share("cuda:1,0.5;cpu,*", device="cuda:1") == 4 * GB
    assert share("cuda:0,*;cpu,2gb") == 18 * GB
    assert donors("cuda:0,8gb;cuda:1,3gb;cpu,*") == [("cuda:1", 3 * GB), ("cpu", 17 * GB)]


@pytest.mark.parametrize(("amount", "size"), [
    ("8gb", 8 * GB), ("8g", 8 * GB), ("1.5gb", 3 * GB // 2), (".5g", GB // 2), ("500mb", 500 * MB), ("500m", 500 * MB),
    ("64kb", 2**16), ("4096b", 4096), ("0gb", 0), ("0", 0), ("0.25", 6 * GB), ("1", 24 * GB), ("100%", 20 * GB), ("0%", 0)])
def test_units(amount: str, size: int) -> None:
    """A gigabyte is 2**30 bytes, as everywhere in the settings."""
    assert share(f"cuda:0,{amount}") == size


@pytest.mark.parametrize("text", ["CUDA:0, 8 GB ; Cuda:1,3Gb; CPU , *", "cuda:0,8gb;cuda:1,3gb", "cuda,8gb;cuda:1,3gb;cpu,*;",
                                  "\tcuda:0,8gb;\n cuda:1,3gb"])
def test_spaces_case_a_first_device_without_its_number_and_ram_need_not_be_written(text: str) -> None:
    """All of these are one string."""
    assert Allocation.parse(text) == Allocation.parse("cuda:0,8gb;cuda:1,3gb;cpu,*")


def test_a_device_that_is_not_named_has_no_share() -> None:
    """Then the budget is ComfyUI's."""
    assert share("cuda:1,3gb;cpu,*") is None
    assert not Allocation.parse("")
    assert not Allocation.parse(" ; ")


def test_bytes_and_fractions_are_a_limit_for_all_models_together() -> None:
    """A card lends 3 GB; a quarter of the model is a quarter of each model."""
    found = Allocation.parse("cuda:1,3gb;cuda:2,0.5;cuda:3,25%;cpu,*").donors("cuda:0", GB, total_of)
    assert [share.of_model for share in found] == [False, False, True, True]


def test_ram_keeps_its_place_in_the_order() -> None:
    """2 GB stay in RAM before the second card gets anything."""
    assert donors("cuda:0,4gb;cpu,2gb;cuda:1,*") == [("cpu", 2 * GB), ("cuda:1", 18 * GB)]


def test_the_rest_on_a_donor_is_what_the_models_own_device_leaves() -> None:
    """It may take less than its share, by a module."""
    assert donors("cuda:0,4gb;cuda:1,*") == [("cuda:1", 20 * GB)]


def test_a_model_that_runs_elsewhere_has_other_donors() -> None:
    """The same string holds for a text encoder on the second card."""
    assert donors("cuda:0,8gb;cuda:1,3gb;cpu,*", compute="cuda:1") == [("cuda:0", 8 * GB), ("cpu", 12 * GB)]


def test_one_device_has_one_name() -> None:
    """ComfyUI says `mps` where torch says `mps:0`."""
    assert [normal(name) for name in ("cuda", "cuda:0", "cuda:1", "mps", "cpu", "cpu:0")] == [
        "cuda:0", "cuda:0", "cuda:1", "mps:0", "cpu", "cpu"]


@pytest.mark.parametrize(("text", "words"), [
    ("cuda:0,8tb", "'cuda:0,8tb': unknown unit 'tb'; known are gb"),
    ("cuda:0,8gb;cuda:1,*;cpu,*", "'cpu,*': only one device can hold the rest"),
    ("cuda:0,8gb;cuda,3gb", "'cuda,3gb': cuda:0 is there twice"),
    ("cuda:0,60%;cuda:1,50%", "the percentages add up to 110"),
    ("cuda:0,101%", "'cuda:0,101%' is more than the whole model"),
    ("cuda:0", "'cuda:0' must be a device, one comma and an amount: write it like"),
    ("cuda:0,2,5gb", "'cuda:0,2,5gb' must be a device, one comma"),
    ("cuda:0,", "'' is no amount"),
    ("cuda:0,-1gb", "'-1gb' is no amount"),
    ("cuda:0,nan", "'nan' is no amount"),
    ("cuda:0,8", "8 of what? Write 8gb, 8%, or a fraction"),
    ("cuda:x,8gb", "'cuda:x' is no device"),
    ("1,8gb", "'1' is no device"),
    (f"cuda:0,{'9' * 400}gb", "more than any device has"),
    ("cuda:0;4;cpu", "must be a device, one comma"),
])
def test_what_means_nothing_is_refused_with_the_part_and_the_cure(text: str, words: str, tmp_path: Path) -> None:
    """By the settings, with the file and the key; for all models and in a rule."""
    file = tmp_path / "settings.toml"
    for table, key in ((f'[hybrid_split]\ndevices = "{text}"', "hybrid_split.devices"),
                       (f'[[hybrid_split.rules]]\ndevices = "{text}"', "hybrid_split.rules.devices")):
        file.write_text(table)
        with pytest.raises(SettingsError) as refused:
            load([file], policies.tables())
        assert str(refused.value).startswith(f"{file}: '{key}': ")
        assert words in str(refused.value)


amounts = st.one_of(st.integers(0, 10**6).map("{}mb".format), st.integers(0, 25).map("{}%".format),
                    st.floats(0, 1).map("{:.6f}".format))
devices = st.lists(st.sampled_from(["cuda:0", "cuda:1", "cuda:2", "cpu"]), min_size=1, max_size=4, unique=True)


@given(devices, st.lists(amounts, min_size=4, max_size=4), st.none() | st.integers(0, 3), st.integers(0, 2**40),
       st.sampled_from(["cuda:0", "cuda:3", "cpu"]))
def test_every_byte_has_a_place_and_no_share_is_negative(names: list[str], sizes: list[str], rest: int | None, model: int,
                                                         compute: str) -> None:
    """Whatever the string: what the devices hold at most, with the rest, is the model or more; order and shares stay."""
    parts = [f"{name},{'*' if index == rest else size}" for index, (name, size) in enumerate(zip(names, sizes, strict=False))]
    allocation = Allocation.parse(" ; ".join(parts))
    found = allocation.donors(compute, model, total_of)

    assert [device for device, _, _ in found if device in names] == [name for name in names if name != compute]
    assert all(size >= 0 for _, size, _ in found)
    own = allocation.bytes_for(compute, model, total_of)
    assert (own is None) == all(place.device != compute for place in allocation.places)
    if any(place.unit == "rest" for place in allocation.places):
        assert (own or 0) + sum(size for _, size, _ in found) >= model
    for device, size, _ in found:
        place = next(place for place in allocation.places if place.device == device)
        assert size <= model if place.unit == "rest" else size == place.bytes_of(model, total_of)


@given(st.text(max_size=40) | st.text("cuda:01,;*%.gbm ", max_size=40))
def test_any_text_is_taken_or_refused(text: str) -> None:
    """Never a crash of another kind."""
    try:
        allocation = Allocation.parse(text)
    except ValueError:
        return
    for compute in ("cuda:0", "cpu"):
        allocation.bytes_for(compute, GB, total_of)
        assert all(size >= 0 for _, size, _ in allocation.donors(compute, GB, total_of))
