"""A lazy `gguf.GGUFReader`: the original's results and errors, without its work."""
from __future__ import annotations

import copy
import gc
import pickle
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from residency.policies.files.gguf_lazy_reader import LazyFields, lazy_reader
from support.gguf_files import finish

Lazy = lazy_reader(GGUFReader)
WORDS = ["one", "", "zwölf", "x" * 300, "\0", "🙂"]


def write(path: Path, alignment: int | None = None, endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
    writer = gguf.GGUFWriter(path, "flux", endianess=endianess)
    if alignment:
        writer.add_custom_alignment(alignment)
    for number in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64"):
        getattr(writer, f"add_{number}")(f"a.{number}", 7)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 🙂")
    writer.add_array("words", WORDS)
    writer.add_array("numbers", [3, 1, 2])
    writer.add_array("truths", [True, False])
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        writer.add_tensor(dtype.__name__, np.arange(24).astype(dtype).reshape(2, 3, 4))
    if endianess == gguf.GGUFEndian.LITTLE:
        writer.add_tensor("blocks", np.arange(3 * 68, dtype=np.uint8).reshape(3, 68), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("brain", np.arange(16, dtype=np.uint8).reshape(2, 8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer.add_tensor("nothing", np.zeros((0, 4), np.float32))
    finish(writer)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf")


def waiting(reader: Any) -> set[str]:
    """The fields that were not built."""
    return set(reader.fields._deferred)


def same_arrays(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def assert_same_field(one: Any, other: Any) -> None:
    assert (one.offset, one.name, one.data, one.types, len(one.parts)) == (
        other.offset, other.name, other.data, other.types, len(other.parts))
    assert all(same_arrays(*parts) for parts in zip(one.parts, other.parts, strict=True))
    assert one.contents() == other.contents()


def assert_same(ours: Any, stock: GGUFReader) -> None:
    """Everything that the original has in public."""
    for name in ("alignment", "data_offset", "byte_order", "endianess"):
        assert getattr(ours, name) == getattr(stock, name)
        assert type(getattr(ours, name)) is type(getattr(stock, name))
    assert same_arrays(ours.data, stock.data)
    assert list(ours.fields) == list(stock.fields)
    for key, field in stock.fields.items():
        assert_same_field(ours.get_field(key), field)
        assert_same_field(ours.fields[key], field)
    assert ours.get_field("none") is stock.get_field("none") is None
    assert len(ours.tensors) == len(stock.tensors)
    for index, tensor in enumerate(stock.tensors):
        mine = ours.get_tensor(index)
        assert mine._fields == tensor._fields
        assert (mine.name, mine.tensor_type, mine.n_elements, mine.n_bytes, mine.data_offset) == (
            tensor.name, tensor.tensor_type, tensor.n_elements, tensor.n_bytes, tensor.data_offset)
        assert same_arrays(mine.shape, tensor.shape)
        assert same_arrays(mine.data, tensor.data)
        assert type(mine.data) is type(tensor.data)
        assert_same_field(mine.field, tensor.field)


@pytest.mark.parametrize("alignment", [None, 64])
def test_a_lazy_reader_has_what_the_original_has(alignment: int | None, tmp_path: Path) -> None:
    """All of its public surface, by value and type."""
    path = write(tmp_path / "model.gguf", alignment)
    assert_same(Lazy(path), GGUFReader(path))
    assert_same(Lazy(str(path), "r"), GGUFReader(path))
    assert issubclass(Lazy, GGUFReader)


def test_nothing_is_built_before_it_is_looked_at(model: Path) -> None:
    """Keys, length and order are free, and one field does not build another."""
    reader = Lazy(model)
    keys = set(reader.fields) - {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert (len(reader.fields), "words" in reader.fields, "none" in reader.fields) == (len(keys) + 3, True, False)
    assert waiting(reader) == keys
    assert "tensors" not in vars(reader)
    assert reader.get_field("text").contents() == "naïve 🙂"
    assert waiting(reader) == keys - {"text"}
    assert reader.tensors is reader.tensors
    assert waiting(reader) == keys - {"text"}


def test_the_name_and_types_of_an_array_are_known_without_its_parts(model: Path) -> None:
    """Packs skip arrays by their types, which must not cost what building one does."""
    field = Lazy(model).fields["words"]
    assert isinstance(field, gguf.gguf_reader.ReaderField)
    assert (field.name, field.types) == ("words", [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING])
    assert "_real" not in vars(field)
    assert field.contents(2) == "zwölf"
    assert "_real" in vars(field)


def test_a_field_of_an_array_is_the_tuple_that_it_was(model: Path) -> None:
    """Unpacked, indexed, copied and pickled."""
    ours, stock = Lazy(model).fields["words"], GGUFReader(model).fields["words"]
    offset, name, parts, data, types = ours
    assert (offset, name, data, types, len(parts)) == (stock.offset, stock.name, stock.data, stock.types, len(stock.parts))
    assert ours[3] == ours[-2] == stock.data
    assert repr(ours).startswith("ReaderField(offset=")
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours._replace(name=ours.name)):
        assert_same_field(other, stock)
    assert [ours.contents(slice(1, 3)), ours.contents(-1)] == [WORDS[1:3], WORDS[-1]]


def fields_of(path: Path) -> tuple[LazyFields, OrderedDict[str, Any]]:
    return Lazy(path).fields, GGUFReader(path).fields


@pytest.mark.parametrize("look", [
    lambda fields: list(fields.items()), lambda fields: list(zip(fields, fields.values(), strict=True)),
    lambda fields: list(dict(fields).items()), lambda fields: list({**fields}.items()),
    lambda fields: list(fields.copy().items()), lambda fields: list(copy.copy(fields).items()),
    lambda fields: list((fields | {}).items()), lambda fields: [("text", fields.pop("text"))],
    lambda fields: [("text", fields.setdefault("text", None))], lambda fields: [fields.popitem()],
    lambda fields: [fields.popitem(last=False)], lambda fields: [("no", fields.get("no", fields["text"]))],
    lambda fields: list(pickle.loads(pickle.dumps(fields)).items()), lambda fields: [("text", fields.get("text"))]])
def test_fields_are_an_ordered_dict_however_they_are_looked_at(look: Callable[[Any], Any], model: Path) -> None:
    """Nobody sees a field that is not built."""
    ours, stock = map(look, fields_of(model))
    assert [key for key, _ in ours] == [key for key, _ in stock]
    for (_, one), (_, other) in zip(ours, stock, strict=True):
        assert_same_field(one, other)


def test_fields_can_be_changed(model: Path) -> None:
    """What was put in stays, what was taken out is gone."""
    fields, _ = fields_of(model)
    fields["text"] = 1
    del fields["words"]
    assert (fields["text"], fields.get("words"), fields.pop("words", 2), "words" in fields) == (1, None, 2, False)
    with pytest.raises(KeyError):
        fields["words"]
    assert fields != OrderedDict(text=1)
    fields.clear()
    assert fields == OrderedDict() and not fields._deferred


def test_a_reader_goes_when_its_last_user_does(model: Path) -> None:
    """As the original: no cycle keeps the file mapped."""
    reader = Lazy(model)
    assert reader.tensors and reader.fields["words"].parts
    data = weakref.ref(reader.data)
    gc.disable()
    try:
        del reader
        assert data() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_a_file_that_may_be_written_is_read_by_the_original(mode: Any, model: Path) -> None:
    """What is looked at late would be what was written meanwhile."""
    reader = Lazy(model, mode)
    assert type(reader.fields) is OrderedDict
    assert_same(reader, GGUFReader(model, mode))


def test_a_big_endian_file_is_read_by_the_original(tmp_path: Path) -> None:
    """Which can."""
    path = write(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    reader = Lazy(path)
    assert (reader.byte_order, type(reader.fields)) == ("S", OrderedDict)
    assert_same(reader, GGUFReader(path))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file(pairs: list[bytes], entries: list[bytes] = [], data: int = 0) -> bytes:  # noqa: B006  it is read only
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(pairs)) + b"".join([*pairs, *entries])
    return header + bytes(-len(header) % 32 + data)


def entry(kind: int, *dimensions: int, offset: int = 0) -> bytes:
    return text("t") + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


NUMBER = text("a") + struct.pack("<IB", 0, 1)
ODD = {
    "nested": file([text("a") + struct.pack("<IIQIQBB", 9, 9, 1, 0, 2, 5, 6)]),
    "empty array": file([text("a") + struct.pack("<IIQ", 9, 4, 0)]),
    "empty array of nothing known": file([text("a") + struct.pack("<IIQ", 9, 99, 0)]),
    "small alignment": file([text("general.alignment") + struct.pack("<II", 4, 4)], [entry(0, 4)], 16),
    "offset not aligned": file([], [entry(0, 4, offset=4)], 64),
    "scalar": file([], [entry(0)], 4),
    "truth value": file([text("a") + struct.pack("<IB", 7, 2)]),
    "not UTF-8": file([text("a") + struct.pack("<IQB", 8, 1, 255)]),
}


@pytest.mark.parametrize("case", ODD)
def test_what_only_the_original_reads_is_still_read(case: str, tmp_path: Path) -> None:
    """It is laxer than we are."""
    path = tmp_path / "odd.gguf"
    path.write_bytes(ODD[case])
    ours, stock = Lazy(path), GGUFReader(path)
    if case != "not UTF-8":
        return assert_same(ours, stock)
    for reader in (ours, stock):
        with pytest.raises(UnicodeDecodeError):
            reader.fields["a"].contents()


BAD = {
    "empty": b"", "short": b"GGUF\3", "magic": b"GGML" + bytes(20), "version": b"GGUF" + struct.pack("<IQQ", 4, 0, 0),
    "twice": file([NUMBER, NUMBER]), "count among keys": file([text("GGUF.version") + struct.pack("<IB", 0, 1)]),
    "cut": file([text("words") + struct.pack("<IIQ", 9, 8, 3) + text("a")]),
    "type": file([], [entry(99, 4)], 16), "outside": file([], [entry(0, 4000)], 16), "both": file([], [entry(0, 4)] * 2, 16),
    "alignment": file([text("general.alignment") + struct.pack("<II", 4, 3)]),
    "scalar in bytes": file([], [entry(30)], 32), "value": file([text("a") + struct.pack("<IQ", 55, 0)]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_by_the_original_when_it_says_it(case: str, tmp_path: Path) -> None:
    """The same exception with the same words, from the constructor."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[case])
    with pytest.raises(Exception) as stock:
        GGUFReader(path)
    with pytest.raises(type(stock.value)) as ours:
        Lazy(path)
    assert str(ours.value) == str(stock.value)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    """The caller's mistake stays the caller's."""
    with pytest.raises(FileNotFoundError):
        Lazy(tmp_path / "none.gguf")


def test_a_reader_of_another_make_is_left_alone() -> None:
    """An older or newer gguf is slow rather than wrong."""

    class Other:
        """Has none of the parts."""

    assert lazy_reader(Other) is Other
    assert lazy_reader(Lazy) is Lazy
