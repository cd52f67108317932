"""Two workers under every ComfyUI release that we name, on the CPU."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TREES, VERSIONS
from e2e.conftest import troubles
from e2e.test_ray import TOLERANCE, Pair, pair, patched, sampled, settings
from support import workflows
from support.server import PATCHING_NODES
from support.workflows import Workflow

pytestmark = pytest.mark.ray

FLUX, LORA = workflows.text_to_latent("middle_fp32"), workflows.text_to_latent("middle_fp32", loras=(("middle", 1.0),))


@pytest.fixture(scope="module", params=VERSIONS[:-1])  # the other tests run on the last
def release(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(models, tmp_path_factory, settings(2, verify="off"), comfyui=TREES / request.param,
              packs=[PATCHING_NODES]) as servers:
        assert servers[1].events("plugin.started")[0]["host"] == request.param
        yield Pair(*servers)
        assert troubles(servers[1]) == []
        assert servers[1].events("worker.lost") == []


@pytest.mark.parametrize(("flow", "way"), [
    pytest.param(sampled(FLUX, cfg=3.5), "rows", id="two conditionings"),
    pytest.param(sampled(FLUX, cfg=1.0), "heads", id="one row"),
    pytest.param(LORA, "rows", id="LoRA"),
    pytest.param(patched(FLUX, "ScaleAttention", 0.5), "heads", id="a pack's attention"),
    pytest.param(workflows.hooked_lora("middle_fp32", "middle"), "heads", id="LoRA scheduled by hooks"),
    pytest.param(workflows.with_controlnet("flux_a_fp32", "flux"), "rows", id="ControlNet"),
    pytest.param(workflows.video("wan", "wan"), "rows", id="Wan video"),
])
def test_latents_are_those_of_the_release_alone(release: Pair, flow: Workflow, way: str) -> None:
    """And all of it was predicted by workers."""
    assert release.error(flow) <= TOLERANCE
    assert set(release.calls()) == {way}


def test_another_image_is_seen(release: Pair) -> None:
    """The control."""
    assert release.error(LORA, like=FLUX) > 10 * TOLERANCE


def test_tiles_of_a_vae_are_those_of_the_release_alone(release: Pair) -> None:
    """Decoded and encoded by workers, bit for bit."""
    flow = workflows.tiled_vae("taesd_fp32")
    for prefix in ("out", "out_again"):
        assert release.error(flow, prefix) == 0
    assert set(release.calls()) == {"tiles"}
