"""What is loaded at the start: lists, the community's file, what was learned; and everything that may be wrong with them."""
from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from residency.policies import Tools
from residency.policies.memory import Limits, Residency
from residency.policies.models import Recipe
from residency.policies.preload_cache import PreloadCache, Settings, wishes
from residency.policies.preload_cache import settings as tables
from residency.policies.preload_cache.learned import Learned
from residency.settings import SettingsError
from residency.telemetry.sinks import Ring
from support.loads import MB, Loader

File = Callable[..., Path]
EXAMPLE = {
    "version": "1.0", "description": "worked example",
    "models": {
        "checkpoints": [{"name": "dreamshaper_8.safetensors", "cache_key": "", "enabled": True, "description": "main"}],
        "text_encoders": [{"clip_names": ["clip_l.safetensors", "clip_g.safetensors"], "type": "sdxl", "device": "default",
                           "cache_key": "both", "enabled": True, "description": ""}],
        "diffusion_models": [{"model_name": "flux1-dev.safetensors", "weight_dtype": "fp8_e4m3fn", "enabled": True}],
        "vaes": [{"vae_name": "sdxl_vae.safetensors", "enabled": False}]},
    "settings": {"auto_gpu_load": True, "verbose": True}}


class Machine:
    """A policy that is made and started with lists, over a host that has files."""

    def __init__(self, tools: Tools, ram: dict[str, int], file: File) -> None:
        self.tools, self.file = tools, file
        self.models: Any = tools.host.models
        self.server: Any = tools.host.server
        self.loader: Any = None

    def has(self, kind: str, name: str, megabytes: int = 1) -> None:
        self.models.files[kind][name] = str(self.file(name, megabytes))

    def start(self, **settings: Any) -> PreloadCache:
        policy = PreloadCache(Settings(**settings), self.tools)
        policy._watch.wake = lambda: None  # type: ignore[method-assign]
        self.loader = Loader(policy)
        self.models.loads = lambda recipe: self.loader(*map(Path, self.models.paths(recipe)), recipe=recipe)
        policy.start()
        self.server.started()
        return policy


@pytest.fixture
def machine(tools: Tools, ram: dict[str, int], file: File) -> Machine:
    return Machine(tools, ram, file)


def model(name: str, **more: Any) -> tables.DiffusionModel:
    return tables.DiffusionModel(name=name, **more)


def skipped(ring: Ring) -> list[str]:
    return [f"{event.fields['model']}: {event.fields['reason']}" for event in ring.named("cache.skipped")]


def test_every_list_is_loaded_as_the_nodes_would(machine: Machine, ring: Ring) -> None:
    """What is not enabled is left out."""
    for kind, name in (("checkpoints", "c"), ("text_encoders", "l"), ("text_encoders", "g"), ("diffusion_models", "d"),
                       ("diffusion_models", "off"), ("vaes", "v")):
        machine.has(kind, name)
    policy = machine.start(
        when="before", checkpoints=(tables.Checkpoint(name="c"),), diffusion_models=(model("d", weight_dtype="fp8_e4m3fn"),
                                                                                   model("off", enabled=False)),
        text_encoders=(tables.TextEncoders(names=("l", "g"), type="sdxl", device="cpu", cache_key="both"),),
        vaes=(tables.VAE(name="v", keep=True),))
    assert machine.models.loaded == [
        Recipe("checkpoints", ("c",)), Recipe("text_encoders", ("l", "g"), "sdxl", "cpu"),
        Recipe("diffusion_models", ("d",), weight_dtype="fp8_e4m3fn"), Recipe("vaes", ("v",))]
    assert [(entry.label, entry.keep) for entry in policy._loads.entries] == \
        [("c", False), ("both", False), ("d", False), ("v", True)]
    assert machine.server.works[0][0] is True
    (ready,) = ring.named("cache.ready")
    assert (ready.fields["models"], ready.fields["bytes"], ready.fields["skipped"]) == (4, 5 * MB, 0)


