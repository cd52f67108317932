"""Sharing attention by heads changes nothing but who computes: arithmetic in one process, ComfyUI's models in three."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comfy.ldm.modules import attention as comfy_attention
from residency.policies.ray_shard.worker.heads import HeadParallel, split
from residency.policies.ray_shard.worker.parallel import Attention
from support.head_ranks import LONELY, WAYS
from support.ranks import ranks_of

TOLERANCE = 1e-5
RANKS = 3
Results = list[dict[str, dict[str, Any]]]


class Recorder:
    """One rank of a group whose others are asked later: `given` is what it would have sent, `dim` where it is put together."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.given = torch.empty(0)
        self.dim = 0
        self.sizes: list[int] = []

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        assert tensor.shape[dim] == sizes[self.rank]
        self.given, self.dim, self.sizes = tensor, dim, list(sizes)
        return tensor


def together(world: int, shares: list[float] | None, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What the ranks would gather, each computing its own."""
    recorders = [Recorder(rank, world) for rank in range(world)]
    for recorder in recorders:
        parallel = HeadParallel(recorder, shares)
        parallel.attention(func, *args, **kwargs)
        assert (parallel.shared, parallel.whole) == (1, 0)
    assert len({tuple(recorder.sizes) for recorder in recorders}) == 1
    return torch.cat([recorder.given for recorder in recorders], recorders[0].dim)


def alike(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return result.shape == expected.shape and bool(torch.allclose(result, expected, rtol=TOLERANCE, atol=TOLERANCE))


def vectors(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(("heads", "shares", "expected"), [
    (24, [1, 1], [12, 12]), (5, [1, 1], [3, 2]), (24, [1, 1, 1, 1, 1], [5, 5, 5, 5, 4]), (10, [0.7, 0.3], [7, 3]),
    (2, [1, 1, 1], [1, 1, 0]), (3, [9, 1], [3, 0]), (5, [1, 0, 1], [3, 0, 2]), (40, [24e9, 12e9], [27, 13]), (8, [1], [8]),
])
def test_heads_are_split_by_shares(heads: int, shares: list[float], expected: list[int]) -> None:
    """In whole heads, and all of them."""
    assert split(heads, shares) == expected


@pytest.mark.parametrize("shares", [[1.0], [1, 1, 1], [1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_shares_that_make_no_split_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="2 ranks want as many shares"):
        HeadParallel(Recorder(0, 2), shares)


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize(("world", "shares"), [(2, None), (3, None), (2, [0.7, 0.3]), (8, None)])
@pytest.mark.parametrize("name", ["attention_pytorch", "attention_basic", "attention_sub_quad", "attention_split"])
def test_every_attention_function_is_shared(name: str, world: int, shares: list[float] | None, skip_reshape: bool,
                                            skip_output_reshape: bool) -> None:
    """In both layouts of what goes in and what comes out, on more ranks than heads too."""
    func = getattr(comfy_attention, name)
    args = vectors(2, 5, 7, 4) if skip_reshape else vectors(2, 7, 20)
    flags = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}

    assert alike(together(world, shares, func, *args, 5, **flags), func(*args, 5, **flags))


@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (2, 7, 9), (2, 1, 9), (2, 1, 7, 9), (1, 5, 7, 9), (2, 5, 1, 9),
                                   (1, 1, 1, 9)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_masks_of_every_shape_hold(shape: tuple[int, ...], kind: torch.dtype) -> None:
    """Those with heads are cut as the heads are; all else is for every head."""
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = mask > -0.5 if kind == torch.bool else mask * 4
    mask[..., 0] = True
    q, (k, v, _) = vectors(2, 5, 7, 4)[0], vectors(2, 5, 9, 4)
    func = comfy_attention.attention_pytorch

    expected = func(q, k, v, 5, mask=mask, skip_reshape=True)

    assert alike(together(3, None, func, q, k, v, 5, mask, skip_reshape=True), expected)
    assert not alike(func(q, k, v, 5, skip_reshape=True), expected)


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize(("world", "shares"), [(2, None), (2, [1, 2]), (3, None), (4, None), (7, None)])
@pytest.mark.parametrize("fewer", [1, 2, 3, 6])
def test_grouped_queries_keep_their_keys(fewer: int, world: int, shares: list[float] | None, skip_reshape: bool) -> None:
    """Where a group is on two ranks, both have its keys."""
    q = vectors(2, 6, 7, 4)[0]
    _, k, v = vectors(2, fewer, 9, 4)
    if not skip_reshape:
        q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (q, k, v))
    func = comfy_attention.attention_pytorch
    flags = {"skip_reshape": skip_reshape, "enable_gqa": True}

    assert alike(together(world, shares, func, q, k, v, 6, **flags), func(q, k, v, 6, **flags))


def test_keys_for_all_heads_stay_whole() -> None:
    """One head of keys without a word of groups is broadcast."""
    q, (_, k, v) = vectors(2, 6, 7, 4)[0], vectors(2, 1, 9, 4)
    func = comfy_attention.attention_pytorch

    assert alike(together(4, None, func, q, k, v, 6, skip_reshape=True), func(q, k, v, 6, skip_reshape=True))


def test_keys_with_heads_apart_are_taken() -> None:
    """Queries may come flat and keys (batch, tokens, heads, dim), as Stable Diffusion 3 gives them."""
    q, k, v = vectors(2, 7, 20)
    k, v = k.view(2, 7, 5, 4), v.view(2, 7, 5, 4)
    func = comfy_attention.attention_pytorch

    assert alike(together(2, None, func, q, k, v, 5), func(q, k, v, 5))


def test_values_may_be_wider_than_keys() -> None:
    """The result is as wide as the values are."""
    (q, k, _), v = vectors(2, 5, 7, 4), vectors(2, 5, 7, 6)[2]
    func = comfy_attention.attention_pytorch
    flags = {"skip_reshape": True, "skip_output_reshape": True}

    assert alike(together(8, None, func, q, k, v, 5, **flags), func(q, k, v, 5, **flags))


def test_what_the_caller_says_reaches_the_function() -> None:
    """Releases add arguments; they are for every head alike."""
    heard: list[dict[str, Any]] = []

    def func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
        heard.append({"heads": heads, **kwargs})
        return q

    options = {"block": 3}
    said = {"scale": 0.3, "low_precision_attention": False, "transformer_options": options, "_inside_attn_wrapper": True}
    HeadParallel(Recorder(1, 2)).attention(func, *vectors(2, 7, 20), heads=5, attn_precision=torch.float32, **said)

    assert heard == [{"heads": 2, "mask": None, "attn_precision": torch.float32, "skip_reshape": False,
                      "skip_output_reshape": False, **said}]
    assert heard[0]["transformer_options"] is options


@pytest.mark.parametrize("case", ["one head", "one rank", "heads of a mask", "heads of the queries", "rows of keys"])
def test_what_cannot_be_shared_is_computed_whole(case: str) -> None:
    """By every rank, and counted apart."""
    q, k, v = vectors(2, 4, 7, 4)
    heads, mask, world = 4, None, 2
    if case == "one head":
        q, k, v, heads = q[:, :1], k[:, :1], v[:, :1], 1
    elif case == "one rank":
        world = 1
    elif case == "heads of a mask":
        mask = torch.zeros(1, 2, 7, 7)
    elif case == "heads of the queries":
        heads = 2
    else:
        k, v = k[:, :2], v[:, :2]
    parallel = HeadParallel(Recorder(0, world))

    result = parallel.attention(lambda *args, **kwargs: (args, kwargs["mask"]), q, k, v, heads, mask, skip_reshape=True)

    assert result[0][0] is q and result[0][1:] == (k, v, heads) and result[1] is mask
    assert (parallel.shared, parallel.whole) == (0, 1)


def test_an_override_of_the_users_is_the_local_attention() -> None:
    """It sees a rank's heads, and the function that it would have seen."""
    seen: list[tuple[Any, int]] = []

    def theirs(func: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((func, args[2]))
        return 2 * func(q, *args, **kwargs)

    q, k, v = vectors(2, 7, 20)
    recorder = Recorder(0, 2)
    parallel = HeadParallel(recorder)
    result = comfy_attention.attention_pytorch(q, k, v, 5, transformer_options={
        "optimized_attention_override": parallel.over(theirs)})

    assert seen == [(comfy_attention.attention_pytorch.__wrapped__, 3)]
    assert alike(result, 2 * comfy_attention.attention_pytorch(q, k, v, 5)[..., :12])
    assert parallel.over(None) == parallel.attention


def test_a_function_that_hands_over_is_shared_once() -> None:
    """Some attention functions call another, with the same options."""
    parallel = HeadParallel(Recorder(0, 2))
    options = {"optimized_attention_override": parallel.attention}

    def handing_over(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
        return comfy_attention.attention_pytorch(q, k, v, heads, transformer_options=options)

    result = parallel.attention(handing_over, *vectors(2, 7, 20), 5)

    assert (parallel.shared, parallel.whole) == (1, 0)
    assert alike(result, comfy_attention.attention_pytorch(*vectors(2, 7, 20), 5)[..., :12])


def test_an_error_inside_leaves_the_next_call_shared() -> None:
    """An out-of-memory, say, after which the step is repeated."""
    parallel = HeadParallel(Recorder(0, 2))

    def fails(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        parallel.attention(fails, *vectors(2, 7, 20), 5)
    parallel.attention(comfy_attention.attention_pytorch, *vectors(2, 7, 20), 5)

    assert parallel.shared == 1


@pytest.fixture(scope="module")
def ranks() -> Results:
    """What three processes found, each started once for all ways and families."""
    return ranks_of("head_ranks", RANKS, len(WAYS))


@pytest.mark.parametrize("way", WAYS)
def test_ranks_compute_what_one_alone_does(ranks: Results, way: str) -> None:
    """Every rank has the whole result, of every family of models."""
    found = [results[way] for results in ranks[:WAYS[way][0]]]
    wrong = {(rank, name): case["error"] for rank, cases in enumerate(found) for name, case in cases.items()
             if name != "sent" and not case["error"] <= TOLERANCE}

    assert wrong == {}
    assert len(found[0]) >= 12


@pytest.mark.parametrize("way", WAYS)
def test_every_attention_of_every_family_is_shared(ranks: Results, way: str) -> None:
    """Once; and none of a model that passes no options, unless the entry is there."""
    for results in ranks[:WAYS[way][0]]:
        shared = {name: (case["shared"], case["calls"]) for name, case in results[way].items() if name != "sent"}
        assert shared.pop("ernie")[0] == 0
        assert {name: counts for name, counts in shared.items() if counts[0] != counts[1] or counts[0] < 2} == {}


def test_ranks_that_do_not_gather_are_found_out(ranks: Results) -> None:
    """The control: by ten times the tolerance, in every family that is shared."""
    errors = {name: case["error"] for name, case in ranks[0][LONELY].items() if case["shared"]}

    assert min(errors.values()) > 10 * TOLERANCE
    assert len(errors) >= 12


def test_a_rank_sends_its_heads_alone(ranks: Results) -> None:
    """The bytes are the attention's results, once to every other rank; a rank without heads sends none."""
    sent = {way: [results[way]["sent"]["bytes"] for results in ranks[:WAYS[way][0]]] for way in WAYS}

    assert sent["three, one idle"][1] == 0
    assert sum(sent["two"]) == sum(sent["two, unequal"]) == sum(sent["three"]) // 2
    assert sent["two, unequal"][0] > sent["two"][0]
