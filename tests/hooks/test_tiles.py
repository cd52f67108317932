"""Tiles foretold, in every supported version, and which of the host's calls become a request."""
from __future__ import annotations

import ast
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch
from residency.hooks import HookRegistry, tiles
from residency.hooks.remote import vae_remote_of
from residency.policies.computing import ScaleTiles
from residency.policies.models import ITSELF
from residency.telemetry.sinks import Ring
from support.loading import TREES, VERSIONS
from support.vaes import taesd_vae

Scale = Callable[..., torch.Tensor]


@pytest.fixture(params=VERSIONS)
def scale(request: pytest.FixtureRequest) -> Scale:
    """`tiled_scale_multidim` of a version, taken out of its sources."""
    file = TREES / request.param / "comfy" / "utils.py"
    if not file.exists():
        pytest.skip(f"no ComfyUI {request.param} in {TREES}; COMFYUI_TREES may name another folder")
    found = next(node for node in ast.parse(file.read_text(encoding="utf-8")).body
                 if isinstance(node, ast.FunctionDef) and node.name == "tiled_scale_multidim")
    names: dict[str, Any] = {"torch": torch, "itertools": itertools}
    exec(compile(ast.Module([found], []), str(file), "exec"), names)
    return names["tiled_scale_multidim"]  # type: ignore[no-any-return]


def where(tile: torch.Tensor) -> tuple[Any, ...]:
    return tile.data_ptr(), tuple(tile.shape), tile.stride(), tile.dtype


@pytest.mark.parametrize("seed", range(40))
def test_foretells_what_the_host_asks_for(scale: Scale, seed: int) -> None:
    """The same memory in the same order: one to three dimensions, batches, edges, one overlap or several."""
    draw = random.Random(seed)
    dimensions = draw.randint(1, 3)
    tile = tuple(draw.randint(3, 9) for _ in range(dimensions))
    overlap: Any = draw.randint(0, 2) if draw.random() < 0.5 else [draw.randint(0, 2) for _ in range(dimensions)]
    samples = torch.randn(draw.randint(1, 2), 2, *(draw.randint(1, 20) for _ in range(dimensions)))
    if draw.random() < 0.5:
        samples = samples.movedim(-1, 1).contiguous().movedim(1, -1)  # as pixels lie
    asked = []

    def function(part: torch.Tensor) -> torch.Tensor:
        asked.append(where(part))
        return part

    scale(samples, function, tile=tile, overlap=overlap, upscale_amount=1, out_channels=2)

    assert [where(part) for part in tiles.foretell(samples, tile, overlap)] == asked
    assert asked


@pytest.mark.parametrize("overlap", [4, 5])
def test_foretells_nothing_where_tiles_do_not_advance(overlap: int) -> None:
    """What the host makes of that is its own affair."""
    assert tiles.foretell(torch.zeros(1, 1, 9), (4,), overlap) == []


class Asked:
    """The hook on the host's function; `request` is what the last call became, and `function` what is asked instead."""

    def __init__(self) -> None:
        self.request: ScaleTiles | None = None
        self.function: Any = None
        self.registry = HookRegistry(tiles.HOOKS, self._answer)
        self.registry.sync({ScaleTiles})

    def _answer(self, request: Any, host: Callable[[Any], Any]) -> Any:
        self.request = request
        return host(replace(request, function=self.function) if self.function else request)


@pytest.fixture
def asked(ring: Ring) -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.registry.remove_all()
    assert not ring.named("hook.failed")
    assert "tiled_scale_multidim" in vars(comfy.utils)


@pytest.fixture(scope="module")
def vae() -> Any:
    return taesd_vae()


LATENTS = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_a_vaes_tiles_become_a_request(asked: Asked, vae: Any, way: str) -> None:
    """With the VAE, its tiles, and the host's estimate of what each takes; another function is asked in the host's place."""
    pixels = torch.rand(1, 40, 40, 3)
    if way == "decode":
        asked.function = lambda tile: torch.full((1, 3, tile.shape[2] * 8, tile.shape[3] * 8), 0.25)
        with torch.inference_mode():
            result = vae.decode_tiled_(LATENTS, tile_x=8, tile_y=8, overlap=2) * 2 - 1
    else:
        asked.function = lambda tile: torch.full((1, 16, tile.shape[2] // 8, tile.shape[3] // 8), 0.25)
        with torch.inference_mode():
            result = vae.encode_tiled_(pixels.movedim(-1, 1), tile_x=32, tile_y=32, overlap=8)
    request = asked.request

    assert request is not None
    assert request.remote.module is vae.first_stage_model
    assert request.weights.module is vae.first_stage_model
    assert len(request.tiles()) > 1
    estimate = vae.memory_used_decode if way == "decode" else vae.memory_used_encode
    assert request.room((1, 16, 8, 8)) == estimate((1, 16, 8, 8), vae.vae_dtype)
    assert (result.min(), result.max()) == pytest.approx((0.25, 0.25))


def test_an_estimate_that_the_host_cannot_make_is_nothing(asked: Asked, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimates of some audio VAEs want another shape than their tiles have."""
    monkeypatch.setattr(vae, "memory_used_decode", lambda shape, dtype: shape[7])
    with torch.inference_mode():
        vae.decode_tiled_(LATENTS, tile_x=8, tile_y=8, overlap=2)

    assert asked.request is not None
    assert asked.request.room((1, 16, 8)) == 0


@pytest.mark.parametrize("function", [
    pytest.param(lambda tile: tile, id="an upscaler"), pytest.param(torch.nn.Identity(), id="an object"),
    pytest.param((lambda one: lambda tile: tile + 0 * one)(1), id="a closure over something else"),
])
def test_whatever_is_no_vaes_is_left_alone(asked: Asked, function: Any) -> None:
    """The host answers as it does without us."""
    samples = torch.randn(1, 3, 20, 20)
    with torch.inference_mode():
        alone = inspect.unwrap(comfy.utils.tiled_scale_multidim)(samples, function, (8, 8), 2, upscale_amount=1)

    assert torch.equal(comfy.utils.tiled_scale(samples, function, 8, 8, 2, upscale_amount=1), alone)
    assert asked.request is None


def test_a_vae_without_weights_or_of_another_class_has_no_remote(vae: Any) -> None:
    """A pack's class may do anything when it is asked for a tile."""

    class Other(comfy.sd.VAE):  # type: ignore[misc]
        pass

    other = object.__new__(Other)
    vars(other).update(vars(vae))
    empty = object.__new__(comfy.sd.VAE)
    empty.first_stage_model = None

    assert vae_remote_of(vae) is not None
    assert [vae_remote_of(one) for one in (other, empty, None)] == [None] * 3


def test_a_vae_travels_without_its_patcher(vae: Any) -> None:
    """A copy of the module that shares the layers, and its attributes, which are looked at each time."""
    remote = vae_remote_of(vae)
    assert remote is not None
    module = remote.as_built()

    assert module is not vae.first_stage_model
    assert module._modules is vae.first_stage_model._modules
    assert set(vars(vae)) - set(remote.patches()["attributes"]) == {"patcher"}
    assert {remote.known()[id(vae)], remote.known()[id(vae.first_stage_model)]} == {ITSELF, ""}
    assert remote.token() != remote.token()
    assert remote.kind == "vae"
