"""`ffn_chunks`: who is asked, and what the user reads."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from residency.policies import Tools
from residency.policies.chain import PolicyChain
from residency.policies.hybrid_split import HybridSplit, Settings
from residency.policies.policy import Decision, Policy
from residency.policies.requests import Request
from residency.policies.sampling import Predict
from residency.telemetry.sinks import Ring
from torch import nn

WIDTH = 32


class Block(nn.Module):
    """A feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: torch.Tensor, context: Any) -> torch.Tensor:
        answer: torch.Tensor = self.ffn(x)
        return answer


class Elsewhere(Policy):
    """Has it computed by somebody else."""

    name = "elsewhere"
    answers = frozenset({Predict})

    def decide(self, request: Request) -> Decision:
        return Decision("", lambda proceed: "from a worker")


def predict(module: nn.Module, x: torch.Tensor) -> Any:
    remote: Any = SimpleNamespace(module=module)
    weights: Any = SimpleNamespace(name="Flux")
    return Predict(remote, weights, x, {}, ())


def cut(module: Block) -> bool:
    return "forward" in vars(module.ffn)


@pytest.mark.parametrize("pieces", [1, 4])
def test_with_one_piece_nobody_asks(tools: Tools, pieces: int) -> None:
    """So that the hook is not installed."""
    assert (Predict in HybridSplit(Settings(ffn_chunks=pieces), tools).answers) == (pieces > 1)


def test_the_hosts_prediction_is_run_in_pieces(tools: Tools, ring: Ring) -> None:
    chain, block = PolicyChain([HybridSplit(Settings(ffn_chunks=4), tools)]), Block()
    x = torch.randn(1, 512, WIDTH)
    during = []

    def host(request: Request) -> Any:
        during.append(cut(block))
        return block(x, None)

    with torch.inference_mode():
        found = chain.answer(predict(block, x), host)
        assert torch.allclose(found, block(x, None), atol=1e-6)

    assert during == [True]
    assert not cut(block)
    assert ring.named("policy.ineffective") == []


def test_what_somebody_else_computes_is_left_to_them(tools: Tools, ring: Ring) -> None:
    chain = PolicyChain([Elsewhere(), HybridSplit(Settings(ffn_chunks=4), tools)])

    assert chain.answer(predict(Block(), torch.zeros(1)), lambda request: "here") == "from a worker"
    assert ring.named("policy.ineffective") == []


@pytest.mark.parametrize(("tokens", "module", "why"), [
    (512, nn.Linear(WIDTH, WIDTH), "no feed-forward"), (100, Block(), "fewer than 128 tokens"),
])
def test_a_setting_without_effect_is_said_once(tools: Tools, ring: Ring, tokens: int, module: nn.Module, why: str) -> None:
    chain, x = PolicyChain([HybridSplit(Settings(ffn_chunks=4), tools)]), torch.randn(1, tokens, WIDTH)

    with torch.inference_mode():
        for _ in range(3):
            chain.answer(predict(module, x), lambda request: module(x, None) if isinstance(module, Block) else module(x))

    told = [event.fields["reason"] for event in ring.named("policy.ineffective")]
    assert len(told) == 1
    assert why in told[0]
    assert told[0].startswith("ffn_chunks: Flux: ")


def test_the_hosts_error_goes_up_as_it_is(tools: Tools) -> None:
    chain, block = PolicyChain([HybridSplit(Settings(ffn_chunks=4), tools)]), Block()
    error = RuntimeError("out of memory")

    def host(request: Request) -> Any:
        raise error

    with pytest.raises(RuntimeError) as caught:
        chain.answer(predict(block, torch.zeros(1)), host)

    assert caught.value is error
    assert not cut(block)
