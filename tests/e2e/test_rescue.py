"""Out of memory on the simulated accelerator, in every place of a prompt: it costs a repeated step, and the result is the same."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import troubles
from support import workflows
from support.server import Server

BIG_MB = 4000


@dataclass
class Rescued:
    """A server with the plugin whose device fails on purpose, and what the same prompts gave when it did not."""

    server: Server


@pytest.fixture(scope="module")
def server(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(COMFYUI, tmp_path_factory.mktemp("rescue"), models, device_mb=BIG_MB) as server:
        yield server


def test_probe(server: Server) -> None:
    flow = workflows.text_to_latent("flux_a", vae="taesd", seed=1)
    server.run(flow)
    expected = server.latents(), server.latents("out_vae")
    server._post("/free", {"unload_models": True, "free_memory": True})
    server.run(workflows.text_to_latent("flux_a", vae="taesd", seed=2))
    server._post("/free", {"unload_models": True, "free_memory": True})
    import time
    time.sleep(1)
    before = server.device()
    server.run(flow)
    after = server.device()
    n = after["allocations"] - before["allocations"]
    print("allocations", n, before, after)
    lost = []
    for k in range(1, n + 1, 37):
        server._post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.3)
        server.fail(k)
        try:
            server.run(flow)
        except Exception as error:
            lost.append((k, str(error)))
            continue
        same = torch.equal(server.latents(), expected[0]), torch.equal(server.latents("out_vae"), expected[1])
        if same != (True, True):
            lost.append((k, same))
    print(lost)
    print([(e["what"], e["model"], e["attempt"], e["freed_bytes"], round(e["seconds"], 3)) for e in server.events("rescue.repeated")])
    print(troubles(server))
    print(server.log()[-3000:])
    assert 0
