"""Feed-forwards in pieces: ComfyUI's own models give the same, and what must not be cut is seen by what it computes."""
from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from residency.policies.chunking import Chunking, Ineffective, run
from residency.telemetry.sinks import Ring
from support.families import DEAF, FAMILIES, random
from support.transient import peak_bytes
from torch import nn

WIDTH, TOKENS = 32, 256


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def feed_forward(inner: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), inner or nn.GELU(), nn.Linear(128, WIDTH)).eval()


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        answer: torch.Tensor = self.inside(x)
        return answer


class Counted(nn.Module):
    """Its parts are told how many tokens came at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = Sizes()
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.sizes(self.up(x)))


class Sizes(nn.GELU):
    SEEN: list[tuple[int, ...]] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.SEEN.append(tuple(input.shape[:-1]))
        return super().forward(input)


class Averaging(nn.Module):
    """Tokens know of each other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-3 * x.mean(-2, keepdim=True)


class SharedScale(nn.Module):
    """As a quantised layer that finds its scale from all tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


class Placed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.linspace(1, 2, x.shape[-2]).unsqueeze(-1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


class Halving(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., ::2, :]


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(1, TOKENS, 128)


class Attention(nn.Module):
    """Its layers are a feed-forward's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = *(nn.Linear(WIDTH, 64) for _ in range(3)), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize("family", {**FAMILIES, **DEAF})
def test_a_real_model_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-6 of the largest value at these sizes: pieces of a few tokens are rounded in another way."""
    monkeypatch.setattr(run, "LEAST", 2)
    monkeypatch.setattr(run, "_SAMPLE", 2)
    case = {**FAMILIES, **DEAF}[family]
    model = case.model()
    expected = case.call(model, {})

    with Chunking(3).during(model) as tally:
        found = case.call(model, {})

    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-6
    assert tally.in_pieces == tally.calls > 0
    assert tally.ineffective() == ""
    assert torch.equal(case.call(model, {}), expected)  # nothing is left behind
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_it_is_the_same_bit_for_bit_at_a_models_widths(dtype: torch.dtype, rows: int, pieces: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 1024), nn.GELU("tanh"), nn.Linear(1024, 256)).to(dtype)
    model, x = Holder(module), random(rows, 768, 256).to(dtype)
    expected = module(x)

    with Chunking(pieces).during(model) as tally:
        found = model(x, None)

    assert tally.in_pieces == 1
    assert torch.equal(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize(("shape", "pieces"), [
    ((1, 256, WIDTH), [(1, 64)] * 4), ((2, 256, WIDTH), [(1, 128)] * 4), ((256, WIDTH), [(64,)] * 4),
    ((1, 2, 16, 16, WIDTH), [(1, 1, 1, 128)] * 4), ((1, 130, WIDTH), [(1, 65)] * 2),
    ((1, 261, WIDTH), [(1, 66)] + [(1, 65)] * 3),
])
def test_pieces_are_as_many_as_asked_for_and_none_is_tiny(shape: tuple[int, ...], pieces: list[tuple[int, ...]]) -> None:
    """Tokens of all rows stand in a line, whatever dimensions they have."""
    model, x = Holder(Counted()), random(*shape)
    expected = model(x, None)
    chunking = Chunking(4)
    with chunking.during(model):
        model(x, None)  # is checked
        Sizes.SEEN.clear()
        found = model(x, None)

    assert pieces == Sizes.SEEN
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_tensor_that_is_not_contiguous() -> None:
    module, x = feed_forward(), random(2, WIDTH, TOKENS).transpose(1, 2)

    with Chunking(4).during(Holder(module)) as tally:
        found = module(x)

    assert tally.in_pieces == 1
    assert torch.allclose(found, module(x), atol=1e-6)


@pytest.mark.parametrize(("inner", "why"), [
    (Averaging(), "tokens know of each other"), (SharedScale(), "tokens know of each other"), (nn.Softmax(-2), "tokens know"),
    (Placed(), "place matters"), (Counting(), "keeps a state"), (Halving(), "not a token for each token"),
    (Picky(), "cannot be run on some of its tokens"), (Noise(), "tokens know of each other"),
], ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "")
def test_what_must_not_be_cut_stays_whole(inner: nn.Module, why: str) -> None:
    module, x = feed_forward(inner), random(1, TOKENS, WIDTH)

    with Chunking(4).during(Holder(module)) as tally:
        found = module(x)

    assert tally.in_pieces == 0
    assert why in tally.ineffective()
    if not isinstance(inner, Noise):
        assert torch.equal(found, module(x))


def test_attention_that_looks_like_one_stays_whole() -> None:
    module, x = Attention(), random(1, TOKENS, WIDTH)

    with Chunking(4).during(Holder(module)) as tally:
        found = module(x)

    assert (tally.found, tally.in_pieces) == (1, 0)
    assert torch.equal(found, module(x))


def test_what_is_found_to_keep_a_state_gets_it_back() -> None:
    counter = Counting()
    module = feed_forward(counter)

    with Chunking(4).during(Holder(module)):
        module(random(1, TOKENS, WIDTH))

    assert counter.calls == 1


def test_without_the_check_attention_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail."""
    module, x = Attention(), random(1, TOKENS, WIDTH)
    monkeypatch.setattr(run, "check", lambda *_: "")

    with Chunking(4).during(Holder(module)):
        found = module(x)

    assert (found - module(x)).abs().max() > 0.01 * found.abs().max()


