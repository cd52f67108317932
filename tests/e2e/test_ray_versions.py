"""Two workers under every ComfyUI release that we name, on the CPU."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TREES, VERSIONS
from e2e.conftest import troubles
from e2e.test_ray import TOLERANCE, Pair, pair, patched, sampled, settings
from e2e.test_ray_weights import modes
from support import workflows
from support.server import PATCHING_NODES
from support.workflows import Workflow

pytestmark = pytest.mark.ray

FLUX, LORA = workflows.text_to_latent("middle_fp32"), workflows.text_to_latent("middle_fp32", loras=(("middle", 1.0),))
TWO, EACH = settings(2, verify="off"), settings('"auto"', verify="off").replace("'", "")


@pytest.fixture(scope="module", params=VERSIONS[:-1])  # the other tests run on the last
def release(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(models, tmp_path_factory, TWO, comfyui=TREES / request.param,
              packs=[PATCHING_NODES]) as servers:
        assert servers[1].events("plugin.started")[0]["host"] == request.param
        yield Pair(*servers)
        assert troubles(servers[1]) == []
        assert servers[1].events("worker.lost") == []


@pytest.mark.parametrize(("flow", "way"), [
    pytest.param(sampled(FLUX, cfg=3.5), "rows", id="two conditionings"),
    pytest.param(sampled(FLUX, cfg=1.0), "tokens", id="one row"),
    pytest.param(LORA, "rows", id="LoRA"),
    pytest.param(patched(FLUX, "ScaleAttention", 0.5), "heads", id="a pack's attention"),
    pytest.param(workflows.hooked_lora("middle_fp32", "middle"), "tokens", id="LoRA scheduled by hooks"),
    pytest.param(workflows.with_controlnet("flux_a_fp32", "flux"), "rows", id="ControlNet"),
    pytest.param(workflows.video("wan", "wan"), "rows", id="Wan video"),
])
def test_latents_are_those_of_the_release_alone(release: Pair, flow: Workflow, way: str) -> None:
    """And all of it was predicted by workers."""
    assert release.error(flow) <= TOLERANCE
    assert set(release.calls()) == {way}


def test_gguf_latents_with_a_lora_are_those_of_the_dequantised_weights(release: Pair) -> None:
    """Of the ordinary kind and scheduled by hooks, and without one again."""
    gguf, twin = "flux_mixed.gguf", "flux_mixed_fp32"
    plain, one = (), (("flux_mixed", 1.0),)
    for loras in (one, plain):
        flow = workflows.text_to_latent(gguf, loras=loras)
        assert release.error(flow, like=workflows.text_to_latent(twin, loras=loras)) <= TOLERANCE
        assert "local" not in release.calls()
    hooked = [workflows.hooked_lora(name, "flux_mixed") for name in (gguf, twin)]
    assert release.error(hooked[0], like=hooked[1]) <= TOLERANCE
    assert "local" not in release.calls()


def test_another_image_is_seen(release: Pair) -> None:
    """The control."""
    assert release.error(LORA, like=FLUX) > 10 * TOLERANCE


def test_tiles_of_a_vae_are_those_of_the_release_alone(release: Pair) -> None:
    """Decoded and encoded by workers, bit for bit."""
    flow = workflows.tiled_vae("taesd_fp32")
    for prefix in ("out", "out_again"):
        assert release.error(flow, prefix) == 0
    assert set(release.calls()) == {"tiles"}


@contextmanager
def weights(pair: Pair, before: str, mode: str) -> Iterator[None]:
    """Shared out so from the next prompt on, by other workers."""
    pair.plugin.settings(f'{before}\nweights = "{mode}"')
    try:
        yield
    finally:
        pair.plugin.settings(before)


@pytest.mark.parametrize(("mode", "seed"), [("blocks", 71), ("pipeline", 72), ("fsdp2", 73)])  # what ComfyUI made it has
def test_with_weights_shared_out_latents_are_those_of_the_release_alone(release: Pair, mode: str, seed: int) -> None:
    """No worker has all of them, and what a LoRA changes goes with them."""
    with weights(release, TWO, mode):
        assert release.error(sampled(LORA, seed=seed)) <= TOLERANCE
        assert modes(release) == {mode}


@pytest.fixture(scope="module", params=VERSIONS[1:])  # the first has no switch for dynamic VRAM but an NVIDIA card
def paged(request: pytest.FixtureRequest, models: Path, simulated_npu: None,
          tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A worker on each of two simulated accelerators, where ComfyUI pages weights by a simulated library."""
    with pair(models, tmp_path_factory, EACH, comfyui=TREES / request.param, device_mb=1500, dynamic_vram=True,
              env={"SIMNPU_DEVICES": "2"}) as servers:
        yield Pair(*servers)
        assert troubles(servers[1]) == []
        assert servers[1].events("worker.lost") == []


PAGED = workflows.text_to_latent("middle_a")


@pytest.mark.parametrize(("flow", "way", "twin"), [
    # The first: the classic copy of the model that ComfyUI makes for it is no mapping, and is written to at once.
    pytest.param(workflows.hooked_lora("middle_a", "middle"), "tokens", None, id="LoRA scheduled by hooks"),
    pytest.param(PAGED, "rows", None, id="two conditionings"),
    pytest.param(sampled(PAGED, cfg=1.0), "tokens", None, id="one row"),
    pytest.param(FLUX, "rows", None, id="a file that is wider than the model"),
    pytest.param(workflows.text_to_latent("middle_q8_a.gguf"), "rows", workflows.text_to_latent("middle_q8_a_bf16"), id="GGUF"),
])
def test_with_dynamic_vram_latents_are_those_of_comfyui_alone(paged: Pair, flow: Workflow, way: str,
                                                              twin: Workflow | None) -> None:
    """Its own pages are not used for what workers compute; they place the weights by the classic patcher."""
    assert paged.error(flow, like=twin) <= TOLERANCE
    assert set(paged.calls()) == {way}


def test_with_dynamic_vram_a_lora_is_rounded_as_without(paged: Pair) -> None:
    """ComfyUI's own latents differ by as much with dynamic VRAM and without, for weights in bfloat16."""
    lora, twin = (workflows.text_to_latent(name, loras=(("middle", 1.0),)) for name in ("middle_a", "middle_q8_a_bf16"))
    assert paged.error(lora) <= 0.05
    assert set(paged.calls()) == {"rows"}
    assert paged.error(lora, like=PAGED) > 0.2
    assert paged.error(workflows.text_to_latent("middle_q8_a.gguf", loras=(("middle", 1.0),)), like=twin) <= 0.05
    assert set(paged.calls()) == {"rows"}


def test_with_dynamic_vram_tiles_are_those_of_comfyui_alone(paged: Pair) -> None:
    """Bit for bit."""
    flow = workflows.tiled_vae("taesd_fp32")
    for prefix in ("out", "out_again"):
        assert paged.error(flow, prefix) == 0
    assert set(paged.calls()) == {"tiles"}


@pytest.mark.parametrize(("mode", "seed"), [("blocks", 71), ("fsdp2", 72)])
def test_with_dynamic_vram_weights_can_be_shared_out(paged: Pair, mode: str, seed: int) -> None:
    """Each worker's are on its device."""
    with weights(paged, EACH, mode):
        assert paged.error(sampled(PAGED, seed=seed)) <= TOLERANCE
        assert modes(paged) == {mode}
