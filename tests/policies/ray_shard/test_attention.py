"""The entry before ComfyUI's attention functions: shares what is called while a step is computed, and nothing else."""
from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import comfy.ldm.ernie.model as ernie
import comfy.ldm.flux.math as flux_math
import comfy.ldm.modules.attention as comfy_attention
import pytest
import torch
from residency.policies.ray_shard.worker import attention
from residency.policies.ray_shard.worker.heads import HeadParallel
from support.head_ranks import Lonely
from support.loading import TREES, VERSIONS

TENSORS = [torch.randn(1, 7, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
HELD = [(comfy_attention, "optimized_attention"), (comfy_attention, "optimized_attention_masked"),
        (comfy_attention, "attention_pytorch"), (comfy_attention, "attention_basic"), (ernie, "optimized_attention"),
        (flux_math, "optimized_attention")]


@pytest.fixture
def parallel() -> HeadParallel:
    """Of two ranks, of which the other never answers: what is shared shows."""
    return HeadParallel(Lonely())


@pytest.fixture
def entries() -> Iterator[list[attention.Entry]]:
    made = attention.install()
    yield made
    attention.remove(made)


def shared(result: torch.Tensor) -> bool:
    """The other's heads are missing."""
    return not result[..., 12:].any()


@pytest.mark.parametrize(("module", "name"), HELD, ids=lambda value: getattr(value, "__name__", value))
def test_an_entry_stands_wherever_a_module_holds_the_function(entries: list[attention.Entry], parallel: HeadParallel,
                                                              module: ModuleType, name: str) -> None:
    """Also where it was imported by name; what is called outside of a step is not touched."""
    function = vars(module)[name]

    with attention.sharing(parallel):
        assert shared(function(*TENSORS, 5))
    assert not shared(function(*TENSORS, 5))
    assert (parallel.shared, parallel.whole) == (1, 0)


def test_functions_that_are_asked_for_by_name_have_it_too(entries: list[attention.Entry], parallel: HeadParallel) -> None:
    """And those that are chosen for a device."""
    with attention.sharing(parallel):
        if hasattr(comfy_attention, "get_attention_function"):
            assert shared(comfy_attention.get_attention_function("sub_quad")(*TENSORS, 5))
        assert shared(comfy_attention.optimized_attention_for_device(torch.device("cpu"))(*TENSORS, 5))


def test_a_function_of_a_packs_own_has_it_too(parallel: HeadParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack makes an attention function with ComfyUI's `wrap_attn`."""
    pack = ModuleType("a_pack")
    vars(pack)["kernel"] = comfy_attention.wrap_attn(lambda q, k, v, heads, **kwargs: torch.ones_like(q))
    monkeypatch.setitem(sys.modules, "a_pack", pack)
    entries = attention.install()
    try:
        with attention.sharing(parallel):
            assert shared(vars(pack)["kernel"](*TENSORS, 5))
    finally:
        attention.remove(entries)


def test_a_call_is_not_shared_twice(entries: list[attention.Entry], parallel: HeadParallel) -> None:
    """An override in the options finds it shared already; a user's override is asked for the rank's heads, once."""
    seen: list[int] = []

    def theirs(func: Any, q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> torch.Tensor:
        seen.append(heads)
        return func(q, k, v, heads, **kwargs)

    for override in (parallel.attention, parallel.over(theirs), theirs):
        with attention.sharing(parallel):
            result = comfy_attention.optimized_attention(*TENSORS, 5, transformer_options={
                "optimized_attention_override": override})
        assert shared(result) and result[..., :12].all()

    assert (parallel.shared, seen) == (3, [3, 3])


def test_what_another_thread_computes_is_its_own(entries: list[attention.Entry], parallel: HeadParallel) -> None:
    """A VAE that decodes meanwhile, say: no other rank would answer."""
    results: list[torch.Tensor] = []
    with attention.sharing(parallel):
        other = threading.Thread(target=lambda: results.append(comfy_attention.optimized_attention(*TENSORS, 5)))
        other.start()
        other.join()

    assert not shared(results[0])
    assert parallel.shared == 0


def test_an_error_ends_the_sharing(entries: list[attention.Entry], parallel: HeadParallel) -> None:
    with pytest.raises(KeyError), attention.sharing(parallel):
        raise KeyError
    comfy_attention.optimized_attention(*TENSORS, 5)

    assert parallel.shared == 0


def test_installing_again_finds_nothing_and_removing_puts_all_back() -> None:
    """Bit for bit the functions that were there, but for what somebody else replaced since."""
    before = [vars(module)[name] for module, name in HELD]
    registered = dict(comfy_attention.REGISTERED_ATTENTION_FUNCTIONS)
    entries = attention.install()
    try:
        assert attention.install() == []
        assert vars(flux_math)["optimized_attention"] is not before[-1]
        vars(flux_math)["optimized_attention"] = foreign = lambda *args: None
    finally:
        attention.remove(entries)

    assert vars(flux_math)["optimized_attention"] is foreign
    vars(flux_math)["optimized_attention"] = before[-1]
    assert [vars(module)[name] for module, name in HELD] == before
    assert comfy_attention.REGISTERED_ATTENTION_FUNCTIONS == registered


@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_has_what_is_relied_on(version: str) -> None:
    """Its attention functions are made by `wrap_attn`, take these arguments, and hand over with its mark."""
    source = (TREES / version / "comfy" / "ldm" / "modules" / "attention.py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    made = [node for node in functions.values() if "wrap_attn" in [ast.unparse(made) for made in node.decorator_list]]

    assert {"attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch"} <= {node.name for node in made}
    for node in made:
        names = [argument.arg for argument in node.args.args]
        assert names[3:] == ["heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape"] and node.args.kwarg
    wrapper = ast.unparse(functions["wrap_attn"])
    assert f"'{attention._INSIDE}' not in kwargs" in wrapper
    assert "transformer_options['optimized_attention_override'](func, *args, **kwargs)" in wrapper


def test_a_release_without_the_wrapper_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarded by shape."""
    monkeypatch.delattr(comfy_attention, "wrap_attn")

    assert attention.install() == []
