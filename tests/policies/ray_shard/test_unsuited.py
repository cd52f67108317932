"""Calls whose tokens cannot be shared out are refused before anything is exchanged, and leave the model as it was."""
from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import pytest
import torch
from residency.policies.ray_shard.worker.families import family
from residency.policies.ray_shard.worker.tokens import TokenParallel, Unsuited
from support.families import FAMILIES, STEP, Family, Model, random
from support.flows import CASES


class Alone:
    """A rank of four whose others never answer."""

    rank, world = 0, 4

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        raise AssertionError("a tensor is gathered")

    def all_to_all(self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        raise AssertionError("tensors are exchanged")


def _short(family_: Family, **more: Any) -> Family:
    """With a text of two tokens."""
    return Family(family_.build, lambda model, options: model(
        random(1, 4, 14, 18), STEP, context=random(1, 2, 48, seed=2), transformer_options=options, **more))


def _patched(family_: Family, name: str) -> Family:
    return Family(family_.build, lambda model, options: family_.call(model, {**options, "patches": {name: [print]}}))


def _functions(model: Model) -> set[tuple[str, str]]:
    """That hang on modules themselves, not on their classes."""
    return {(path, name) for path, module in model.named_modules()
            for name, value in vars(module).items() if isinstance(value, FunctionType)}


REFUSED = {
    "a short text, chroma": _short(CASES["chroma, two rows"], guidance=torch.zeros(1)),
    "a short text, sd3": _short(FAMILIES["sd3"], y=random(1, 32)),
    "few tokens of text, hidream": Family(CASES["hidream, two rows"].build, lambda model, options: model(
        random(1, 4, 14, 18), STEP, y=random(1, 24), context=random(1, 1, 40), transformer_options=options,
        encoder_hidden_states_llama3=random(1, 3, 1, 48))),
    "patches between blocks, lumina": _patched(CASES["lumina"], "double_block"),
    "patches of attention, cosmos": _patched(CASES["cosmos, two rows"], "attn1_patch"),
    "times of other frames, cosmos": Family(CASES["cosmos, two rows"].build, lambda model, options: model(
        random(1, 4, 3, 10, 14), torch.tensor([[0.5, 0.4]]), random(1, 16, 48), transformer_options=options)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_is_refused_before_anything_is_exchanged(name: str) -> None:
    model = REFUSED[name].model()
    flow = family(model)
    assert flow is not None
    tokens, before = TokenParallel(Alone()), _functions(model)
    with torch.inference_mode(), pytest.raises(Unsuited), flow(model, tokens):
        REFUSED[name].call(model, {"optimized_attention_override": tokens.attention})

    assert _functions(model) == before


def test_a_class_that_is_not_known_by_its_own_name_has_no_family() -> None:
    """Who inherits may do anything else."""
    model = FAMILIES["flux"].build()
    model.__class__ = type("Flux", (type(model),), {})

    assert family(model) is None
