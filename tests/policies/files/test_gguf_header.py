"""A GGUF header, read without making its arrays, and refused where it does not hold what it says."""
from __future__ import annotations

import gc
import os
import struct
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from residency.policies.files import gguf_header
from residency.policies.files.gguf_header import GGUFError, Header
from residency.policies.files.gguf_values import Strings
from support.gguf_files import finish

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str | bytes = "t", dimensions: Iterable[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = list(dimensions)
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def gguf_bytes(pairs: Iterable[bytes] = (), entries: Iterable[bytes] = (), data: int = 0, version: int = 3,
               alignment: int = 32) -> bytes:
    """A file with `data` bytes of tensors."""
    pairs, entries = list(pairs), list(entries)
    header = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(pairs)) + b"".join([*pairs, *entries])
    return header + bytes(-len(header) % alignment + data) if entries else header


def parse(data: bytes) -> Header:
    return Header.parse(data, "/models/broken.gguf", len(data))


def is_mapped(path: str) -> bool:
    return any(os.path.realpath(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Every type of value and several of tensors, as llama.cpp's own writer has them."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    for number in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64"):
        getattr(writer, f"add_{number}")(f"a.{number}", 7)
        writer.add_key_value(f"many.{number}", [1, 2, 3], gguf.GGUFValueType.ARRAY,
                             sub_type=gguf.GGUFValueType[number.upper()])
    writer.add_int64("negative", -(2**63))
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_array("truths", [True, False, True])
    writer.add_string("text", "naïve 🙂")
    writer.add_string("empty", "")
    writer.add_array("words", ["one", "", "zwölf", "x" * 300, "\0", "🙂"])
    writer.add_tensor("plain", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor("half", np.arange(5, dtype=np.float16))
    writer.add_tensor("bytes", np.arange(7, dtype=np.int8))
    writer.add_tensor("blocks", np.arange(3 * 68, dtype=np.uint8).reshape(3, 68), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("k", np.arange(2 * 144, dtype=np.uint8).reshape(2, 144), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    finish(writer)
    return str(path)


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, Strings) else value


def test_values_are_those_of_the_stock_reader(model: str) -> None:
    """Every type, alone and in arrays, in the file's order."""
    header, stock = Header.read(model), gguf.GGUFReader(model)
    expected = {key: field.contents() for key, field in stock.fields.items() if not key.startswith("GGUF.")}
    assert {key: plain(value) for key, value in header.kv.items()} == expected
    assert list(header.kv) == list(expected)
    assert {key: type(plain(value)) for key, value in header.kv.items()} == {
        key: type(value) for key, value in expected.items()}
    assert (header.architecture, header.version, len(header.kv)) == ("flux", 3, len(expected))


def test_tensors_are_those_of_the_stock_reader(model: str) -> None:
    """Places, sizes and types; shapes in torch's order."""
    header, stock = Header.read(model), gguf.GGUFReader(model)
    assert list(header.tensors.values()) == [
        (tensor.name, tensor.tensor_type, tuple(reversed(tensor.shape.tolist())), tensor.data_offset, tensor.n_bytes)
        for tensor in stock.tensors]
    assert list(header.tensors) == [tensor.name for tensor in stock.tensors]
    assert (header.alignment, header.data_offset) == (stock.alignment, stock.data_offset)


def test_another_alignment_is_heeded(tmp_path: Path) -> None:
    """Data begins, and tensors lie, where it says."""
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_custom_alignment(256)
    for index in range(2):
        writer.add_tensor(f"t{index}", np.full(3, index, np.float32))
    finish(writer)
    header = Header.read(str(path))
    assert (header.alignment, header.data_offset % 256) == (256, 0)
    assert [info.offset for info in header.tensors.values()] == [
        tensor.data_offset for tensor in gguf.GGUFReader(path).tensors]


def test_version_two_is_read() -> None:
    """It differs from version three in no byte of what we read."""
    header = parse(gguf_bytes([pair("a", 4, b"\5\0\0\0")], [entry()], 128, version=2))
    assert (header.version, header.kv["a"], header.tensors["t"].size) == (2, 5, 128)


def test_a_file_of_values_alone_is_read() -> None:
    """A vocabulary has no tensors, and need not be padded."""
    header = parse(gguf_bytes([pair("a", 7, b"\1")]))
    assert (dict(header.kv), header.tensors, header.architecture) == ({"a": True}, {}, None)


@pytest.mark.parametrize(("dimensions", "shape", "size"), [((), (), 4), ((0,), (0,), 0), ((5, 0), (0, 5), 0),
                                                           ((1, 2, 3, 4), (4, 3, 2, 1), 96)])
def test_scalars_and_empty_tensors_are_read(dimensions: tuple[int, ...], shape: tuple[int, ...], size: int) -> None:
    """Checkpoints carry empty tensors as flags."""
    info = parse(gguf_bytes(entries=[entry(dimensions=dimensions)], data=size)).tensors["t"]
    assert (info.shape, info.size) == (shape, size)


def test_tensors_may_overlap() -> None:
    """Two names for one weight are no mistake."""
    header = parse(gguf_bytes(entries=[entry("a"), entry("b")], data=128))
    assert header.tensors["a"].offset == header.tensors["b"].offset


def test_arrays_of_numbers_are_views_of_the_mapping(model: str) -> None:
    """Nothing is copied, and nothing can be written."""
    header = Header.read(model)
    first, again = header.kv["many.float64"], header.kv["many.float64"]
    assert np.shares_memory(first, again)
    assert not first.flags.writeable


def test_strings_are_a_sequence() -> None:
    """Indices, slices, iteration and bytes."""
    words = ["one", "", "zwölf", "\0", "x" * 300]
    strings = parse(gguf_bytes([pair("words", 9, struct.pack("<IQ", 8, len(words)) + b"".join(map(text, words)))])).kv["words"]
    assert (len(strings), list(strings), strings[1:4], strings[-1], strings[::-2]) == (
        5, words, words[1:4], words[-1], words[::-2])
    assert [strings[index] for index in range(5)] == words
    assert strings.raw(2) == "zwölf".encode()
    assert "zwölf" in strings
    for index in (5, -6):
        with pytest.raises(IndexError):
            strings[index]


def test_values_that_are_not_utf8_are_read_with_replacements_and_as_bytes() -> None:
    """A vocabulary of byte pieces is no reason to refuse a model."""
    array = struct.pack("<IQ", 8, 1) + text(b"\xff")
    header = parse(gguf_bytes([pair("one", 8, text(b"a\xff")), pair("many", 9, array), pair("number", 0, b"\1")]))
    assert (header.kv["one"], header.kv.raw("one")) == ("a\ufffd", b"a\xff")
    assert (header.kv["many"][0], header.kv["many"].raw(0)) == ("\ufffd", b"\xff")
    with pytest.raises(TypeError):
        header.kv.raw("number")
    with pytest.raises(KeyError):
        header.kv["none"]


GOOD = gguf_bytes([pair("text", 8, text("abc")), pair("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
                   pair("number", 12, bytes(8)), pair("numbers", 9, struct.pack("<IQ", 4, 3) + bytes(12))],
                  [entry("t", (4, 2))], 32)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_that_is_cut_short_anywhere_is_refused(length: int) -> None:
    """Whatever structure the end falls into."""
    parse(GOOD)
    with pytest.raises(GGUFError, match="download it again"):
        parse(GOOD[:length])


def array(element: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + data


HUGE = 2**64 - 1
ALIGN = "general.alignment"
BAD: dict[str, tuple[bytes, str]] = {
    "magic": (b"GGML" + bytes(20), "does not begin with GGUF"),
    "version 0": (gguf_bytes(version=0), "version 0"),
    "version 1": (gguf_bytes(version=1), "version 1, .*convert"),
    "version 4": (gguf_bytes(version=4), "version 4, .*update"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "tensors are announced"),
    "pair count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "values are announced"),
    "key twice": (gguf_bytes([pair("a", 0, b"\0")] * 2), "key 'a': is there twice"),
    "long key": (gguf_bytes([pair("a" * 65536, 0, b"\0")]), "65536 bytes"),
    "huge key": (gguf_bytes([struct.pack("<Q", HUGE) + bytes(40)]), "a key of"),
    "key not UTF-8": (gguf_bytes([pair(b"\xff", 0, b"\0")]), "key at byte .* is not UTF-8"),
    "value type": (gguf_bytes([pair("a", 13, bytes(8))]), "key 'a': values of type 13"),
    "element type": (gguf_bytes([pair("a", 9, array(99, 0))]), "values of type 99"),
    "arrays of arrays": (gguf_bytes([pair("a", 9, array(9, 1, array(0, 1, b"\0")))]), "array of arrays"),
    "truth value": (gguf_bytes([pair("a", 7, b"\2")]), "neither 0 nor 1"),
    "truth values": (gguf_bytes([pair("a", 9, array(7, 3, b"\0\1\2"))]), "neither 0 nor 1"),
    "huge text": (gguf_bytes([pair("a", 8, struct.pack("<Q", HUGE) + bytes(8))]), "key 'a'"),
    "huge array": (gguf_bytes([pair("a", 9, array(12, HUGE, bytes(64)))]), "key 'a'"),
    "many strings": (gguf_bytes([pair("a", 9, array(8, HUGE, bytes(64)))]), "strings are announced"),
    "huge string": (gguf_bytes([pair("a", 9, array(8, 2, struct.pack("<Q", HUGE) + bytes(64)))]), "its strings go on"),
    "long string": (gguf_bytes([pair("a", 9, array(8, 1, struct.pack("<Q", 65) + bytes(64)))]), "key 'a'"),
    "alignment 0": (gguf_bytes([pair(ALIGN, 4, struct.pack("<I", 0))]), f"{ALIGN}': is 0"),
    "alignment 48": (gguf_bytes([pair(ALIGN, 4, struct.pack("<I", 48))]), "is 48"),
    "alignment 4": (gguf_bytes([pair(ALIGN, 4, struct.pack("<I", 4))]), "is 4"),
    "alignment's type": (gguf_bytes([pair(ALIGN, 10, struct.pack("<Q", 32))]), "no uint32"),
    "tensor twice": (gguf_bytes(entries=[entry()] * 2, data=128), "tensor 't': is there twice"),
    "tensor not UTF-8": (gguf_bytes(entries=[entry(b"\xff")], data=128), "name at byte .* is not UTF-8"),
    "five dimensions": (gguf_bytes(entries=[entry(dimensions=[1] * 5)], data=128), "tensor 't': has 5 dimensions"),
    "many dimensions": (gguf_bytes(entries=[text("t") + struct.pack("<I", 2**32 - 1) + bytes(40)]), "4294967295 dimensions"),
    "tensor type": (gguf_bytes(entries=[entry(kind=99)], data=128), "tensor 't': is of type 99, which is unknown.*update"),
    "row": (gguf_bytes(entries=[entry(dimensions=[33], kind=8)], data=128), "33 elements.*block of 32"),
    "scalar in blocks": (gguf_bytes(entries=[entry(dimensions=[], kind=8)], data=128), "1 elements"),
    "overflow": (gguf_bytes(entries=[entry(dimensions=[2**32] * 4)], data=128), "impossible dimensions"),
    "overflow of nothing": (gguf_bytes(entries=[entry(dimensions=[0, 2**32, 2**32])], data=128), "impossible dimensions"),
    "not aligned": (gguf_bytes(entries=[entry(offset=8)], data=256), "tensor 't': begins at 8, .* not aligned to 32"),
    "outside": (gguf_bytes(entries=[entry(), entry("u", offset=128)], data=128), "tensor 'u': ends at byte"),
    "far outside": (gguf_bytes(entries=[entry(offset=2**64 - 32)], data=128), "ends at byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_header_gets_wrong_is_said_with_the_file_and_the_cure(case: str) -> None:
    """The file's name, the key or tensor, what is wrong, what to do."""
    data, message = BAD[case]
    with pytest.raises(GGUFError, match=message) as caught:
        parse(data)
    assert str(caught.value).startswith("broken.gguf: ")
    assert any(cure in str(caught.value) for cure in ("download", "convert"))


def test_a_type_that_gguf_knows_and_the_table_does_not_is_named() -> None:
    """A user can look for the model in another quantisation."""
    data = gguf_bytes(entries=[entry(kind=12)], data=512)
    with pytest.raises(GGUFError, match=r"of type 12 \(Q4_K\)"):
        Header.parse(data, "a.gguf", len(data), {0: (1, 4)})


def test_without_the_gguf_package_a_table_of_sizes_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without a table the message says what to install."""
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    gguf_header.type_sizes.cache_clear()
    data = gguf_bytes(entries=[entry()], data=128)
    assert Header.parse(data, "a.gguf", len(data), {0: (1, 4)}).tensors["t"].size == 128
    with pytest.raises(GGUFError, match="is of type 0, which"):
        Header.parse(data, "a.gguf", len(data), {})
    with pytest.raises(GGUFError, match="pip install gguf"):
        parse(data)


def test_an_empty_file_is_refused_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    """The first is a download that failed, the second is the caller's."""
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(GGUFError, match=r"empty\.gguf: the file is empty"):
        Header.read(str(tmp_path / "empty.gguf"))
    with pytest.raises(FileNotFoundError):
        Header.read(str(tmp_path / "none.gguf"))


@linux
@pytest.mark.parametrize("case", BAD)
def test_a_refused_file_is_not_mapped_while_the_error_lives(case: str, tmp_path: Path) -> None:
    """Windows would keep it from being replaced by a good one."""
    path = tmp_path / "refused.gguf"
    path.write_bytes(BAD[case][0])
    with pytest.raises(GGUFError) as caught:
        Header.read(str(path))
    assert caught.value is not None
    assert not is_mapped(str(path))


@linux
def test_only_the_header_stays_mapped_until_it_is_closed(model: str) -> None:
    """Weights have mappings of their own."""
    header = Header.read(model)
    assert len(header.kv._buffer or b"") == header.end < header.data_offset + 1
    assert is_mapped(model)
    header.close()
    header.close()
    assert not is_mapped(model)
    assert header.tensors["plain"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match="closed"):
        header.kv["text"]


@linux
def test_an_array_keeps_the_mapping_that_was_closed(model: str) -> None:
    """A view never shows memory that is gone."""
    header = Header.read(model)
    numbers = header.kv["many.int32"]
    header.close()
    assert numbers.tolist() == [1, 2, 3]
    del numbers
    gc.collect()
    assert not is_mapped(model)


@linux
def test_where_a_mapping_would_lock_the_file_the_header_is_copied(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(gguf_header, "KEEPS_MAPPED", False)
    header = Header.read(model)
    assert not is_mapped(model)
    assert (header.kv["a.uint8"], header.kv["words"][0], header.kv["many.int8"].tolist()) == (7, "one", [1, 2, 3])
    header.close()


@pytest.fixture
def _forgotten() -> Any:
    gguf_header.forget()
    yield
    gguf_header.forget()


@pytest.mark.usefixtures("_forgotten")
def test_a_file_is_read_once_until_it_changes(model: str) -> None:
    """The same header, until the file is another."""
    first = gguf_header.of(model)
    assert gguf_header.of(model) is first
    os.utime(model, ns=(0, 10**18))
    second = gguf_header.of(model)
    assert second is not first
    assert gguf_header.of(model) is second
    assert first.kv["text"] == second.kv["text"]


@pytest.mark.usefixtures("_forgotten")
def test_the_latest_few_files_are_kept(tmp_path: Path) -> None:
    """The least recently used goes first, and what is in use stays whole."""
    paths = [tmp_path / f"{index}.gguf" for index in range(gguf_header.KEPT + 1)]
    for path in paths:
        path.write_bytes(GOOD)
    headers = [gguf_header.of(str(path)) for path in paths[:-1]]
    assert gguf_header.of(str(paths[0])) is headers[0]
    gguf_header.of(str(paths[-1]))
    assert gguf_header.of(str(paths[0])) is headers[0]
    assert gguf_header.of(str(paths[1])) is not headers[1]
    assert headers[1].kv["text"] == "abc"


@pytest.mark.usefixtures("_forgotten")
def test_a_file_that_went_bad_is_refused_and_forgotten(tmp_path: Path) -> None:
    """The old header does not stand in, and the mended file is read."""
    path = tmp_path / "a.gguf"
    path.write_bytes(GOOD)
    gguf_header.of(str(path))
    path.write_bytes(GOOD[:-1])
    with pytest.raises(GGUFError):
        gguf_header.of(str(path))
    path.write_bytes(GOOD)
    assert gguf_header.of(str(path)).kv["text"] == "abc"


@pytest.mark.usefixtures("_forgotten")
def test_threads_share_one_reading(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second waits for the first."""
    read, found, reads = Header.read, [], []
    monkeypatch.setattr(Header, "read", lambda path: reads.append(path) or read(path))
    threads = [threading.Thread(target=lambda: found.append(gguf_header.of(model))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert len({id(header) for header in found}) == 1


def look(data: bytes) -> None:
    """Reads and decodes everything, or raises GGUFError."""
    header = parse(data)
    for value in header.kv.values():
        plain(value)
    for info in header.tensors.values():
        assert info.offset + info.size <= len(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6),
       st.integers(0, len(GOOD)))
def test_a_damaged_file_is_read_or_refused(changes: list[tuple[int, bytes]], length: int) -> None:
    """Never another exception, whatever the bytes."""
    data = bytearray(GOOD)
    for at, piece in changes:
        data[at:at + len(piece)] = piece
    for candidate in (bytes(data), bytes(data[:length])):
        try:
            look(candidate)
        except GGUFError:
            continue


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_after_a_good_beginning_is_read_or_refused(noise: bytes) -> None:
    """The counts may say anything, too."""
    try:
        look(b"GGUF\3\0\0\0" + noise)
    except GGUFError:
        return
