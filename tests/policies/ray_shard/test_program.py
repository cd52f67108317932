"""What the host may ask of a worker, asked of the program in this process, with a real model of the host's."""
from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import pytest
import torch
from support import tiny

pytest.importorskip("ray")

from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.memo import Received, Sent
from residency.policies.ray_shard.parcels import pack, unpack
from residency.policies.ray_shard.worker import attention
from residency.policies.ray_shard.worker.group import PeerLost
from residency.policies.ray_shard.worker.models import Models
from residency.policies.ray_shard.worker.program import Program

CPU = torch.device("cpu")


class Worker:
    """The program, without becoming another process's twin; and who asks it."""

    def __init__(self) -> None:
        self.program = object.__new__(Program)
        vars(self.program).update(_management=comfy.model_management, _attention=attention, _device=CPU,
                                  _models=Models(CPU, CPU), _received=Received(), _group=None, _shares=(), _pace=None,
                                  _owned={}, _link=0.0)
        self.sent = Sent()
        self.patcher = tiny.patcher()

    def load(self) -> None:
        self.program.load("model", "diffusion_model", pickle.loads(pickle.dumps(pack(RemoteModel(self.patcher).as_built()))))
        self.patch(self.patcher, "plain")

    def patch(self, patcher: Any, digest: str) -> None:
        remote = RemoteModel(patcher)
        self.program.patch("model", digest, pickle.loads(pickle.dumps(pack(remote.patches(), known=remote.known()))))

    def predict(self, key: str = "model", digest: str = "plain", way: str = "rows", guests: bool = False,
                **options: Any) -> dict[str, Any]:
        arguments = tiny.arguments(**options)
        return self.program.predict(key, digest, self.sent.pack(arguments.pop("x"), arguments), way, guests)

    def here(self, patcher: Any = None, **options: Any) -> torch.Tensor:
        patcher = patcher or self.patcher
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([patcher])
            patcher.pre_run()
            answer: torch.Tensor = patcher.model._apply_model(**tiny.arguments(**options))
            patcher.detach()
        patcher.model.current_patcher = None
        comfy.model_management.current_loaded_models.clear()
        return answer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for several; and the host's attention functions are given back at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    entries = attention.install()
    yield
    attention.remove(entries)
    torch.set_num_threads(threads)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    with torch.inference_mode():
        made.load()
    yield made
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.current_loaded_models.clear()


def test_it_predicts_as_the_host(worker: Worker) -> None:
    """Bit for bit, and tells what it took."""
    answer = worker.predict(cond_or_uncond=[0])
    assert torch.equal(unpack(answer["answer"]), worker.here(cond_or_uncond=[0]))
    assert 0 < answer["compute_seconds"] <= answer["seconds"]
    assert answer["free_bytes"] > 0
    assert (answer["shared"], answer["stateful"]) == (0, False)


def test_lora_come_and_go(worker: Worker) -> None:
    """With the digest by which a step asks for them."""
    patched = tiny.with_lora(worker.patcher)
    worker.patch(patched, "lora")
    assert torch.equal(unpack(worker.predict(digest="lora")["answer"]), worker.here(patched))
    worker.patch(worker.patcher, "plain")
    assert torch.equal(unpack(worker.predict()["answer"]), worker.here())


@pytest.mark.parametrize("asked", [{"key": "other"}, {"digest": "lora"}])
def test_what_it_does_not_have(worker: Worker, asked: dict[str, str]) -> None:
    """It says so, and computes nothing else instead."""
    with pytest.raises(KeyError):
        worker.predict(**asked)  # type: ignore[arg-type]


def test_conditioning_that_it_does_not_know(worker: Worker) -> None:
    """A sender that was not told that the worker is a new one."""
    large = torch.randn(1, 400, 48)
    parcels = [worker.sent.pack(torch.zeros(1), {"c": large.clone()}) for _ in range(2)]
    with pytest.raises(KeyError):
        worker.program.predict("model", "plain", parcels[1], False, False)


