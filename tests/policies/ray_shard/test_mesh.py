"""FSDP2 over a group that is not torch's global one: groups that come and go, and processes in which it cannot be."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("ray")

import torch
import torch.distributed
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.models import Model
from residency.policies.ray_shard.worker.ports import open_port
from residency.policies.ray_shard.worker.tokens import Unsuited
from residency.policies.ray_shard.worker.weights.fsdp2 import Fsdp2
from residency.policies.ray_shard.worker.weights.mesh import mesh_of
from residency.policies.ray_shard.worker.weights.units import weight_of
from support import deep
from torch.distributed.fsdp import FSDPModule


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model(deep.PATCHERS["flux"]().model, deep.CPU, deep.CPU)
    yield made
    with torch.inference_mode():
        made.release()


@pytest.fixture(autouse=True)
def no_global_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def alone() -> Group:
    return Group(0, 1, f"127.0.0.1:{open_port()}")


@torch.inference_mode()
def predicted(model: Model, owned: Fsdp2 | None = None) -> torch.Tensor:
    return model.predict(deep.arguments("flux"), owned)


def test_each_group_has_a_mesh_of_its_own(model: Model) -> None:
    """A worker that died is replaced, and all ranks meet anew."""
    expected = predicted(model)
    first, second = alone(), alone()
    assert torch.equal(predicted(model, Fsdp2(first, [1.0])), expected)
    assert mesh_of(first, deep.CPU) is mesh_of(first, deep.CPU)
    first.close()
    owned = Fsdp2(second, [1.0])
    assert torch.equal(predicted(model, owned), expected)
    assert torch.equal(predicted(model, owned), expected)
    assert torch.equal(predicted(model), expected)


def test_a_pack_that_uses_torchs_global_group_keeps_it(model: Model) -> None:
    """The weights are not shared out so, and the worker says why."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with pytest.raises(Unsuited, match="something else here uses torch's global process group, by gloo"):
        predicted(model, Fsdp2(alone(), [1.0]))
    assert torch.distributed.get_backend() == "gloo"


@pytest.mark.parametrize(("missing", "said"), [
    (lambda patch: patch.delattr(FSDPModule, "set_custom_all_gather"), "gathers in no other way than its own"),
    (lambda patch: patch.delattr(torch.distributed.fsdp, "FSDPModule"), "has no FSDP2"),
])
def test_an_older_torch_is_told_of(model: Model, monkeypatch: pytest.MonkeyPatch, missing: object, said: str) -> None:
    """By its version."""
    missing(monkeypatch)  # type: ignore[operator]
    with pytest.raises(Unsuited, match=f"{torch.__version__.partition('+')[0]}.* {said}"):
        predicted(model, Fsdp2(alone(), [1.0]))


def test_what_comes_off_the_device_is_placed_again(model: Model) -> None:
    """ComfyUI may take a model off that it needs room of."""
    expected, owned = predicted(model), Fsdp2(alone(), [1.0])
    predicted(model, owned)
    model._patcher.detach()
    assert owned.bytes_here() == weight_of(model._model)  # in the file's mapping; there are no parts beside it
    assert torch.equal(predicted(model, owned), expected)
