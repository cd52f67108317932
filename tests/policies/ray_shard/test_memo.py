"""What a worker knows of conditionings: sent once, known again by its bits, forgotten on both sides at the same time."""
from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from residency.policies.ray_shard import memo
from residency.policies.ray_shard.memo import Received, Sent
from residency.policies.ray_shard.parcels import Parcel

CPU = torch.device("cpu")
LARGE = (1, 77, 256)  # 77 KiB in float32


class Line:
    """A sender and a receiver; what is sent is pickled as Ray does."""

    def __init__(self) -> None:
        self.sent, self.received = Sent(), Received()
        self.bytes = 0

    def send(self, **rest: Any) -> dict[str, Any]:
        return self.received.open(self.pack(**rest), CPU)

    def pack(self, **rest: Any) -> Parcel:
        parcel: Parcel = pickle.loads(pickle.dumps(self.sent.pack(torch.zeros(1), rest)))
        self.bytes = parcel.copied_bytes
        return parcel


@pytest.fixture
def line() -> Line:
    return Line()


def conditioning(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or LARGE), generator=torch.Generator().manual_seed(seed))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_it_is_sent_once(line: Line) -> None:
    """And again only in name, however often the host makes it anew."""
    first = line.send(c_crossattn=conditioning())
    assert line.bytes > conditioning().nbytes
    second = line.send(c_crossattn=conditioning())
    assert line.bytes < 100
    assert torch.equal(first["c_crossattn"], conditioning())
    assert torch.equal(second["c_crossattn"], conditioning())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_every_dtype(line: Line, dtype: torch.dtype) -> None:
    """Narrow and wide ones."""
    value = conditioning(0, 1, 77, 1024).to(dtype)
    for _ in range(2):
        found = line.send(c=value.clone())["c"]
        assert (found.dtype, bits(found)) == (dtype, bits(value))
    assert line.bytes < 100


@pytest.mark.parametrize("value", [math.nan, -0.0, math.inf], ids=repr)
def test_bits_that_arithmetic_takes_for_something_else(line: Line, value: float) -> None:
    """NaN is itself, and -0 is not 0."""
    special = conditioning()
    special[0, 3, 5] = value
    zero = special.clone()
    zero[0, 3, 5] = 0.0
    line.send(c=zero)
    assert bits(line.send(c=special)["c"]) == bits(special)
    assert line.bytes > special.nbytes
    assert bits(line.send(c=special.clone())["c"]) == bits(special)
    assert line.bytes < 100
    assert bits(line.send(c=zero)["c"]) == bits(zero)


def test_another_prompt_of_the_same_shape(line: Line) -> None:
    """It is told apart, and so is the same one in another dtype."""
    line.send(c=conditioning(1))
    assert torch.equal(line.send(c=conditioning(2))["c"], conditioning(2))
    assert line.send(c=conditioning(2).half())["c"].dtype == torch.float16
    assert torch.equal(line.send(c=conditioning(1))["c"], conditioning(1))


def test_what_was_changed_in_place_is_sent_again(line: Line) -> None:
    """The sender remembers what it sent, not where that was."""
    value = conditioning()
    line.send(c=value)
    value[0, 0, 0] += 1
    assert torch.equal(line.send(c=value)["c"], value)
    assert line.bytes > value.nbytes


def test_what_the_model_writes_to_is_its_own(line: Line) -> None:
    """The next step gets what was sent."""
    line.send(c=conditioning())["c"].zero_()
    line.send(c=conditioning())["c"].zero_()
    assert torch.equal(line.send(c=conditioning())["c"], conditioning())


def test_in_lists_tuples_and_dicts(line: Line) -> None:
    """As reference latents are."""
    for _ in range(2):
        found = line.send(latents=[conditioning(1), (conditioning(2), 7)], more={"a": conditioning(1)})
        assert torch.equal(found["latents"][0], conditioning(1))
        assert torch.equal(found["latents"][1][0], conditioning(2))
        assert torch.equal(found["more"]["a"], conditioning(1))
        assert (type(found["latents"]), type(found["latents"][1]), found["latents"][1][1]) == (list, tuple, 7)
    assert line.bytes < 100


def test_views_with_gaps_are_known_again(line: Line) -> None:
    """Their layout is no part of what they say."""
    wide = conditioning(0, 1, 77, 512)
    line.send(c=wide[..., :256])
    assert torch.equal(line.send(c=wide[..., :256].contiguous())["c"], wide[..., :256])
    assert line.bytes < 100


@pytest.mark.parametrize("value", [conditioning(0, 8, 8), torch.ones(1, 2**17, dtype=torch.bool),
                                   torch.ones(2**15, dtype=torch.long)], ids=lambda value: f"{value.dtype}")
def test_small_ones_and_whole_numbers_are_always_sent(line: Line, value: torch.Tensor) -> None:
    """To look for them costs more."""
    for _ in range(2):
        assert torch.equal(line.send(c=value)["c"], value)
        assert line.bytes >= value.nbytes
    assert not line.sent._sent


def test_what_is_new_at_every_step_is_not_remembered(line: Line) -> None:
    """A ControlNet's residuals would push the prompts out; options are not looked into."""
    found = line.send(control={"output": [conditioning(1), None]}, transformer_options={"a": conditioning(2)})
    assert torch.equal(found["control"]["output"][0], conditioning(1))
    assert torch.equal(found["transformer_options"]["a"], conditioning(2))
    assert not line.sent._sent


def test_the_one_not_used_for_longest_is_forgotten_by_both(line: Line) -> None:
    """It is sent again when it comes back; one that was used meanwhile stays."""
    most = memo._MOST
    for seed in range(most):
        line.send(c=conditioning(seed))
    line.send(c=conditioning(0))
    line.send(c=conditioning(most))
    assert len(line.sent._sent) == len(line.received._received) == most
    line.send(c=conditioning(0))
    assert line.bytes < 100
    assert torch.equal(line.send(c=conditioning(1))["c"], conditioning(1))
    assert line.bytes > conditioning().nbytes


def test_more_at_once_than_are_remembered(line: Line) -> None:
    """All arrive, and both sides remember the same ones."""
    many = [conditioning(seed) for seed in range(memo._MOST + 5)]
    for _ in range(2):
        found = line.send(latents=many)["latents"]
        assert all(map(torch.equal, found, many))
    assert list(line.received._received) and set(line.received._received) == set(line.sent._sent)


def test_a_sender_that_starts_anew_leaves_nothing_behind(line: Line) -> None:
    """Whatever became of what it sent before: lost on the way, or received."""
    line.send(c=conditioning(1))
    line.pack(c=conditioning(2))
    line.sent.clear()
    assert torch.equal(line.send(c=conditioning(2))["c"], conditioning(2))
    assert set(line.received._received) == set(line.sent._sent)
    assert len(line.sent._sent) == 1


def test_a_receiver_that_does_not_know_says_so(line: Line) -> None:
    """A worker that was started anew, with a sender that was not told."""
    line.pack(c=conditioning())
    with pytest.raises(KeyError):
        line.send(c=conditioning())
