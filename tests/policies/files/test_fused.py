"""Triton's kernels give the `gguf` package's numbers, and are used only where they were seen to be right and faster.

Without a GPU the kernels run in Triton's interpreter, on the CPU, and are compiled for cards that are not there.
"""
from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from residency.policies.files import quants
from residency.policies.files.quants import fused
from residency.telemetry.sinks import Ring
from support.blocks import random_bytes, reference, same
from torch._subclasses import FakeTensorMode

KINDS = {kind.name: kind for kind in quants.KINDS.values()}
HOT = [KINDS[name] for name in ("Q8_0", "Q4_K", "Q5_K", "Q6_K")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
KERNELS = "residency.policies.files.quants.kernels"

each_kind = pytest.mark.parametrize("kind", HOT, ids=lambda kind: kind.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module")
def interpreted() -> fused.Way:
    """`launch` of a copy of the kernels that Triton interprets. The plugin's own stay what they are."""
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.spec_from_file_location(f"{KERNELS}_interpreted", Path(fused.__file__).with_name("kernels.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)

    def launch(out: torch.Tensor, blocks: torch.Tensor, kind: quants.Kind) -> None:
        with np.errstate(all="ignore"):
            module.launch(out, blocks, kind)

    return launch


def filled(launch: fused.Way, raw: torch.Tensor, kind: quants.Kind, dtype: torch.dtype) -> torch.Tensor:
    """What a kernel makes of the blocks, flat, in memory whose neighbours it leaves alone."""
    count = len(raw) * kind.block
    memory = torch.full((count + 2 * kind.block,), 7, dtype=dtype, device=raw.device)
    launch(memory[kind.block:-kind.block].view(-1, kind.block), raw, kind)
    assert memory[:kind.block].eq(7).all() and memory[-kind.block:].eq(7).all()
    return memory[kind.block:-kind.block]


class TestKernels:
    """The numbers."""

    @each_kind
    @each_dtype
    @pytest.mark.parametrize("programs", [0.3, 1, 2.2])
    def test_numbers_are_ggufs_to_the_last_bit(self, interpreted: fused.Way, kind: quants.Kind, dtype: torch.dtype,
                                               programs: float) -> None:
        """Whatever the bytes are, and however many blocks there are for the last program."""
        raw = random_bytes(kind, int(programs * 4096 / kind.block), seed=int(programs))
        assert same(filled(interpreted, raw, kind, dtype), reference(raw, kind).to(dtype))

    @each_kind
    @each_dtype
    def test_a_single_block(self, interpreted: fused.Way, kind: quants.Kind, dtype: torch.dtype) -> None:
        """The smallest tensor."""
        raw = random_bytes(kind, 1)
        assert same(filled(interpreted, raw, kind, dtype), reference(raw, kind).to(dtype))

    @each_kind
    def test_every_bit_of_a_block_counts(self, interpreted: fused.Way, kind: quants.Kind) -> None:
        """Control: a single changed bit anywhere changes its block, as it does with `gguf`, and no other."""
        plain = torch.full((kind.size,), 0x35, dtype=torch.uint8)  # no zero scales, which would hide a change
        raw = plain.repeat(kind.size + 1, 1)
        for byte in range(kind.size):
            raw[byte, byte] ^= 1 << byte % 8
        result = filled(interpreted, raw, kind, torch.float32)
        assert same(result, reference(raw, kind))
        blocks = result.view(-1, kind.block)
        assert not blocks[:-1].eq(blocks[-1]).all(1).any()

    @each_kind
    @pytest.mark.parametrize("offset", [1, 2, 7])
    def test_bytes_may_begin_anywhere(self, interpreted: fused.Way, kind: quants.Kind, offset: int) -> None:
        """Kernels read no words that could lie across a boundary."""
        raw = random_bytes(kind, 9)
        slack = torch.cat([torch.zeros(offset, dtype=torch.uint8), raw.flatten()])[offset:].view(raw.shape)
        assert slack.data_ptr() % 8 == offset
        assert same(filled(interpreted, slack, kind, torch.float16), reference(raw, kind).to(torch.float16))

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_halves_are_rounded_to_even(self, interpreted: fused.Way, dtype: torch.dtype) -> None:
        """Scales from all over float16: numbers halfway between two, subnormal ones, too large ones, and infinite ones."""
        kind = KINDS["Q8_0"]
        scales = torch.cat([torch.arange(first, 2**16, 32) for first in (0, 31)]).to(torch.int16)
        raw = torch.randint(256, (len(scales), kind.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        raw[:, :2] = scales.view(-1, 1).view(torch.uint8)
        exact = reference(raw, kind).double()
        low, high = exact.to(dtype).nextafter(torch.tensor(-torch.inf, dtype=dtype)).double(), exact.to(dtype).double()
        assert (exact - low == high - exact).any()  # otherwise this would show little
        assert same(filled(interpreted, raw, kind, dtype), reference(raw, kind).to(dtype))

    def test_products_are_exact_in_float32(self) -> None:
        """So a contracted product and difference is rounded as often as two operations: once. Every significand of a float16,
        with every size of a scale and of a value that any of these types has."""
        significand, scale, value = torch.arange(1024, 2048), torch.arange(129), torch.arange(33)
        exact = significand.view(-1, 1, 1) * scale.view(-1, 1) * value
        product = (significand.float().view(-1, 1, 1) * scale.float().view(-1, 1)) * value.float()
        assert torch.equal(product.long(), exact)

    @pytest.mark.parametrize(("backend", "card", "warp", "text"), [("cuda", 75, 32, "ptx"), ("hip", "gfx1100", 32, "amdgcn")])
    @each_kind
    def test_they_compile(self, kind: quants.Kind, backend: str, card: int | str, warp: int, text: str,
                          tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """For cards that are not here, with the options of a launch: nothing is contracted or flushed, the result is written
        16 bytes at a time, and what counts blocks is 64 bits wide."""
        pytest.importorskip("triton", reason="Triton is not installed")
        from residency.policies.files.quants import kernels
        from triton.backends import backends
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        if not any(each.compiler.supports_target(GPUTarget(backend, card, warp)) for each in backends.values()):
            pytest.skip(f"this Triton has no compiler for {backend}")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(2)}
        for memory in ("*fp32", "*fp16", "*i16"):
            types = {"raw": "*u8", "out": memory, "count": "i32", "TILE": "constexpr"}
            source = ASTSource(kernels.KERNELS[kind.name], types, {"TILE": kernels.ELEMENTS // kind.block}, aligned)
            made = compile(source, target=GPUTarget(backend, card, warp), options=dict(kernels.OPTIONS))
            assert not re.search(r"\bfma\.|\.ftz|v_fma_f32|v_fmac_f32|denorm_mode_32 [^3]", made.asm[text])
            assert re.search(r"st\.global\.v4|_store_b128", made.asm[text])
            assert re.search(r"arith\.muli %first\w*, %\w+ : i64", made.asm["ttir"])


class Kernel:
    """A kernel that does as torch's code does, and then what `also` does to the result."""

    def __init__(self, also: Callable[[torch.Tensor], object] = lambda out: None) -> None:
        self.also, self.calls = also, 0

    def __call__(self, out: torch.Tensor, blocks: torch.Tensor, kind: quants.Kind) -> None:
        self.calls += 1
        quants._fill(out, blocks, kind)
        self.also(out)


class Clock:
    """Says how long torch's code and the kernel take, and counts how often it was asked."""

    def __init__(self, plain: float = 2.0, kernel: float = 1.0) -> None:
        self.seconds, self.measured = [plain, kernel], 0

    def __call__(self, runs: Sequence[Callable[[], None]]) -> list[float]:
        self.measured += 1
        for run in runs:
            run()
        return self.seconds


def raising(error: BaseException) -> Callable[[], Any]:
    def load() -> Any:
        raise error
    return load


Choose = Callable[..., fused.Choices]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Puts new choices in force, as if the CPU were a GPU and every tensor large."""
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    monkeypatch.setattr(fused, "SMALLEST", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def made(load: Callable[[], fused.Way], seconds: fused.Timer) -> fused.Choices:
        choices = fused.Choices(load, seconds, elements=2**13)
        monkeypatch.setattr(fused, "_choices", choices)
        return choices

    return made


def asked(kind: quants.Kind = KINDS["Q4_K"], dtype: torch.dtype = torch.bfloat16, blocks: int = 4) -> fused.Way | None:
    """The kernel for some blocks of this type."""
    raw = torch.zeros(blocks, kind.size, dtype=torch.uint8)
    return fused.kernel_for(raw, kind, torch.empty(blocks, kind.block, dtype=dtype), quants._fill)


class TestChoices:
    """When a kernel is used."""

    def test_a_faster_kernel_is_used_and_recorded(self, choose: Choose, ring: Ring) -> None:
        """With both speeds: bytes read and written, 8 KB of elements less one block."""
        kernel = Kernel()
        choose(lambda: kernel, Clock(plain=2e-6, kernel=1e-6))
        assert asked() is kernel
        (event,) = ring.named("gguf.kernel_chosen")
        moved = 31 * (144 + 256 * 2)
        assert event.fields == {"type": "Q4_K", "dtype": "bfloat16", "device": "cpu", "chosen": "fused",
                                "torch_gb_s": round(moved / 2e3, 1), "fused_gb_s": round(moved / 1e3, 1)}

    def test_a_slower_kernel_is_not(self, choose: Choose, ring: Ring) -> None:
        """Torch's code stays, and that is recorded too."""
        choose(Kernel, Clock(plain=1, kernel=1.01))
        assert asked() is None
        assert [event.fields["chosen"] for event in ring.named("gguf.kernel_chosen")] == ["torch"]

    @pytest.mark.parametrize("speeds", [fused.Speeds(1, 2), fused.Speeds(2, 1)], ids=["faster", "slower"])
    def test_measured_once_per_device_type_and_dtype(self, choose: Choose, monkeypatch: pytest.MonkeyPatch,
                                                     speeds: fused.Speeds) -> None:
        """However often it is asked for."""
        measured: list[object] = []

        def measure(kernel: fused.Way, plain: fused.Way, *key: Any) -> fused.Speeds:
            measured.append(key[:3])
            return speeds

        monkeypatch.setattr(fused, "measure", measure)
        kernel = Kernel()
        choices = choose(lambda: kernel, Clock())
        for _ in range(3):
            for kind in HOT:
                for dtype in DTYPES:
                    for device in (CPU, torch.device("meta")):
                        way = choices.way(kind, dtype, device, quants._fill)
                        assert way is (kernel if speeds.fused > speeds.torch else None)
        assert len(measured) == len(set(measured)) == len(HOT) * len(DTYPES) * 2

    def test_another_result_refuses_the_type(self, choose: Choose, caplog: pytest.LogCaptureFixture) -> None:
        """One wrong bit in one number: the kernel is not timed, nor used for any dtype; other types are as they were."""
        clock = Clock()
        right, wrong = Kernel(), Kernel(lambda out: out[-1, -1:].neg_() if out.dtype == torch.float16 else None)
        choices = choose(lambda: wrong, clock)
        with caplog.at_level(logging.INFO, "residency"):
            assert asked(dtype=torch.bfloat16) is wrong
            assert asked(dtype=torch.float16) is None
            assert asked(dtype=torch.bfloat16) is asked(dtype=torch.float32) is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "Q4_K on cpu does not give torch's numbers" in caplog.text
        choices._load = lambda: right
        assert asked(KINDS["Q8_0"]) is right
        assert clock.measured == 2

    def test_a_kernel_that_writes_nothing_is_noticed(self, choose: Choose) -> None:
        """Memory that was free a moment ago may hold the right numbers."""
        choose(lambda: lambda out, blocks, kind: None, Clock())
        assert asked() is None

    @pytest.mark.parametrize(("error", "level"), [(ImportError("No module named 'triton'"), "DEBUG"),
                                                  (RuntimeError("no C compiler"), "INFO")])
    @pytest.mark.parametrize("when", ["importing", "running"])
    def test_what_fails_is_left_alone(self, choose: Choose, caplog: pytest.LogCaptureFixture, error: Exception, level: str,
                                      when: str) -> None:
        """For all types, said once."""
        loads: list[int] = []
        fail = raising(error)

        def load() -> Any:
            loads.append(1)
            return fail() if when == "importing" else Kernel(lambda out: fail())

        choose(load, Clock())
        with caplog.at_level(logging.DEBUG, "residency"):
            assert [asked(kind, dtype) for _ in range(2) for kind in HOT for dtype in DTYPES] == [None] * 24
        assert len(loads) == 1
        assert [record.levelname for record in caplog.records] == [level]
        assert str(error) in caplog.text

    def test_without_triton_torch_stays(self, choose: Choose, monkeypatch: pytest.MonkeyPatch,
                                        caplog: pytest.LogCaptureFixture) -> None:
        """It is not a requirement."""
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, KERNELS, raising=False)
        choose(fused._load, Clock())
        raw = random_bytes(KINDS["Q6_K"], 3)
        with caplog.at_level(logging.DEBUG, "residency"):
            result = quants.dequantize(raw, KINDS["Q6_K"].number, (768,), torch.float16)
        assert same(result, reference(raw, KINDS["Q6_K"]).to(torch.float16))
        assert [record.levelname for record in caplog.records] == ["DEBUG"]

    def test_no_memory_is_no_verdict_on_the_others(self, choose: Choose, caplog: pytest.LogCaptureFixture) -> None:
        """That dtype of that type keeps torch's code, and nobody hears of the error."""
        kernel = Kernel()
        choices = choose(raising(torch.cuda.OutOfMemoryError("CUDA out of memory")), Clock())
        with caplog.at_level(logging.INFO, "residency"):
            assert asked() is asked() is None
        assert len(caplog.records) == 1
        choices._load = lambda: kernel
        assert asked() is None
        assert asked(dtype=torch.float32) is kernel

    def test_cancel_goes_up_and_it_is_measured_again(self, choose: Choose) -> None:
        """Whatever is not an error of Triton's is not ours to keep."""
        choices = choose(raising(KeyboardInterrupt()), Clock())
        with pytest.raises(KeyboardInterrupt):
            asked()
        choices._load = Kernel
        assert asked() is not None

    def test_a_second_thread_does_not_wait(self, choose: Choose) -> None:
        """It uses torch's code while the first one measures."""
        seen: list[object] = []

        def other(runs: Sequence[Callable[[], None]]) -> list[float]:
            thread = threading.Thread(target=lambda: seen.append(asked()))
            thread.start()
            thread.join(10)
            return [2, 1]

        choose(Kernel, other)
        assert asked() is not None
        assert seen == [None]

    def test_the_noise_of_images_stays_as_it_was(self, choose: Choose) -> None:
        """Random blocks do not come from the generator that samplers use."""
        before = torch.get_rng_state()
        choose(Kernel, Clock())
        assert asked() is not None
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("kind", [HOT[0], HOT[3]], ids=["Q8_0", "Q6_K"])
    def test_random_blocks_have_every_kind_of_scale(self, choose: Choose, kind: quants.Kind) -> None:
        """Subnormal, infinite and undefined ones; and the last program lacks a block."""
        seen: list[torch.Tensor] = []
        choose(lambda: lambda out, blocks, kind: seen.append(blocks), Clock())
        asked(kind)
        (blocks,) = seen
        start = {"Q8_0": 0, "Q6_K": 208}[kind.name]
        scale = blocks[:, start:start + 2].contiguous().view(torch.float16)
        assert scale.isinf().any() and scale.isnan().any() and ((scale != 0) & (scale.abs() < 2**-14)).any()
        assert len(blocks) % (4096 // kind.block) == 4096 // kind.block - 1


def test_seconds_are_medians_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of single launches, by the device's clock; a hiccup of the machine is not counted."""
    now = [0.0]  # milliseconds
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def run(name: str, milliseconds: float) -> None:
        order.append(name)
        now[0] += milliseconds if len(order) != 10 else 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    seconds = fused.device_seconds([lambda: run("torch", 4), lambda: run("kernel", 1)])
    assert seconds == pytest.approx([0.004, 0.001])
    assert order == (["torch"] * fused.BURST + ["kernel"] * fused.BURST) * fused.ROUNDS


class TestWhereNothingIsMeasured:
    """And torch's code is used, for the moment or for good."""

    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, choose: Choose) -> Iterator[None]:
        loads: list[int] = []
        choose(lambda: loads.append(1) or Kernel(), Clock())
        yield
        assert loads == []

    @pytest.mark.parametrize(("kind", "dtype", "blocks"), [("Q4_0", torch.float32, 4), ("Q4_K", torch.float64, 4),
                                                           ("Q4_K", torch.float32, 3)])
    def test_other_types_and_small_tensors(self, kind: str, dtype: torch.dtype, blocks: int,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
        """There is no kernel, or it would not matter."""
        monkeypatch.setattr(fused, "SMALLEST", 1024)
        assert asked(KINDS[kind], dtype, blocks) is None

    def test_other_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The CPU is not asked for more than its name."""
        monkeypatch.undo()
        assert fused.DEVICE == "cuda"
        assert asked(blocks=2**13) is None

    def test_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A compilation or a wait would break it."""
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert asked() is None

    def test_while_a_compiler_traces(self) -> None:
        """One graph, without a break, of torch's code."""
        torch._dynamo.reset()
        kind = KINDS["Q4_K"]
        raw = random_bytes(kind, 6)
        compiled = torch.compile(lambda raw: quants.dequantize(raw, kind.number, (6, 256), torch.bfloat16) + 0,
                                 backend="eager", fullgraph=True)
        assert same(compiled(raw).flatten(), reference(raw, kind).to(torch.bfloat16) + 0)

    def test_fake_tensors(self) -> None:
        """They have no bytes."""
        with FakeTensorMode():
            assert asked() is None

    @pytest.mark.parametrize("which", ["blocks", "out"])
    def test_unaligned_memory(self, which: str) -> None:
        """Triton would compile another kernel for it, which nobody has compared."""
        kind = KINDS["Q8_0"]
        raw, out = torch.zeros(3, 34, dtype=torch.uint8), torch.empty(3, 32)
        arguments = (raw[1:], kind, out[1:]) if which == "blocks" else (raw[:2], kind, out.flatten()[1:65].view(2, 32))
        assert fused.kernel_for(*arguments, quants._fill) is None

    def test_more_than_2_gb_on_amd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same."""
        monkeypatch.setattr(torch.version, "hip", "7.0")
        kind = KINDS["Q8_0"]
        memory = torch.empty(2**31, dtype=torch.uint8)  # untouched, so there is none
        assert fused.kernel_for(memory[:34 * 4].view(4, 34), kind, torch.empty(4, 32), quants._fill) is None


@each_kind
@each_dtype
def test_dequantize_uses_the_kernel_that_was_chosen(interpreted: fused.Way, choose: Choose, ring: Ring, kind: quants.Kind,
                                                    dtype: torch.dtype) -> None:
    """And nothing else: the real kernels, compared with torch's code on random blocks, then on the tensor itself."""
    launches: list[int] = []

    def launch(out: torch.Tensor, blocks: torch.Tensor, kind: quants.Kind) -> None:
        launches.append(len(blocks))
        interpreted(out, blocks, kind)

    choose(lambda: launch, Clock())
    raw = random_bytes(kind, 24)
    for offset in (0, 1, 4):  # torch's code copies the second, and the third stays with it
        slack = torch.cat([torch.zeros(offset, dtype=torch.uint8), raw.flatten()])[offset:]
        out = torch.empty(24 * kind.block, dtype=dtype)
        result = quants.dequantize(slack, kind.number, (4, 6 * kind.block), dtype, out)
        assert same(result.flatten(), reference(raw, kind).to(dtype)) and result.data_ptr() == out.data_ptr()
    rows = quants.dequantize_rows(raw.view(4, -1), kind.number, torch.tensor([3, 1]), dtype)
    assert same(rows, result[[3, 1]])
    assert launches == [2**13 // kind.block - 1] * 2 + [24, 24, 12]
    assert [event.fields["chosen"] for event in ring.named("gguf.kernel_chosen")] == ["fused"]


@pytest.mark.gpu
class TestOnAGpu:
    """The kernels as they are compiled."""

    @pytest.fixture(autouse=True)
    def triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        pytest.importorskip("triton", reason="Triton is not installed")
        assert not os.environ.get("TRITON_INTERPRET")
        monkeypatch.setattr(fused, "_choices", fused.Choices(fused._load, fused.device_seconds))

    @each_kind
    @each_dtype
    @pytest.mark.parametrize("offset", [0, 1])
    def test_numbers_are_ggufs_to_the_last_bit(self, kind: quants.Kind, dtype: torch.dtype, offset: int) -> None:
        """At any address."""
        from residency.policies.files.quants import kernels

        raw = random_bytes(kind, 3001)
        slack = torch.cat([torch.zeros(offset, dtype=torch.uint8), raw.flatten()]).cuda()[offset:].view(raw.shape)
        assert same(filled(kernels.launch, slack, kind, dtype).cpu(), reference(raw, kind).to(dtype))

    @each_kind
    @each_dtype
    def test_a_choice_is_recorded(self, kind: quants.Kind, dtype: torch.dtype, ring: Ring) -> None:
        """Once, whichever it is; with the same numbers by either way, and the device's generator as it was."""
        raw = random_bytes(kind, 2**20 // kind.block)
        before = torch.cuda.get_rng_state()
        results = [quants.dequantize(raw.cuda(), kind.number, (2**20,), dtype).cpu() for _ in range(2)]
        assert all(same(result, reference(raw, kind).to(dtype)) for result in results)
        (event,) = ring.named("gguf.kernel_chosen")
        speeds = {way: event.fields[f"{way}_gb_s"] for way in ("torch", "fused")}
        assert speeds[event.fields["chosen"]] == max(speeds.values()) and min(speeds.values()) > 0
        assert torch.equal(torch.cuda.get_rng_state(), before)

    def test_a_captured_graph_is_torchs(self, ring: Ring) -> None:
        """A capture survives the first large tensor."""
        kind = KINDS["Q4_K"]
        raw = random_bytes(kind, 2**20 // kind.block)
        blocks, out = raw.cuda(), torch.empty(2**20, dtype=torch.float16, device="cuda")
        quants.dequantize(blocks[:64], kind.number, (64 * 256,), torch.float16)  # makes the tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            quants.dequantize(blocks, kind.number, (2**20,), torch.float16, out)
        graph.replay()
        assert same(out.cpu(), reference(raw, kind).to(torch.float16))
        assert ring.named("gguf.kernel_chosen") == []

    @each_kind
    def test_more_than_two_billion_elements(self, kind: quants.Kind) -> None:
        """The last blocks of a tensor whose elements and bytes do not fit into 31 bits."""
        from residency.policies.files.quants import kernels

        count = 2**31 // min(kind.block, kind.size) + 3
        if torch.cuda.mem_get_info()[0] < count * (kind.size + 2 * kind.block) * 1.1:
            pytest.skip("not enough memory on the device")
        raw = random_bytes(kind, 100)
        blocks = torch.zeros(count, kind.size, dtype=torch.uint8, device="cuda")
        blocks[-100:] = raw.cuda()
        out = torch.empty(count, kind.block, dtype=torch.float16, device="cuda")
        kernels.launch(out, blocks, kind)
        assert same(out[-100:].cpu().flatten(), reference(raw, kind).to(torch.float16))
        assert not out[:100].any()