def test_the_first_load_of_a_workflow_is_then_a_hit(machine: Machine, ring: Ring) -> None:
    """That is what it is for."""
    machine.has("diffusion_models", "d")
    machine.start(diffusion_models=(model("d"),))
    machine.loader(Path(machine.models.files["diffusion_models"]["d"]))
    assert (machine.loader.calls, len(ring.named("cache.hit"))) == (1, 1)


@pytest.mark.parametrize(("wish", "why"), [
    (model("flux1-dv.sft"),
     "flux1-dv.sft: there is no 'flux1-dv.sft' among the diffusion models; the nearest are flux1-dev.sft"),
    (model("zzz"), "zzz: there is no 'zzz' among the diffusion models"),
    (model("flux1-dev.sft", weight_dtype="fp8"),
     "flux1-dev.sft: weight_dtype 'fp8' is unknown; known are default, fp8_e4m3fn"),
])
def test_a_wish_that_cannot_be_met_is_one_warning(machine: Machine, ring: Ring, wish: Any, why: str) -> None:
    """And the others are loaded."""
    machine.has("diffusion_models", "flux1-dev.sft")
    machine.start(diffusion_models=(wish, model("flux1-dev.sft")))
    assert skipped(ring) == [why]
    assert len(machine.models.loaded) == 1


@pytest.mark.parametrize("names", [(), ("l",) * 5])
def test_text_encoders_are_one_to_four(machine: Machine, ring: Ring, names: tuple[str, ...]) -> None:
    """As their loaders take them."""
    machine.has("text_encoders", "l")
    machine.start(text_encoders=(tables.TextEncoders(names=names, cache_key="wrong"),))
    assert skipped(ring) == [f"wrong: it names {len(names)} files, text encoders are one to four"]


def test_a_wrong_type_is_named(machine: Machine, ring: Ring) -> None:
    """With the nearest."""
    machine.has("text_encoders", "l")
    machine.start(text_encoders=(tables.TextEncoders(names=("l",), type="fluks"),))
    assert skipped(ring) == ["l: type 'fluks' is unknown, perhaps you meant 'flux'"]


def test_a_damaged_file_costs_its_model_and_not_the_start(machine: Machine, ring: Ring) -> None:
    """ComfyUI's error is the reason."""
    machine.has("diffusion_models", "bad")
    machine.has("diffusion_models", "good")
    policy = PreloadCache(Settings(diffusion_models=(model("bad"), model("good"))), machine.tools)
    machine.loader = Loader(policy)

    def load(recipe: Recipe) -> Any:
        if recipe.names == ("bad",):
            raise ValueError("header too large")
        return machine.loader(*map(Path, machine.models.paths(recipe)))

    machine.models.loads = load
    policy.start()
    machine.server.started()
    assert skipped(ring) == ["bad: ValueError: header too large"]
    assert [entry.label for entry in policy._loads.entries] == ["good"]
    policy.close()