class Scale:
    """A pack's patch."""

    def __init__(self) -> None:
        self.calls = 0
        self.tensor = torch.zeros(2000)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more: Any) -> Any:
        return q * 0.5, k, v


class Counting(Scale):
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more: Any) -> Any:
        self.calls += 1
        return q, k, v


class Remembering(Scale):
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more: Any) -> Any:
        self.tensor += 1
        return q, k, v


@pytest.mark.parametrize(("patch", "stateful"), [(Scale, False), (Counting, True), (Remembering, True)])
def test_a_state_of_a_packs_own_is_found(worker: Worker, patch: Callable[[], Scale], stateful: bool) -> None:
    """A number, or what is in a tensor; a pack without one gives the host's answer."""
    answer = worker.predict(guests=True, patches={"attn2_patch": [patch()]})
    assert answer["stateful"] is stateful
    assert torch.equal(unpack(answer["answer"]), worker.here(patches={"attn2_patch": [patch()]}))
    if patch is Scale:
        assert not torch.equal(unpack(answer["answer"]), worker.here())


def test_heads_without_the_others(worker: Worker) -> None:
    """They did not meet, or one has left: it is an error, not a wait."""
    with pytest.raises(PeerLost, match="not met"):
        worker.predict(way="heads")


def test_heads_of_a_group_of_one(worker: Worker) -> None:
    """The attention is the host's, whole; an override of a pack's is asked as ever."""
    worker.program.join(0, worker.program.address(local=True), [1.0], 10, test=True)
    assert torch.equal(unpack(worker.predict(way="heads")["answer"]), worker.here())
    asked: list[int] = []

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return function(*args, **kwargs)

    with torch.inference_mode():
        worker.program._together("model", "heads", "", worker.program._models["model"],
                                 tiny.arguments(optimized_attention_override=override), apart=True)
    assert asked
    assert worker.program._group is not None
    worker.program._leave()
    assert worker.program._group is None


def test_tokens_of_a_model_that_is_not_known(worker: Worker) -> None:
    """A U-Net's are not; the workers stay together for another way."""
    worker.program.join(0, worker.program.address(local=True), [1.0], 10, test=True)
    assert worker.predict(way="tokens")["unsuited"] == "how tokens flow through UNetModel is not known here"
    assert torch.equal(unpack(worker.predict(way="heads")["answer"]), worker.here())


def test_a_step_that_fails_leaves_the_group(worker: Worker) -> None:
    """The others wait for it no longer."""
    worker.program.join(0, worker.program.address(local=True), [1.0], 10, test=True)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("a pack's own")

    with pytest.raises(ValueError, match="a pack's own"):
        worker.predict(way="heads", guests=True, patches={"attn2_patch": [broken]})
    assert worker.program._group is None


def test_cancelling_ends_a_step(worker: Worker) -> None:
    """At the next layer; the step after that is computed."""
    def cancelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more: Any) -> Any:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return q, k, v

    worker.program.cancel(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        worker.predict(guests=True, patches={"attn2_patch": [cancelled]})
    worker.program.cancel(True)
    worker.program.cancel(False)
    assert torch.equal(unpack(worker.predict()["answer"]), worker.here())


def test_releasing_and_forgetting(worker: Worker) -> None:
    """One or all; a model that is gone is asked for in vain."""
    for key in ("model", None):
        worker.predict()
        assert len(comfy.model_management.current_loaded_models) == 1
        worker.program.release(key)
        assert comfy.model_management.current_loaded_models == []
    worker.program.forget("model")
    worker.program.forget("model")
    with pytest.raises(KeyError):
        worker.predict()


def test_what_it_says_of_itself(worker: Worker) -> None:
    """Numbers in bytes."""
    about = worker.program.about()
    assert about["device"] == "cpu"
    assert all(about[name] > 0 for name in ("pid", "free_bytes", "private_bytes", "shared_bytes"))
