"""Feed-forwards in pieces give ComfyUI's latents, in its own process and in workers."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import Pair, empty
from support import workflows
from support.server import Server

PIECES = "[hybrid_split]\nffn_chunks = 4\n"
WORKERS = """
policies = ["ray_shard", "hybrid_split", "preload_cache", "zero_copy"]
[ray_shard]
workers = 2
verify = "off"
ffn_chunks = 4
"""


@pytest.fixture
def server(npu_pair: Pair) -> Iterator[Server]:
    """Whoever comes next finds it as it was."""
    npu_pair.plugin.settings("")
    yield npu_pair.plugin
    npu_pair.plugin.settings("")
    empty(npu_pair.plugin)


@pytest.mark.parametrize(("flow", "feed_forwards"), [
    pytest.param(workflows.text_to_latent("sd3", clip_type="sd3", size=256), 2, id="SD3"),
    pytest.param(workflows.text_to_latent("flux_a", size=256, loras=(("flux_one", 1.0),)), 2, id="Flux with a LoRA"),
])
def test_latents_are_equal(server: Server, npu_pair: Pair, flow: workflows.Workflow, feed_forwards: int) -> None:
    """Bit for bit, and they were run in pieces: layers of more pieces make more allocations."""
    npu_pair.same(flow)
    flow["sample"]["inputs"]["seed"] = 2
    before = server.allocations(flow)
    flow["sample"]["inputs"]["seed"] = 3
    server.settings(PIECES)
    npu_pair.alone.run(flow)
    after = server.allocations(flow)

    assert torch.equal(server.latents(), npu_pair.alone.latents())
    assert after - before >= 2 * feed_forwards * 3 * 3  # three more pieces, of three layers, in two steps

    flow["sample"]["inputs"]["seed"] = 4
    server.run(flow)
    assert not torch.equal(server.latents(), npu_pair.alone.latents())  # the comparison can fail


@pytest.mark.ray
def test_workers_do_too(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """To 1e-5 of the largest value, as workers do without it; and where tokens are too few they say so, once."""
    flow = workflows.from_checkpoint("sd3_fp32", size=512)
    with Server(COMFYUI, tmp_path_factory.mktemp("alone"), models, plugin=False) as alone:
        alone.run(flow)
        expected = alone.latents()
    with Server(COMFYUI, tmp_path_factory.mktemp("plugin"), models, settings=WORKERS) as server:
        server.run(flow)
        assert ((server.latents() - expected).abs().max() / expected.abs().max()).item() <= 1e-5
        assert server.events("policy.ineffective") == []
        assert "local" not in server.events("shard.finished")[-1]["calls"]

        for seed in (2, 3):
            server.run(workflows.from_checkpoint("sd3_fp32", size=64, seed=seed))
        assert [event["reason"] for event in server.events("policy.ineffective")] == [
            "ffn_chunks: SD3: its feed-forwards got fewer than 128 tokens"]
        flow["sample"]["inputs"]["seed"] = 4
        server.run(flow)
        assert ((server.latents() - expected).abs().max() / expected.abs().max()).item() > 1e-2
