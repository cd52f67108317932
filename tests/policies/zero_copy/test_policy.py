"""Reading through the bank, refusing what was overwritten, and where zero_copy steps aside."""
from __future__ import annotations

import gc
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from residency.policies.chain import PolicyChain
from residency.policies.files import pages
from residency.policies.memory import Residency
from residency.policies.policy import Refusal, Unfit
from residency.policies.requests import MoveWeights, PlaceModel, ReadWeights, RunPrompt
from residency.policies.zero_copy import Settings, ZeroCopy
from residency.telemetry.sinks import Ring
from torch import nn

Save = Callable[..., str]
CPU = torch.device("cpu")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")


def overwrite(path: str) -> None:
    """In place: a mapping of the file shows the new bytes."""
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(0, 10**18))


def never(request: Any) -> Any:
    raise AssertionError("the host was asked")


class TestReading:
    """What the host's reader returns, from the mapping."""

    def test_a_safetensors_file_is_served_from_the_bank(self, house: Any, save: Save, ring: Ring) -> None:
        """The host does not read it at all."""
        path = save(weight=torch.arange(8.0))
        state_dict = house.ask(ReadWeights(path, False, on_cpu=True), never)
        assert torch.equal(torch.arange(8.0), state_dict["weight"])
        assert house.mapped(state_dict["weight"])
        event, = ring.named("weights.read")
        assert event.fields["source"] == "file"
        assert event.fields["bytes"] == os.path.getsize(path)

    @linux
    def test_a_second_read_comes_from_the_bank(self, house: Any, save: Save, ring: Ring) -> None:
        """Within the budget, an idle mapping waits for the next load."""
        path = save()
        house.ask(ReadWeights(path, False, True), never)
        gc.collect()
        house.policy.prompt_ended()
        house.ask(ReadWeights(path, False, True), never)
        assert [event.fields["source"] for event in ring.named("weights.read")] == ["file", "bank"]

    @pytest.mark.parametrize("metadata", [None, {"modelspec.title": "x"}])
    def test_metadata_comes_along_when_it_is_asked_for(self, metadata: Any, house: Any, save: Save) -> None:
        """A pair, and None where the file has none, as from the host."""
        path = save(metadata=metadata)
        state_dict, found = house.ask(ReadWeights(path, True, True), never)
        assert set(state_dict) == {"weight"}
        assert found == metadata

    def test_endings_are_read_in_any_case(self, house: Any, save: Save) -> None:
        """`.sft` and `.SAFETENSORS` are the same format."""
        for name in ("a.sft", "b.SAFETENSORS"):
            assert house.mapped(house.ask(ReadWeights(save(name), False, True), never)["weight"])

    def test_a_read_to_a_device_is_the_hosts(self, house: Any, save: Save) -> None:
        """Straight to the device there is no copy in RAM to save."""
        assert house.policy.decide(ReadWeights(save(), False, on_cpu=False)) is None

    def test_a_file_that_windows_cannot_map_is_the_hosts(self, house: Any, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its view would be charged in full."""
        monkeypatch.setattr(pages, "may_map", lambda path: False)
        assert house.policy.decide(ReadWeights(save(), False, True)) is None

    @pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\0\0\0\0\0\0\0{}{}{}{}"])
    def test_a_bad_file_is_left_to_the_host(self, content: bytes, house: Any, tmp_path: Path, ring: Ring) -> None:
        """The error is the host's own, and no policy failed."""
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        error = ValueError("HeaderTooSmall")

        def host(request: Any) -> Any:
            raise error

        with pytest.raises(ValueError) as raised:
            house.ask(ReadWeights(str(path), False, True), host)
        assert raised.value is error
        assert ring.named("policy.failed") == []
        assert house.bank.live() == []

    def test_a_file_that_is_not_there_is_left_to_the_host(self, house: Any, tmp_path: Path, ring: Ring) -> None:
        """Whatever the host says of it."""
        for name in ("gone.safetensors", "gone.pt"):
            assert house.ask(ReadWeights(str(tmp_path / name), False, True)) == "host"
        assert ring.named("policy.failed") == []

    @pytest.mark.parametrize("with_metadata", [False, True])
    def test_a_zip_file_of_torch_is_mapped_by_the_host_and_adopted(self, with_metadata: bool, house: Any,
                                                                   tmp_path: Path) -> None:
        """The host is told to map it, and the bank knows the tensors."""
        path = str(tmp_path / "model.pt")
        torch.save({"weight": torch.arange(64.0), "step": 7}, path)

        def host(request: Any) -> Any:
            assert house.tools.host.reading.mapped == 1
            state_dict = torch.load(path, mmap=True, weights_only=True)
            return (state_dict, None) if with_metadata else state_dict

        answer = house.ask(ReadWeights(path, with_metadata, True), host)
        state_dict = answer[0] if with_metadata else answer
        assert house.mapped(state_dict["weight"])
        assert state_dict["step"] == 7
        net = nn.Linear(64, 1, bias=False)
        house.build(net, {"weight": state_dict["weight"].view(1, 64)})
        assert house.mapped(net.weight)

    @pytest.mark.parametrize("content", [{"step": 7}, {}, [torch.ones(2)], "text"], ids=["no tensors", "empty", "list", "text"])
    def test_a_zip_file_without_a_state_dict_is_what_the_host_says(self, content: Any, house: Any, tmp_path: Path,
                                                                   ring: Ring) -> None:
        """Textual inversions are sometimes lists."""
        path = str(tmp_path / "model.pt")
        torch.save(content, path)
        assert house.ask(ReadWeights(path, False, True), lambda request: content) is content
        assert ring.named("policy.failed") == []
        assert house.bank.live() == []

    def test_tensors_that_the_host_copied_after_all_are_not_adopted(self, house: Any, tmp_path: Path) -> None:
        """An older host may not know how to map them."""
        path = str(tmp_path / "model.pt")
        torch.save({"weight": torch.arange(64.0)}, path)
        state_dict = house.ask(ReadWeights(path, False, True), lambda request: torch.load(path, weights_only=True))
        assert not sys.platform.startswith("linux") or not house.mapped(state_dict["weight"])

    def test_a_zip_file_that_is_gone_after_the_read_is_still_the_hosts_answer(self, house: Any, tmp_path: Path) -> None:
        """What was read is good."""
        path = str(tmp_path / "model.pt")
        torch.save({"weight": torch.arange(64.0)}, path)

        def host(request: Any) -> Any:
            state_dict = torch.load(path, weights_only=True)
            os.unlink(path)
            return state_dict

        assert torch.equal(torch.arange(64.0), house.ask(ReadWeights(path, False, True), host)["weight"])

    def test_a_file_of_an_old_torch_is_the_hosts(self, house: Any, tmp_path: Path) -> None:
        """It cannot be mapped."""
        path = str(tmp_path / "model.pt")
        torch.save({"weight": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
        assert house.policy.decide(ReadWeights(path, False, True)) is None
        pickled = tmp_path / "model.ckpt"
        pickled.write_bytes(pickle.dumps({}))
        assert house.policy.decide(ReadWeights(str(pickled), False, True)) is None


class TestReadingAhead:
    """A cold file is read in large pieces before its first fault."""

    @pytest.fixture
    def cold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pages, "resident_fraction", lambda start, end, path: 0.1)

    def test_a_cold_file_is_read_ahead(self, cold: None, house: Any, save: Save, ring: Ring) -> None:
        """All of it, if there is room."""
        path = save()
        house.read(path)
        assert [event.fields["bytes"] for event in ring.named("weights.read_ahead")] == [os.path.getsize(path)]

    @pytest.mark.parametrize("fraction", [0.96, 1.0, None])
    def test_a_warm_file_is_not(self, fraction: float | None, house: Any, save: Save, ring: Ring,
                                monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor one of which the system does not tell."""
        monkeypatch.setattr(pages, "resident_fraction", lambda start, end, path: fraction)
        house.read(save())
        assert ring.named("weights.read_ahead") == []

    def test_the_user_may_turn_it_off(self, cold: None, tools: Any, save: Save, ring: Ring) -> None:
        """`read_ahead = false`."""
        policy = ZeroCopy(Settings(read_ahead=False), tools)
        PolicyChain([policy]).answer(ReadWeights(save(), False, True), never)
        assert ring.named("weights.read_ahead") == []

    def test_a_file_without_a_byte_is_not_read_ahead(self, cold: None, house: Any, save: Save, ring: Ring) -> None:
        """There is no mapping to look at."""
        house.read(save(nothing=torch.empty(0)))
        assert ring.named("weights.read_ahead") == []

    def test_it_reads_no_more_than_there_is_room_for(self, cold: None, house: Any, save: Save, ring: Ring,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
        """What comes later would push out what came before."""
        monkeypatch.setattr(house.tools.ledger, "room", lambda owner, residency: 100)
        house.read(save())
        assert [event.fields["bytes"] for event in ring.named("weights.read_ahead")] == [100]

    def test_cancel_stops_it(self, cold: None, house: Any, save: Save) -> None:
        """The host's own Cancel goes up, and the host does not read the file instead."""
        cancel = KeyboardInterrupt("cancelled")
        house.tools.host.lifecycle.cancel = cancel
        with pytest.raises(KeyboardInterrupt) as raised:
            house.ask(ReadWeights(save(), False, True), never)
        assert raised.value is cancel
        cancel.__traceback__ = None  # its frames hold the tensors
        del raised
        gc.collect()
        assert house.bank.live() == []


class TestStarting:
    """Where there is nothing to gain, or the user said no."""

    def test_it_starts_where_the_host_copies(self, house: Any) -> None:
        """The usual case."""
        house.policy.start()

    def test_where_the_host_maps_itself_only_gguf_files_are_left(self, house: Any, save: Save, ring: Ring) -> None:
        """Dynamic VRAM."""
        house.tools.host.reading.maps = True
        house.policy.start()

        assert [event.fields["policy"] for event in ring.named("policy.declined")] == ["zero_copy, all but GGUF files"]
        assert house.policy.decide(ReadWeights(save(), with_metadata=False, on_cpu=True)) is None

    def test_where_the_host_maps_itself_and_knows_no_blocks_nothing_is_left(self, house: Any) -> None:
        """An older one, or one without its package for quantised tensors."""
        house.tools.host.reading.maps = True
        house.tools.host.formats.missing = "no quantised tensors"
        with pytest.raises(Unfit, match="dynamic VRAM"):
            house.policy.start()

    def test_it_does_not_start_where_the_user_forbade_mapping(self, house: Any) -> None:
        """`--disable-mmap` is the user's word."""
        house.tools.host.reading.no_mmap = True
        with pytest.raises(Unfit, match="--disable-mmap"):
            house.policy.start()


@pytest.fixture
def path(save: Save) -> str:
    return save(weight=torch.randn(8, 8), bias=torch.randn(8))


class TestOverwrittenFiles:
    """A mapping of a file that is written in place shows the new bytes."""

    def test_a_model_on_an_overwritten_file_is_refused(self, house: Any, path: str, weights_of: Any) -> None:
        """The user reads which file it was and what to do, and the host does not run."""
        net = house.load(nn.Linear(8, 8), path)
        house.ask(MoveWeights(weights_of(net), CPU))
        overwrite(path)
        with pytest.raises(Refusal, match="overwritten") as raised:
            house.ask(PlaceModel(weights_of(net), CPU, None), never)
        assert path in str(raised.value)

    def test_a_model_that_was_never_placed_is_refused_too(self, house: Any, path: str, weights_of: Any) -> None:
        """Between the build and the first placement a file may change as well."""
        net = house.load(nn.Linear(8, 8), path)
        overwrite(path)
        with pytest.raises(Refusal):
            house.ask(PlaceModel(weights_of(net), CPU, None), never)

    @pytest.mark.parametrize("change", ["none", "replaced", "deleted"])
    def test_a_model_on_a_file_that_is_whole_is_placed(self, change: str, house: Any, path: str, weights_of: Any) -> None:
        """A file that was replaced or deleted leaves its mapping whole."""
        net = house.load(nn.Linear(8, 8), path)
        house.ask(MoveWeights(weights_of(net), CPU))
        if change == "replaced":
            Path(path + ".part").write_bytes(Path(path).read_bytes())
            os.replace(path + ".part", path)
        if change == "deleted":
            os.unlink(path)
        assert house.policy.decide(PlaceModel(weights_of(net), CPU, None)) is None

    def test_a_model_from_elsewhere_is_placed(self, house: Any, weights_of: Any) -> None:
        """Nothing of ours is in it."""
        assert house.policy.decide(PlaceModel(weights_of(nn.Linear(4, 4)), CPU, None)) is None

    def test_the_next_prompt_builds_the_models_anew_once(self, house: Any, path: str, ring: Ring) -> None:
        """The outputs are dropped, the file is named, and the prompt runs."""
        net = house.load(nn.Linear(8, 8), path)
        rebuilt: list[str] = []
        prompt = RunPrompt("1", lambda: rebuilt.append("rebuilt"))
        assert house.ask(prompt) == "host"
        assert rebuilt == []
        overwrite(path)
        for _ in range(2):
            assert house.ask(prompt) == "host"
        assert rebuilt == ["rebuilt"]
        event, = ring.named("file.changed")
        assert event.fields["file"] == "model.safetensors"
        assert path in event.fields["reason"]
        assert house.mapped(net.weight)

    def test_the_old_models_are_gone_before_the_prompt_runs(self, house: Any, path: str) -> None:
        """They die in cycles, and two of them may not fit."""
        net = house.load(nn.Linear(8, 8), path)
        net.itself = net
        models = [net]
        del net
        overwrite(path)
        assert house.ask(RunPrompt("1", models.clear), lambda request: house.bank.live()) == []

    def test_a_file_that_nobody_uses_any_more_is_no_reason_to_rebuild(self, house: Any, path: str) -> None:
        """It is read again when it is asked for."""
        house.load(nn.Linear(8, 8), path)
        gc.collect()
        overwrite(path)
        assert house.policy.decide(RunPrompt("1", lambda: None)) is None

    @linux
    def test_after_the_rebuild_the_new_bytes_are_read(self, house: Any, path: str) -> None:
        """From a mapping of their own."""
        models = [house.load(nn.Linear(8, 8), path)]
        overwrite(path)
        house.ask(RunPrompt("1", models.clear))
        state_dict = house.read(path)
        last = state_dict["weight"].view(-1)[-1] if "weight" in list(state_dict)[-1] else state_dict[list(state_dict)[-1]][-1]
        assert last.view(1).view(torch.uint8).tolist() == [1, 2, 3, 4]


class TestBetweenPrompts:
    """What is kept, and what is let go."""

    @linux
    def test_idle_mappings_are_kept_within_the_ledger_and_booked(self, house: Any, path: str, ring: Ring) -> None:
        """The others see what zero_copy keeps."""
        house.load(nn.Linear(8, 8), path)
        gc.collect()
        house.policy.prompt_ended()
        size = os.path.getsize(path)
        assert house.tools.ledger.room("other", Residency.HOST) == 2**30 - size
        assert ring.named("weights.released") == []

    @linux
    def test_the_users_number_is_a_limit_too(self, tools: Any, path: str, ring: Ring) -> None:
        """`keep_gb = 0` keeps nothing idle."""
        policy = ZeroCopy(Settings(keep_gb=0), tools)
        PolicyChain([policy]).answer(ReadWeights(path, False, True), never)
        gc.collect()
        policy.prompt_ended()
        assert [event.fields["unmapped"] for event in ring.named("weights.released")] == [True]

    def test_emptying_lets_go_of_models_that_die_in_cycles(self, house: Any, path: str, ring: Ring) -> None:
        """The host collects after us, too late for the proof."""
        net = house.load(nn.Linear(8, 8), path)
        net.itself = net
        del net
        house.policy.emptied()
        assert len(ring.named("weights.released")) == 1
        assert house.bank._files == []

    def test_closing_leaves_mapped_models_mapped(self, house: Any, path: str) -> None:
        """They are rebuilt when they are loaded again."""
        net = house.load(nn.Linear(8, 8), path)
        before = net.weight.detach().clone()
        house.chain.switch([])
        assert torch.equal(before, net.weight)
        assert house.mapped(net.weight)

    def test_requests_that_are_not_its_own_have_no_rule(self, house: Any) -> None:
        """And the chain does not even ask."""
        assert house.policy.decide(SimpleNamespace()) is None
        assert ReadWeights in house.chain.wanted()
