"""How tokens are shared in a model: only where it is known how they flow, and nothing stays behind in it."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from residency.policies.ray_shard.worker.pace import Pace
from residency.policies.ray_shard.worker.sharing import TOKENS, sharing
from residency.policies.ray_shard.worker.tokens import Unsuited
from support.families import FAMILIES

FLUX = FAMILIES["flux"]


class Alone:
    """A group of one."""

    rank, world = 0, 1

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Any) -> torch.Tensor:
        return tensor


def shared(model: torch.nn.Module, options: dict[str, Any]) -> torch.Tensor:
    arguments: dict[str, Any] = {"transformer_options": options}
    with sharing(TOKENS, model, arguments, Alone(), [1.0], Pace(Alone())):  # type: ignore[arg-type]
        return FLUX.call(model, arguments["transformer_options"])


def untouched(model: torch.nn.Module) -> bool:
    return not any({"forward", "forward_orig"} & set(vars(module)) for module in model.modules())


def test_a_group_of_one_has_all_tokens() -> None:
    """And computes what it would without being asked to share."""
    model = FLUX.model()
    assert torch.equal(shared(model, {}), FLUX.call(model, {}))
    assert untouched(model)


def test_a_patch_may_need_all_tokens() -> None:
    """It is named; one that is empty is none."""
    with pytest.raises(Unsuited, match=r"^attn1_patch, dit may need all tokens$"):
        shared(FLUX.model(), {"patches": {"attn1_patch": [print], "attn2_patch": []}, "patches_replace": {"dit": {0: print}}})
    shared(FLUX.model(), {"patches": {"attn2_patch": []}})


def test_a_subclass_may_do_anything_with_tokens() -> None:
    """It is not taken for the class that is known."""
    model = FLUX.model()
    model.__class__ = type("Changed", (type(model),), {})
    with pytest.raises(Unsuited, match="how tokens flow through Changed is not known here"):
        shared(model, {})


def test_what_a_pack_has_replaced_is_not_replaced_again() -> None:
    """It stays, and the tokens are not shared."""
    model = FLUX.model()
    theirs = vars(model)["forward_orig"] = model.forward_orig
    with pytest.raises(Unsuited, match=r"Flux\.forward_orig is replaced by a pack"):
        shared(model, {})
    assert vars(model)["forward_orig"] is theirs


def test_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own is raised."""
    model = FLUX.model()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model.single_blocks[1], "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        shared(model, {})
    monkeypatch.undo()
    assert untouched(model)
