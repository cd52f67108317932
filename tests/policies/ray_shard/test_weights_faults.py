"""What goes wrong while weights are shared out, in placing them and in a prediction, leaves nothing behind."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy.model_management
import pytest

pytest.importorskip("ray")

import torch
import torch.distributed
from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker import weights
from residency.policies.ray_shard.worker.group import Group, PeerLost
from residency.policies.ray_shard.worker.models import Model
from residency.policies.ray_shard.worker.ports import open_port
from residency.policies.ray_shard.worker.weights import MODES, sheets
from residency.policies.ray_shard.worker.weights.owned import Owned
from support import deep


class Broken(Exception):
    """Any error."""


class CalledOff(BaseException):
    """As ComfyUI's Cancel is in 0.24.0 and later."""


def built() -> Model:
    """With a LoRA."""
    patcher = deep.PATCHERS["flux"]()
    remote = RemoteModel(deep.lora(patcher))
    model = Model(patcher.model, deep.CPU, deep.CPU)
    model.patch("LoRA", pack(remote.patches(), known=remote.known()))
    return model


@pytest.fixture
def model() -> Iterator[Model]:
    with torch.inference_mode():
        made = built()
        yield made
        made.release()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def group_of(world: int = 1) -> Callable[[int], Group]:
    """Makes each rank's."""
    address = f"127.0.0.1:{open_port()}"
    return lambda rank: Group(rank, world, address, timeout=20)


@pytest.fixture
def group() -> Iterator[Group]:
    made = group_of()(0)
    yield made
    made.close()


def predicted(model: Model, owned: Owned | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return model.predict(deep.arguments("flux"), owned)


def lying(model: Model) -> dict[str, int]:
    """Where every weight is."""
    return {name: value.data_ptr() for name, value in model.diffusion_model.named_parameters()}


def breaking(patch: pytest.MonkeyPatch, where: Any, name: str, at: int, error: BaseException) -> None:
    """A call that raises, at its so manieth time."""
    left, true = iter(range(at - 1)), getattr(where, name)

    def call(*args: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise error
        return true(*args, **options)

    patch.setattr(where, name, call)


@pytest.mark.parametrize(("mode", "where", "name", "at"), [
    ("blocks", sheets, "write", 4),
    ("fsdp2", sheets, "write", 4),
    ("fsdp2", torch.distributed.fsdp, "fully_shard", 4),
    ("fsdp2", comfy.model_patcher.ModelPatcher, "patch_weight_to_device", 4),
    ("pipeline", weights.owned, "soft_empty_cache", 1),
    *((mode, comfy.model_management, "load_models_gpu", 1) for mode in sorted(MODES)),
])
def test_a_placing_that_fails_half_way_is_undone(model: Model, group: Group, monkeypatch: pytest.MonkeyPatch, mode: str,
                                                 where: Any, name: str, at: int) -> None:
    """As from too little memory; and the next one is done."""
    was, expected, owned = lying(model), predicted(model), MODES[mode](group, [1.0])
    with monkeypatch.context() as patch, pytest.raises(Broken):
        breaking(patch, where, name, at, Broken())
        predicted(model, owned)
    assert lying(model) == was
    assert model._patcher.backup == {}
    assert comfy.model_management.current_loaded_models == []
    assert torch.equal(predicted(model, owned), expected)
    assert torch.equal(predicted(model), expected)


@pytest.mark.parametrize("error", [Broken(), CalledOff()], ids=["an error", "Cancel"])
def test_a_block_that_fails_does_not_keep_what_came(model: Model, group: Group, error: BaseException) -> None:
    """Neither its weights nor the next one's are on the device until the next prompt."""
    expected, owned = predicted(model), MODES["fsdp2"](group, [1.0])
    for name in ("double_blocks.1", "single_blocks.3"):
        block = model.diffusion_model.get_submodule(name)
        hook = block.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            predicted(model, owned)
        hook.remove()
        assert all(value is None for unit in owned.units for module in unit.module.modules()
                   for value in module._parameters.values())
        assert torch.equal(predicted(model, owned), expected)


def test_a_block_that_does_not_come_leaves_the_others_alone(model: Model, group: Group, monkeypatch: pytest.MonkeyPatch,
                                                            recwarn: pytest.WarningsRecorder) -> None:
    """This one is the first of another kind."""
    was, expected, owned = lying(model), predicted(model), MODES["fsdp2"](group, [1.0])
    predicted(model, owned)
    whole = owned._begin
    monkeypatch.setattr(owned, "_begin", lambda index: whole(index) if index != 2 else Lost())
    with pytest.raises(PeerLost, match="half way"):
        predicted(model, owned)
    assert [str(warning.message) for warning in recwarn] == []
    model.release()
    assert lying(model) == was
    assert torch.equal(predicted(model), expected)


class Lost:
    """A block that does not come."""

    def wait(self) -> torch.Tensor:
        raise PeerLost("half way")


@pytest.mark.parametrize("mode", sorted(MODES))
def test_what_ended_a_prediction_is_told(model: Model, group: Group, mode: str) -> None:
    """Though the group is closed by it: not that it is closed."""

    def fail(*_: Any) -> None:
        group.close()
        raise Broken("why")

    model.diffusion_model.final_layer.register_forward_hook(fail)
    with pytest.raises(Broken, match="why"):
        predicted(model, MODES[mode](group, [1.0]))


@pytest.mark.parametrize("mode", sorted(MODES))
def test_what_a_block_has_beside_its_parameters_goes_back(model: Model, group: Group, mode: str) -> None:
    """A view of what the block's weights lay in would keep all of it."""
    layer = model.diffusion_model.single_blocks[2].linear1
    layer.register_buffer("table", torch.ones(3))
    layer.note = torch.ones(5)
    was = layer.table, layer.note
    predicted(model, MODES[mode](group, [1.0]))
    model.release()
    assert all(now.untyped_storage().data_ptr() == then.untyped_storage().data_ptr()
               for now, then in zip((layer.table, layer.note), was, strict=True))


def test_a_group_that_is_closed_meanwhile_says_so(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancel closes it from another thread, between any two steps of an exchange."""
    monkeypatch.setattr(group, "_count", lambda _: group.close())
    whole = torch.zeros(4)
    group.begin_gather(whole, torch.ones(4))()
    assert whole.tolist() == [1.0] * 4
    with pytest.raises(PeerLost):
        group.begin_gather(whole, torch.ones(4))


@pytest.mark.parametrize("mode", ["blocks", "pipeline"])
def test_one_rank_alone_may_lose_its_share(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """ComfyUI takes it off for another model there; the others tell nothing anew. A rank is a thread here."""
    lock, load = threading.Lock(), comfy.model_management.load_models_gpu

    def one_at_a_time(*args: Any, **options: Any) -> None:
        with lock:
            load(*args, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", one_at_a_time)
    join, models = group_of(2), [built(), built()]
    expected = predicted(models[0])
    models[0].release()

    def rank(number: int) -> torch.Tensor:
        group = join(number)
        try:
            owned = MODES[mode](group, [1.0, 1.0])
            predicted(models[number], owned)
            if number == 0:
                with lock, torch.inference_mode():
                    models[0]._patcher.detach()
            return predicted(models[number], owned)
        finally:
            group.close()

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(rank, range(2)))
    assert torch.equal(answers[-1], expected)
    for each in models:
        each.release()