def test_a_folder_that_cannot_be_listed_costs_its_models(machine: Machine, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive that is not there yet."""
    def gone(kind: str) -> list[str]:
        raise FileNotFoundError("/mnt/models")

    monkeypatch.setattr(machine.models, "choices", gone)
    machine.start(diffusion_models=(model("d"),))
    assert skipped(ring) == ["d: FileNotFoundError: /mnt/models"]


def test_duplicates_are_loaded_once(machine: Machine) -> None:
    """Whatever they are called."""
    machine.has("diffusion_models", "d")
    machine.start(diffusion_models=(model("d"), model("d", cache_key="again")))
    assert len(machine.models.loaded) == 1


def test_what_does_not_fit_is_not_read(machine: Machine, ring: Ring) -> None:
    """Earlier entries of the list do not leave for later ones."""
    machine.tools.ledger.limits = Limits(ram=1000 * MB, pad=0)
    for name in ("a", "b"):
        machine.has("diffusion_models", name, 600)
    machine.start(diffusion_models=(model("a"), model("b")))
    assert [recipe.names for recipe in machine.models.loaded] == [("a",)]
    assert skipped(ring) == ["b: it is 600 MB, and the budget leaves 400 MB"]


def test_free_stops_the_rest_of_the_list(machine: Machine, ring: Ring) -> None:
    """Who wants the memory back does not want it filled again."""
    machine.has("diffusion_models", "a")
    machine.has("diffusion_models", "b")
    policy = PreloadCache(Settings(diffusion_models=(model("a"), model("b"))), machine.tools)
    machine.models.loads = lambda recipe: policy.emptied()
    policy.start()
    machine.server.started()
    assert [event.fields["reason"] for event in ring.named("cache.stopped")] == ["ComfyUI was asked to forget everything"]
    assert len(machine.models.loaded) == 1
    policy.close()


def test_cancel_stops_the_list_and_nothing_else(machine: Machine, ring: Ring) -> None:
    """The host's Cancel may be any kind of exception."""
    lifecycle: Any = machine.tools.host.lifecycle
    lifecycle.cancel = InterruptedError()
    machine.has("diffusion_models", "a")
    machine.start(diffusion_models=(model("a"),))
    assert [event.fields["reason"] for event in ring.named("cache.stopped")] == ["it was cancelled"]
    assert machine.models.loaded == []


def test_a_prompt_waits_for_one_model_and_the_next_waits_for_the_prompt(machine: Machine) -> None:
    """They take turns."""
    machine.has("diffusion_models", "a")
    policy = PreloadCache(Settings(diffusion_models=(model("a"),)), machine.tools)
    policy.start()
    with policy._turn:
        thread = threading.Thread(target=machine.server.started)
        thread.start()
        thread.join(0.2)
        assert machine.models.loaded == []
    thread.join(10)
    assert len(machine.models.loaded) == 1
    policy.close()


@pytest.mark.parametrize(("placed", "snapshot"), [(1, False), (0, True)])
def test_auto_gpu_load_places_every_kind_but_before_a_snapshot(machine: Machine, placed: int, snapshot: bool) -> None:
    """A snapshot has nothing on a device."""
    machine.has("vaes", "v")
    machine.start(auto_gpu_load=True, snapshot=snapshot, vaes=(tables.VAE(name="v"),))
    assert machine.loader.kept[0].placed == placed


class TestCommunityFile:
    def write(self, folder: Path, content: Any) -> Path:
        file = folder / "preload_config.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    def test_a_worked_example(self, tmp_path: Path) -> None:
        """Every field is honoured."""
        found = wishes.read(self.write(tmp_path, EXAMPLE))
        assert found.wishes == (
            wishes.Wish(Recipe("checkpoints", ("dreamshaper_8.safetensors",)), "dreamshaper_8.safetensors", "main"),
            wishes.Wish(Recipe("text_encoders", ("clip_l.safetensors", "clip_g.safetensors"), "sdxl"), "both"),
            wishes.Wish(Recipe("diffusion_models", ("flux1-dev.safetensors",), weight_dtype="fp8_e4m3fn"),
                        "flux1-dev.safetensors"))
        assert (found.auto_gpu_load, found.verbose, found.skipped) == (True, True, ())

    def test_it_is_loaded_and_says_what_it_did(self, machine: Machine, tmp_path: Path, ring: Ring) -> None:
        """A path counts from the user's folder."""
        machine.has("checkpoints", "dreamshaper_8.safetensors")
        self.write(tmp_path, EXAMPLE)
        machine.start(import_="preload_config.json")
        (imported,) = ring.named("cache.imported")
        assert imported.fields["wishes"] == ["dreamshaper_8.safetensors", "both", "flux1-dev.safetensors"]
        assert [recipe.names for recipe in machine.models.loaded] == [("dreamshaper_8.safetensors",)]
        assert machine.loader.kept[0].placed == 1
        assert len(skipped(ring)) == 2

    def test_entries_that_cannot_be_used_are_named(self, tmp_path: Path) -> None:
        """The others count."""
        broken = {"models": {"vaes": [{"vae_name": "v"}, {"vae_name": 3}, "v", {"enabled": True}, {"vae_name": "w", "x": 1}]}}
        file = self.write(tmp_path, broken)
        found = wishes.read(file)
        assert [wish.label for wish in found.wishes] == ["v"]
        assert found.skipped == (
            f"{file}: 'vaes[1].name' must be a string, not 3", f"{file}: 'vaes[2].name' is missing",
            f"{file}: 'vaes[3].name' is missing",
            f"{file}: unknown key 'vaes[4].x'; known are cache_key, description, enabled, keep, name")

    @pytest.mark.parametrize("content", ["{", "[]", "3", "{}", '{"models": []}', '{"models": {"vaes": 3}}', "\x00"])
    def test_another_file_is_one_line(self, tmp_path: Path, content: str) -> None:
        """That names it."""
        file = self.write(tmp_path, content)
        with pytest.raises(SettingsError, match=r"this is no preload_config\.json") as caught:
            wishes.read(file)
        assert str(caught.value).startswith(str(file))

    def test_no_file_is_one_line_and_no_failed_start(self, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
        """The path is in it."""
        machine.start(import_="none.json")
        assert len([record for record in caplog.records if "none.json" in record.getMessage()]) == 1


class TestLearned:
    def test_the_most_used_come_first_after_a_restart(self, tmp_path: Path) -> None:
        """Over a file."""
        file, one, two = tmp_path / "r" / "learned.json", Recipe("vaes", ("one",)), Recipe("vaes", ("two",))
        learned = Learned(file)
        for recipe in (one, two, two):
            learned.used(recipe)
        learned.save()
        assert [wish.recipe for wish in Learned(file).most_used()] == [two, one]

    def test_nothing_new_is_not_written(self, tmp_path: Path) -> None:
        """A warm prompt costs no write."""
        Learned(tmp_path / "learned.json").save()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("content", ["", "{", "[1]", '[{"recipe": {"kind": "x"}}]', '{"a": 1}',
                                         '[{"recipe": {"kind": "no", "names": ["a"]}, "uses": 1, "last": 1}]'])
    def test_a_file_that_we_did_not_write_is_nothing_learned(self, tmp_path: Path, content: str) -> None:
        """It is not worth a word."""
        (tmp_path / "learned.json").write_text(content)
        assert Learned(tmp_path / "learned.json").most_used() == []

    def test_it_is_learned_from_prompts_and_loaded_at_the_next_start(self, machine: Machine, ring: Ring) -> None:
        """What is gone meanwhile is nobody's wish, and not worth a warning."""
        for name in ("often", "once", "gone"):
            machine.has("vaes", name)
        policy = machine.start(learn=True)
        for name in ("once", "often", "often", "gone"):
            machine.models.loads(Recipe("vaes", (name,)))
        policy.prompt_ended()
        policy.close()
        del machine.models.files["vaes"]["gone"]
        machine.models.loaded.clear()
        machine.server.works.clear()
        machine.start(learn=True)
        assert [recipe.names for recipe in machine.models.loaded] == [("often",), ("once",)]
        assert skipped(ring) == []


def test_the_status_has_names_and_bytes_and_no_paths(machine: Machine, tmp_path: Path) -> None:
    """And is gone when the policy is."""
    machine.has("diffusion_models", "d", 3)
    policy = machine.start(diffusion_models=(model("d", cache_key="main model"),))
    machine.loader.kept[0].where = {Residency.HOST: 7, Residency.DEVICE: 5}
    found = machine.server.routes["/residency/status"]()
    assert (found["hits"], found["misses"], found["bytes"]["anonymous"], found["bytes"]["device"]) == (0, 1, 7, 5)
    (entry,) = found["entries"]
    assert (entry["name"], entry["files"], entry["file_bytes"]) == ("main model", ["d"], 3 * MB)
    assert str(tmp_path) not in json.dumps(found)
    policy.close()
    assert machine.server.routes["/residency/status"]() is None