def test_each_module_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(run, "check", lambda module, *_: asked.append(module) or "")
    one, other = feed_forward(), feed_forward()
    model, chunking = nn.ModuleList([one, other]), Chunking(2)

    for _ in range(3):
        with chunking.during(model):
            one(random(1, TOKENS, WIDTH))
            other(random(1, TOKENS, WIDTH))

    assert asked == [one, other]


@pytest.mark.parametrize("call", [
    lambda module: module(random(1, 100, WIDTH)), lambda module: module(random(4, WIDTH)),
    lambda module: module(input=random(1, TOKENS, WIDTH)),
])
def test_what_does_not_fit_is_run_as_it_is(call: Any) -> None:
    module = feed_forward()

    with Chunking(4).during(Holder(module)) as tally:
        found = call(module)

    assert (tally.calls, tally.in_pieces) == (1, 0)
    assert torch.equal(found, call(module))


def test_training_is_left_alone() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        module = feed_forward()
        with Chunking(4).during(Holder(module)) as tally:
            module(random(1, TOKENS, WIDTH)).sum().backward()

    assert tally.in_pieces == 0
    assert module[0].weight.grad is not None


def test_an_error_goes_up_and_nothing_stays() -> None:
    module = feed_forward()

    with pytest.raises(KeyboardInterrupt), Chunking(4).during(Holder(module)):
        assert "forward" in vars(module)
        raise KeyboardInterrupt

    assert "forward" not in vars(module)


def test_what_somebody_puts_there_meanwhile_stays() -> None:
    module = feed_forward()

    with Chunking(4).during(Holder(module)):
        vars(module)["forward"] = theirs = lambda x: x

    assert vars(module)["forward"] is theirs


def test_one_inside_another_changes_nothing() -> None:
    """Two predictions of one model, as branches that are computed side by side."""
    module, x = feed_forward(), random(1, TOKENS, WIDTH)
    chunking, model = Chunking(4), Holder(module)

    with chunking.during(model) as outer, chunking.during(model) as inner:
        module(x)

    assert (outer.in_pieces, inner.found) == (1, 0)
    assert "forward" not in vars(module)


def test_one_piece_touches_nothing() -> None:
    module = feed_forward()

    with Chunking(1).during(Holder(module)) as tally:
        assert "forward" not in vars(module)

    assert (tally.found, tally.ineffective()) == (0, "")


def test_a_model_that_goes_is_not_kept() -> None:
    model, chunking = Holder(feed_forward()), Chunking(4)
    with chunking.during(model):
        model(random(1, TOKENS, WIDTH), None)
    gone = weakref.ref(model.inside)
    del model
    gc.collect()

    assert gone() is None


def test_a_model_without_any_says_so(ring: Ring) -> None:
    with Chunking(4).during(Holder(nn.Linear(4, 4))) as tally:
        pass
    told = Ineffective("hybrid_split")
    for _ in range(3):
        told.tell("Model", tally.ineffective())
    told.tell("Other", "")

    assert [(event.fields["policy"], event.fields["reason"]) for event in ring.named("policy.ineffective")] == [
        ("hybrid_split", "ffn_chunks: Model: it has no feed-forward of its own that could be run in pieces")]


def test_what_was_not_computed_here_is_no_failure() -> None:
    with Chunking(4).during(Holder(feed_forward())) as tally:
        pass

    assert tally.ineffective() == ""


def test_the_largest_memory_of_a_moment_falls() -> None:
    """By what torch counts on the CPU: what is allocated for the widened tokens is divided by the pieces."""
    module, x = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)).eval(), random(1, 4096, 64)
    chunking = Chunking(8)
    whole = peak_bytes(lambda: module(x))
    with chunking.during(Holder(module)):
        module(x)  # is checked
        pieces = peak_bytes(lambda: module(x))

    wide, answer = 4096 * 512 * 4, 4096 * 64 * 4
    assert whole >= 2 * wide
    assert pieces <= 2 * wide / 8 + 1.2 * answer + 4096
    assert pieces < whole / 4
