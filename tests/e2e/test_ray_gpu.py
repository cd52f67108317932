"""Workers on CUDA devices: on a card each where there are two, by NCCL; else both on the one card, by way of RAM."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

import torch
from e2e.conftest import troubles
from e2e.test_ray import Pair, pair, sampled, settings
from support import workflows

pytestmark = [pytest.mark.gpu, pytest.mark.ray]

FLUX = sampled(workflows.text_to_latent("middle_fp32"), cfg=3.5)
LORA = workflows.text_to_latent("middle_fp32", loras=(("middle", 1.0),))
TOLERANCE = 1e-3  # kernels that a card chooses for half of the rows, and TF32
MODES = ["replicate", "blocks", "fsdp2", "pipeline"]


@pytest.fixture(scope="module", params=MODES)
def on_cards(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    devices = ["cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"]
    workers = ", ".join(f'{{ device = "{device}" }}' for device in devices)
    with pair(models, tmp_path_factory, settings(f"[{workers}]", verify="off", weights=request.param),
              device_args=["--disable-dynamic-vram"]) as servers:
        found = Pair(*servers)
        found.mode = request.param  # type: ignore[attr-defined]
        yield found
        assert troubles(servers[1]) == []
        assert servers[1].events("worker.lost") == []


@pytest.mark.parametrize("flow", [
    pytest.param(FLUX, id="two conditionings"),
    pytest.param(sampled(FLUX, cfg=1.0), id="one row"),
    pytest.param(LORA, id="LoRA"),
    pytest.param(workflows.text_to_latent("flux_quantised"), id="quantised"),
])
def test_latents_are_those_of_comfyui_alone(on_cards: Pair, flow: workflows.Workflow) -> None:
    """And none was predicted here."""
    assert on_cards.error(flow) <= TOLERANCE
    ways = set(on_cards.calls())
    assert "local" not in ways
    assert on_cards.mode == "replicate" or {way.rpartition(", ")[2] for way in ways} == {on_cards.mode}  # type: ignore[attr-defined]


def test_another_image_is_seen(on_cards: Pair) -> None:
    """The control."""
    assert on_cards.error(LORA, like=FLUX) > 10 * TOLERANCE
