"""A worker's models, for the test modules that have a host which has built one."""
from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def models(host: Any) -> Any:
    """With one model, as `host.built` has it."""
    import torch
    from residency.policies.ray_shard.worker.models import Models

    cpu = torch.device("cpu")
    made = Models(cpu, cpu)
    made.add("model", "diffusion_model", host.built)
    return made


@pytest.fixture
def model(models: Any) -> Any:
    return models["model"]
