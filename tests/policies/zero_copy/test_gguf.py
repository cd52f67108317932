"""GGUF files as zero_copy answers for them."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from residency.hooks.gguf_weights import is_gguf
from residency.policies.policy import Refusal
from residency.policies.requests import BuildModel, OpenModel, PatchWeight, ReadWeights, Request, WriteInPlace
from residency.policies.zero_copy.gguf import locate
from residency.telemetry.sinks import Ring
from support.gguf_files import save

Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A model with a quantised weight and a bias in float32."""
    return save(tmp_path / "model.gguf", "flux", {
        "weight": (gguf.quants.quantize(numpy.ones((4, 64), numpy.float32), Q8_0), Q8_0),
        "bias": numpy.arange(4, dtype=numpy.float32)})


@pytest.fixture
def started(house: Any) -> Any:
    house.policy.start()
    return house


def host(request: Request) -> str:
    return "host"


def test_a_file_is_a_state_dict_over_its_mapping(started: Any, path: str, ring: Ring) -> None:
    """Blocks are the host's quantised tensors, numbers are numbers, and telemetry hears of both."""
    state_dict, metadata = started.ask(ReadWeights(path, with_metadata=True, on_cpu=True), host)

    assert is_gguf(state_dict["weight"])
    assert torch.equal(torch.ones(4, 64), state_dict["weight"].dequantize().round(decimals=2))
    assert torch.equal(torch.arange(4, dtype=torch.float32), state_dict["bias"])
    assert started.mapped(state_dict["weight"]._qdata)
    assert started.mapped(state_dict["bias"])
    assert "flux" == metadata["general.architecture"]
    (event,) = ring.named("gguf.read")
    assert 0 < event.fields["header_seconds"] < 5
    assert {"file": "model.gguf", "architecture": "flux", "types_bytes": {"Q8_0": 4 * 68, "float32": 16},
            "header_seconds": event.fields["header_seconds"]} == event.fields


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", b"GGUF" + b"\xff" * 60])
def test_a_damaged_file_is_refused_by_name(started: Any, tmp_path: Path, content: bytes, ring: Ring) -> None:
    """The host cannot read it either, and would not say why."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)

    with pytest.raises(Refusal, match=r"broken\.gguf"):
        started.ask(ReadWeights(str(broken), with_metadata=False, on_cpu=True), host)

    assert str(broken) == ring.named("file.unreadable")[0].fields["file"]


def test_a_file_that_is_not_there_is_the_hosts(started: Any, tmp_path: Path) -> None:
    """It says so itself."""
    assert "host" == started.ask(ReadWeights(str(tmp_path / "gone.gguf"), with_metadata=False, on_cpu=True), host)


@pytest.mark.parametrize("why", ["package", "host"])
def test_where_files_cannot_be_opened_they_are_the_hosts(house: Any, path: str, ring: Ring, monkeypatch: pytest.MonkeyPatch,
                                                         why: str) -> None:
    """The policy says what is missing, and does the rest of its work."""
    if why == "package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        house.tools.host.formats.missing = "no quantised tensors"

    house.policy.start()

    (event,) = ring.named("policy.declined")
    reasons = {"package": "the package gguf is missing: pip install gguf", "host": "no quantised tensors"}
    assert reasons[why] == event.fields["reason"]
    assert house.tools.host.formats.offered is None
    assert house.policy.decide(ReadWeights(path, with_metadata=False, on_cpu=True)) is None
    assert house.policy.decide(OpenModel((path,))) is None


def test_the_offer_ends_with_the_policy(started: Any) -> None:
    """Files are listed while somebody can open them."""
    assert started.tools.host.formats.offered is True
    started.policy.close()
    assert started.tools.host.formats.offered is False


def test_a_host_that_reads_files_itself_learns_where_each_tensor_is(house: Any, path: str) -> None:
    """And one that does not is told nothing."""
    reading = house.tools.host.reading
    for reading.maps in (False, True):
        house.policy.start()
        house.ask(ReadWeights(path, with_metadata=False, on_cpu=True), host)
        assert bool(reading.located) == reading.maps

    assert len(reading.located) == 2
    assert all(tensor.contiguous().view(torch.uint8).numpy().tobytes() == data for tensor, data in reading.located)


def test_a_file_that_was_replaced_meanwhile_is_not_told_of(house: Any, path: str) -> None:
    """Its bytes would be others than those that are mapped."""
    house.tools.host.reading.maps = True
    lease = house.bank.lease(path)
    Path(path).rename(f"{path}.old")
    Path(path).write_bytes(b"another")

    locate(lease, house.tools.host.reading)

    assert house.tools.host.reading.located == []


@pytest.mark.parametrize("blocks", [True, False])
def test_a_model_of_blocks_is_built_of_layers_that_compute_with_them(started: Any, blocks: bool) -> None:
    """Any other is built as ever."""
    asked: list[Any] = []

    started.ask(BuildModel("diffusion model", gguf=blocks), asked.append)

    assert blocks == asked[0].bind_gguf


def test_a_patch_becomes_one_at_use(started: Any) -> None:
    """The host does not make a dense weight of it."""
    done: list[str] = []

    started.ask(PatchWeight(lambda: done.append("at use")), lambda request: done.append("host"))

    assert ["at use"] == done


def test_a_write_goes_beside_blocks(started: Any) -> None:
    """They cannot take it."""
    done: list[str] = []
    module = torch.nn.Linear(2, 2)

    started.ask(WriteInPlace(module, "weight", lambda: done.append("beside")), lambda request: done.append("host"))

    assert ["beside"] == done


@pytest.mark.parametrize("kind", [torch.nn.Linear, lambda *size: torch.nn.Linear(*size, dtype=torch.bfloat16)])
def test_a_layer_that_cannot_compute_with_blocks_gets_them_dense(started: Any, path: str, kind: Callable[..., Any]) -> None:
    """In its own dtype."""
    layer = kind(64, 4)
    state_dict = started.ask(ReadWeights(path, with_metadata=False, on_cpu=True), host)

    started.build(layer, state_dict)

    assert torch.equal(state_dict["weight"].dequantize().to(layer.weight.dtype), layer.weight)
    assert not started.mapped(layer.weight)
