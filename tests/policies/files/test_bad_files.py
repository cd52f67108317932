"""Files that are not what their names say: the bank refuses them, and keeps nothing of them."""
from __future__ import annotations

import copy
import gc
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residency.policies.files.bank import Bank
from safetensors.torch import save

Header = dict[str, Any]
TENSORS = {"a": torch.arange(64, dtype=torch.float32).reshape(8, 8), "b": torch.ones(5, dtype=torch.bfloat16),
           "c": torch.arange(7, dtype=torch.int8)}
VALID = save(TENSORS, metadata={"format": "pt"})
LENGTH = struct.unpack("<Q", VALID[:8])[0]
HEADER: Header = json.loads(VALID[8:8 + LENGTH])
DATA = VALID[8 + LENGTH:]
REFUSALS = (OSError, safetensors.SafetensorError)


def packed(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def lying(change: Callable[[Header], Any]) -> bytes:
    """The valid file with another header."""
    header = copy.deepcopy(HEADER)
    change(header)
    return packed(json.dumps(header).encode())


BAD = {
    "no bytes": b"",
    "three bytes": b"abc",
    "a text": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a pointer of git's large files": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "cut in the data": VALID[:-10],
    "cut in the header": VALID[:20],
    "more data than the header knows": VALID + b"more",
    "a header longer than the file": packed(VALID[8:8 + LENGTH], length=len(VALID)),
    "a header of a gigabyte": packed(VALID[8:8 + LENGTH], length=2**30),
    "a header beyond 64 bits": packed(VALID[8:8 + LENGTH], length=2**64 - 1),
    "no JSON": packed(b"{hello world}"),
    "a list": packed(b"[1, 2, 3]"),
    "no text": packed(b'{"\xff\xfe": 1}'),
    "half a character": packed(b'{"\\ud800": 1}'),
    "nested without end": packed(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "metadata that is no text": lying(lambda header: header.update(__metadata__={"key": 1})),
    "an unknown dtype": lying(lambda header: header["a"].update(dtype="F33")),
    "a dtype that torch lacks": lying(lambda header: header["a"].update(dtype="F6_E2M3", shape=[341])),
    "a wider dtype": lying(lambda header: header["a"].update(dtype="F64")),
    "a larger shape": lying(lambda header: header["a"].update(shape=[8, 9])),
    "a negative shape": lying(lambda header: header["a"].update(shape=[-8, -8])),
    "a shape that overflows": lying(lambda header: header["a"].update(shape=[2**62, 2**62])),
    "an empty shape beyond 64 bits": lying(lambda header: header.update(z={
        "dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [273, 273]})),
    "an empty shape with strides beyond 64 bits": lying(lambda header: header.update(z={
        "dtype": "F32", "shape": [0, 2, 2**62], "data_offsets": [273, 273]})),
    "a shape that is no list": lying(lambda header: header["a"].update(shape=64)),
    "offsets that overlap": lying(lambda header: header["b"].update(data_offsets=[250, 260])),
    "offsets with a hole": lying(lambda header: header["c"].update(data_offsets=[267, 274])),
    "offsets past the end": lying(lambda header: header["c"].update(data_offsets=[2**40, 2**40 + 7])),
    "offsets backwards": lying(lambda header: header["b"].update(data_offsets=[266, 256])),
    "offsets of one number": lying(lambda header: header["b"].update(data_offsets=[256])),
    "no offsets": lying(lambda header: header["b"].pop("data_offsets")),
}


def refused(path: str) -> None:
    bank = Bank()
    with pytest.raises(REFUSALS):
        bank.lease(path)
    assert bank.live() == []
    assert bank._files == []


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_broken_file_is_refused(content: bytes, tmp_path: Path) -> None:
    """With an error that says so, and without a mapping that stays."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(str(path))
    if Path("/proc/self/maps").exists():
        gc.collect()
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_folder_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    """Names that are not files."""
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    refused(str(folder))
    refused(str(tmp_path / "nothing.safetensors"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    """No permission, no mapping."""
    path = tmp_path / "secret.safetensors"
    path.write_bytes(VALID)
    path.chmod(0)
    refused(str(path))


def test_a_bad_file_does_not_cost_the_good_one_its_place(tmp_path: Path) -> None:
    """A download that broke off over a file that is mapped: the old tensors stay known, the new file is refused."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(VALID)
    bank = Bank()
    lease = bank.lease(str(path))
    part = tmp_path / "part"
    part.write_bytes(VALID[:-10])
    part.replace(path)
    with pytest.raises(REFUSALS):
        bank.lease(str(path))
    assert bank.live() == [lease.file]
    assert torch.equal(TENSORS["a"], lease.tensors["a"])


def _bytes_changed(draw: st.DrawFn) -> bytes:
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, 8 + LENGTH - 1))
        new = draw(st.sampled_from(b'0123456789[]{},:"-e.aF') | st.integers(0, 255))
        match draw(st.sampled_from(["change", "insert", "delete"])):
            case "change":
                content[at] = new
            case "insert":
                content.insert(at, new)
            case "delete":
                del content[at]
    if draw(st.booleans()):  # otherwise most files end at "the header's length is wrong"
        content[:8] = struct.pack("<Q", LENGTH + len(content) - len(VALID))
    return bytes(content)


def _numbers_changed(draw: st.DrawFn) -> bytes:
    header = copy.deepcopy(HEADER)
    numbers = st.integers(-2, 300) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 0.5, None])
    for _ in range(draw(st.integers(1, 3))):
        entry = header[draw(st.sampled_from(sorted(TENSORS)))]
        match draw(st.sampled_from(["shape", "data_offsets", "dtype", "empty"])):
            case "dtype":
                entry["dtype"] = draw(st.sampled_from(["BOOL", "F4", "U8", "I8", "F8_E4M3", "I16", "F16", "F32", "F64", "C64"]))
            case "empty":
                header["empty"] = {"dtype": "F32", "shape": [0, *draw(st.lists(numbers, max_size=3))],
                                   "data_offsets": [len(DATA)] * 2}
            case key:
                entry[key] = draw(st.lists(numbers, max_size=3))
    return packed(json.dumps(header).encode())


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The valid file with a few bytes of its header changed, or with other numbers in it."""
    return _bytes_changed(draw) if draw(st.booleans()) else _numbers_changed(draw)


@settings(max_examples=100, deadline=None)
@given(mutated())
def test_any_header_gives_tensors_inside_the_mapping_or_a_refusal(content: bytes) -> None:
    """No header makes a tensor reach outside its file, nor an error of another kind."""
    bank = Bank()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "mutated.safetensors")
        Path(path).write_bytes(content)
        try:
            lease = bank.lease(path)
        except REFUSALS:
            assert bank._files == []
            return
        for tensor in lease.tensors.values():
            if tensor.numel():
                tensor.view(torch.uint8).sum() if tensor.dim() else tensor.clone()  # a read past the end would crash here
                assert lease.file.start <= tensor.data_ptr()
                assert tensor.data_ptr() + tensor.nbytes <= lease.file.end
        assert lease.file.end - lease.file.start <= len(content)
