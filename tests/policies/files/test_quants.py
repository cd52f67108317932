"""Dequantised tensors are those of the `gguf` package, to the last bit, in every dtype and however they are asked for."""
from __future__ import annotations

from collections.abc import Callable

import gguf
import pytest
import torch
from residency.policies.files import quants
from residency.policies.files.quants import bits, tables
from support.blocks import random_bytes, reference, same
from torch._subclasses import FakeTensorMode

NAMES = {kind.name: kind for kind in quants.KINDS.values()}
HALVES = (torch.float16, torch.bfloat16)
SMALL = ("BF16", "Q4_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "IQ2_XXS", "IQ3_S", "IQ1_M", "IQ4_XS", "TQ1_0", "MXFP4", "NVFP4")

every_kind = pytest.mark.parametrize("kind", NAMES.values(), ids=NAMES)
some_kinds = pytest.mark.parametrize("kind", [NAMES[name] for name in SMALL], ids=SMALL)


def test_the_kinds_are_those_that_gguf_dequantises() -> None:
    """Every type that the package can dequantise, with its number, its block and its size."""
    assert set(quants.KINDS) == {int(number) for number in gguf.quants._type_traits} | {0, 1}
    for kind in quants.KINDS.values():
        number = gguf.GGMLQuantizationType(kind.number)
        assert (kind.name, (kind.block, kind.size)) == (number.name, gguf.constants.GGML_QUANT_SIZES[number])


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_ggufs_to_the_last_bit(kind: quants.Kind, seed: int) -> None:
    """Whatever the bytes are: subnormal, infinite and undefined scales too."""
    raw = random_bytes(kind, 301, seed)
    result = quants.dequantize(raw, kind.number, (301, kind.block), torch.float32)
    assert result.shape == (301, kind.block)
    assert same(result.flatten(), reference(raw, kind))


@every_kind
@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_are_float32_rounded_once(kind: quants.Kind, dtype: torch.dtype) -> None:
    """The weights of a file that had been dequantised to this dtype."""
    raw = random_bytes(kind, 301)
    result = quants.dequantize(raw, kind.number, (301 * kind.block,), dtype)
    assert same(result, reference(raw, kind).to(dtype))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_chunks_make_no_difference(kind: quants.Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of many chunks, the last of them short, is what it is in one piece."""
    raw = random_bytes(kind, 50)
    expected = quants.dequantize(raw, kind.number, (50 * kind.block,), dtype)
    monkeypatch.setattr(quants, "CHUNK", 8 * kind.block)
    assert same(quants.dequantize(raw, kind.number, (50 * kind.block,), dtype), expected)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_accelerators_way_gives_the_same(kind: quants.Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few kernels on all of a tensor, here on the CPU, give what chunks give."""
    raw = random_bytes(kind, 50)
    for module in (bits, quants, quants.ternary):
        monkeypatch.setattr(module, "whole", lambda tensor: True)
    assert same(quants.dequantize(raw, kind.number, (50 * kind.block,), dtype), reference(raw, kind).to(dtype))


@pytest.mark.gpu
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_gpu_gives_the_same(kind: quants.Kind, dtype: torch.dtype) -> None:
    """Bits do not depend on the device."""
    raw = random_bytes(kind, 301)
    result = quants.dequantize(raw.cuda(), kind.number, (301 * kind.block,), dtype)
    assert result.is_cuda
    assert same(result.cpu(), reference(raw, kind).to(dtype))


def test_a_compiler_takes_all_types_in_one_graph() -> None:
    """Each table is a constant of its own in it."""
    def total(*raws: torch.Tensor) -> torch.Tensor:
        return sum(quants.dequantize(raw, kind.number, (2, kind.block), torch.float32).nan_to_num(0, 0, 0).sum()  # type: ignore[return-value]
                   for raw, kind in zip(raws, NAMES.values(), strict=True))

    raws = [random_bytes(kind, 2) for kind in NAMES.values()]
    assert torch.equal(total(*raws), torch.compile(total, backend="aot_eager", fullgraph=True)(*raws))


@every_kind
def test_a_changed_byte_changes_the_result(kind: quants.Kind) -> None:
    """Control: the comparison notices a single byte."""
    raw = random_bytes(kind, 8)
    raw[:] = 0x35  # no zero scales, which would hide a change
    changed = raw.clone()
    changed[3, kind.size // 2] ^= 0x11
    results = [quants.dequantize(each, kind.number, (8, kind.block), torch.float32) for each in (raw, changed)]
    assert not same(*results)
    assert same(results[0][4:], results[1][4:])


@some_kinds
def test_the_result_goes_where_it_is_wanted(kind: quants.Kind) -> None:
    """Given memory is written, of any shape with that many elements, and the result is a view of it."""
    raw = random_bytes(kind, 6)
    for dtype in (torch.float32, *HALVES):
        out = torch.full((6 * kind.block,), 7, dtype=dtype)
        result = quants.dequantize(raw, kind.number, (2, 3, kind.block), dtype, out)
        assert result.data_ptr() == out.data_ptr()
        assert same(out, reference(raw, kind).to(dtype))


@some_kinds
@pytest.mark.parametrize("shape", [(24, 1), (4, 6), (2, 3, 2, 2)])
def test_shapes(kind: quants.Kind, shape: tuple[int, ...]) -> None:
    """One, two and four dimensions, whatever the shape of the bytes."""
    shape = (*shape[:-1], shape[-1] * kind.block)
    raw = random_bytes(kind, 24).view(4, -1)
    result = quants.dequantize(raw, kind.number, shape, torch.float32)
    assert result.shape == shape
    assert same(result.flatten(), reference(raw, kind))


@every_kind
def test_one_block_and_no_block(kind: quants.Kind) -> None:
    """The smallest tensors."""
    raw = random_bytes(kind, 1)
    assert same(quants.dequantize(raw, kind.number, (kind.block,), torch.float32), reference(raw, kind))
    nothing = quants.dequantize(raw[:0], kind.number, (0, kind.block), torch.bfloat16)
    assert (nothing.shape, nothing.dtype) == ((0, kind.block), torch.bfloat16)


@every_kind
def test_bytes_may_begin_anywhere(kind: quants.Kind) -> None:
    """In the middle of a word too, as a slice of a file's bytes may."""
    raw = random_bytes(kind, 5)
    for offset in (1, 2):
        slack = torch.cat([torch.zeros(offset, dtype=torch.uint8), raw.flatten()])[offset:]
        assert same(quants.dequantize(slack, kind.number, (5 * kind.block,), torch.float32), reference(raw, kind))


@every_kind
def test_rows_are_looked_up(kind: quants.Kind) -> None:
    """An embedding's rows, in the shape of their indices, repeated ones too."""
    raw = random_bytes(kind, 14).view(7, -1)
    whole = quants.dequantize(raw, kind.number, (7, 2 * kind.block), torch.bfloat16)
    for index in (torch.tensor([[6, 0], [3, 3]]), torch.tensor([5], dtype=torch.int32), torch.tensor(2, dtype=torch.uint8)):
        rows = quants.dequantize_rows(raw, kind.number, index, torch.bfloat16)
        assert rows.shape == (*index.shape, 2 * kind.block)
        assert same(rows, whole[index.long()])
    assert quants.dequantize_rows(raw, kind.number, torch.empty(0, 3, dtype=torch.int64), torch.float32).numel() == 0


@pytest.mark.parametrize(("call", "message"), [
    (lambda raw: quants.dequantize(raw, 15, (32,), torch.float32), r"Q8_K \(15\) cannot"),
    (lambda raw: quants.dequantize(raw, 999, (32,), torch.float32), "number 999 cannot"),
    (lambda raw: quants.dequantize(raw, 2, (64,), torch.float32), r"18 bytes are not a Q4_0 tensor of shape \(64,\)"),
    (lambda raw: quants.dequantize(raw, 2, (33,), torch.float32), r"not a Q4_0 tensor of shape \(33,\)"),
    (lambda raw: quants.dequantize(raw.view(torch.int8), 2, (32,), torch.float32), "must be contiguous uint8"),
    (lambda raw: quants.dequantize(raw.expand(2, 18), 2, (64,), torch.float32), "must be contiguous uint8"),
    (lambda raw: quants.dequantize(raw, 2, (32,), torch.int32), "not dequantised to torch.int32"),
    (lambda raw: quants.dequantize(raw, 2, (32,), torch.float32, torch.empty(31)), "the given memory is not"),
    (lambda raw: quants.dequantize(raw, 2, (32,), torch.float16, torch.empty(32)), "the given memory is not"),
    (lambda raw: quants.dequantize(raw, 2, (32,), torch.float32, torch.empty(32, 2)[:, 0]), "the given memory is not"),
    (lambda raw: quants.dequantize_rows(raw[:, :17], 2, torch.tensor([0]), torch.float32), "not rows of Q4_0 blocks"),
])
def test_what_does_not_fit_is_refused(call: Callable[[torch.Tensor], object], message: str) -> None:
    """With a message that says what was expected."""
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 18, dtype=torch.uint8))


@some_kinds
def test_a_compiler_takes_it_in_one_graph(kind: quants.Kind) -> None:
    """No break in the graph, whether the tables exist or not, and the same numbers."""
    tables._resident.clear()
    torch._dynamo.reset()
    raw = random_bytes(kind, 6)
    compiled = torch.compile(lambda raw: quants.dequantize(raw, kind.number, (6, kind.block), torch.bfloat16) + 0,
                             backend="eager", fullgraph=True)
    for _ in range(2):
        assert same(compiled(raw).flatten(), (reference(raw, kind).to(torch.bfloat16) + 0))
    assert same(quants.dequantize(raw, kind.number, (6 * kind.block,), torch.float32), reference(raw, kind))


@some_kinds
def test_fake_tensors_leave_nothing_behind(kind: quants.Kind) -> None:
    """A trace gets the shape, and the tables of real tensors stay real."""
    tables._resident.clear()
    with FakeTensorMode():
        raw = torch.zeros(4, kind.size, dtype=torch.uint8)
        assert quants.dequantize(raw, kind.number, (2, 2 * kind.block), torch.float16).shape == (2, 2 * kind.block)
    assert not tables._resident
    raw = random_bytes(kind, 4)
    assert same(quants.dequantize(raw, kind.number, (4 * kind.block,), torch.float32), reference(raw, kind))


@some_kinds
def test_inference_mode_leaves_nothing_behind(kind: quants.Kind) -> None:
    """Tables that were first needed inside of it are ordinary tensors outside."""
    tables._resident.clear()
    raw = random_bytes(kind, 4)
    with torch.inference_mode():
        assert quants.dequantize(raw, kind.number, (4 * kind.block,), torch.float32).is_inference()
    assert not any(table.is_inference() for table in tables._resident.values())
    assert not quants.dequantize(raw, kind.number, (4 * kind.block,), torch.float32).is_inference()
