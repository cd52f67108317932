"""What it costs to go through a hook."""
from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable

import torch
from residency.hooks import computing, host
from residency.hooks.registry import Hook, HookRegistry
from residency.hooks.seam import Seam
from residency.policies import Tools, hybrid_split
from residency.policies.chain import PolicyChain
from residency.policies.policy import Decision, Policy
from residency.policies.requests import FreeMemory

CALLS = 20_000


class _Silent(Policy):
    name = "silent"
    answers = frozenset({FreeMemory})


class _Acting(Policy):
    name = "acting"
    answers = frozenset({FreeMemory})

    def decide(self, request: FreeMemory) -> Decision:
        return Decision("", lambda proceed: proceed())


def _measure(module: types.ModuleType) -> float:
    return _best(lambda: module.free_memory(1.0, "cpu", keep_loaded=[]))


def _best(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - started)
    return best / CALLS * 1e6


def microseconds() -> list[tuple[str, float]]:
    """(case, microseconds above the bare call), the best of five runs of 20,000 calls."""
    module = types.ModuleType("bench_host")

    def free_memory(memory_required, device, keep_loaded=(), for_dynamic=False):
        return []

    module.free_memory = free_memory
    sys.modules["bench_host"] = module
    bare = _measure(module)
    rows = []
    cases = (("no policy", []), ("a policy without an opinion", [_Silent()]), ("a policy that acts", [_Acting()]))
    for title, policies in cases:
        chain = PolicyChain(policies)
        seam = Seam("bench_host", "free_memory", ("memory_required", "device"))
        hook = Hook(seam, FreeMemory, lambda call: FreeMemory(str(call["device"]), float(call["memory_required"])),
                    report=lambda call, request, answer, seconds: None)
        registry = HookRegistry([hook], chain.answer)
        registry.sync(chain.wanted())
        rows.append((title, _measure(module) - bare))
        registry.remove_all()
    rows.append(("a sampling step that may be repeated", _step()))
    return rows


def _step() -> float:
    """The one hook of ours that is passed at each step, on a host that computes nothing."""
    import comfy.model_patcher
    import comfy.samplers

    def _calc_cond_batch(model, conds, x_in, timestep, model_options):
        return []

    original, comfy.samplers._calc_cond_batch = comfy.samplers._calc_cond_batch, _calc_cond_batch
    patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), torch.device("meta"), torch.device("cpu"))
    model, options = types.SimpleNamespace(current_patcher=patcher), {"transformer_options": {}}
    tools = Tools.make(host.connect())
    chain = PolicyChain([hybrid_split.create(hybrid_split.Settings(), tools)], is_oom=tools.host.memory.is_oom)
    registry = HookRegistry(computing.HOOKS[:1], chain.answer, chain.is_oom)

    def call() -> None:
        comfy.samplers._calc_cond_batch(model, [], None, None, options)

    try:
        bare = _best(call)
        registry.sync(chain.wanted())
        return _best(call) - bare
    finally:
        registry.remove_all()
        comfy.samplers._calc_cond_batch = original
