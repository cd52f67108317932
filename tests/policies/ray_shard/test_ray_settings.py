"""The table `[ray_shard]`: what `workers` may be, and what a user reads who wrote something else."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from residency import policies
from residency import settings as settings_module
from residency.policies.ray_shard.settings import Settings, WorkerSettings, parse_workers


@pytest.mark.parametrize(("value", "expected"), [
    ("auto", ()),
    (1, (WorkerSettings(),)),
    (64, (WorkerSettings(),) * 64),
    ([{"device": "cuda:1"}, {"device": "cuda:0", "weight": 0.6}], (WorkerSettings("cuda:1"), WorkerSettings("cuda:0", 0.6))),
    ([{}], (WorkerSettings(),)),
    ([{"weight": 2}], (WorkerSettings("", 2.0),)),
    ([{}, {"device": "cuda:0", "host": "192.168.1.7"}], (WorkerSettings(), WorkerSettings("cuda:0", 1.0, "192.168.1.7"))),
])
def test_workers(value: Any, expected: tuple[WorkerSettings, ...]) -> None:
    """A word, a number, or one table for each."""
    assert parse_workers(value) == expected
    assert all(isinstance(worker.weight, float) for worker in parse_workers(value))


@pytest.mark.parametrize(("value", "words"), [
    ("all", ["'all'", '"auto"']), (0, ["1 to 64", "this is 0"]), (65, ["1 to 64"]), (-1, ["1 to 64"]), (True, ["this is True"]),
    (2.0, ["this is 2.0"]), ([], ["this is []"]), ([{}] * 65, ["1 to 64"]), (["cuda:0"], ["one of them is 'cuda:0'"]),
    ([{"devices": "cuda:0"}], ["devices", "device ="]), ([{"device": 0}], ['such as "cuda:0"', "not 0"]),
    ([{"weight": 0}], ["above 0"]), ([{"weight": -1}], ["above 0"]), ([{"weight": "2"}], ["'2'"]),
    ([{"weight": True}], ["True"]),
    ([{"weight": float("nan")}], ["nan"]), ([{"weight": float("inf")}], ["inf"]), ([{"weight": 1001}], ["at most 1000"]),
    (None, ["None"]), ([{"host": ""}], ["ray status", "ComfyUI's own machine"]), ([{"host": 7}], ["ray status", "not 7"]),
    ([{"host": "box"}], ['{ device = "cuda:0", host = "box" }']),
], ids=lambda value: str(value)[:30])
def test_what_is_no_workers(value: Any, words: list[str]) -> None:
    """The error shows what was written, and what may be."""
    with pytest.raises(ValueError) as caught:
        parse_workers(value)
    assert all(word in str(caught.value) for word in words)


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    found = settings_module.load([path], policies.tables()).tables["ray_shard"]
    assert isinstance(found, Settings)
    return found


def test_from_a_file(tmp_path: Path) -> None:
    """What is left out has its default."""
    workers = '[{ device = "cuda:0" }, { device = "cuda:1", weight = 0.6 }]'
    found = read(tmp_path, f"[ray_shard]\nworkers = {workers}\nrows = false\n")
    assert found == Settings(workers=(WorkerSettings("cuda:0"), WorkerSettings("cuda:1", 0.6)), rows=False)


@pytest.mark.parametrize(("line", "words"), [
    ("workers = 0", ["ray_shard.workers", "this is 0"]), ('verify = "sometimes"', ["ray_shard.verify", "first_step"]),
    ("timeout_seconds = 1", ["ray_shard.timeout_seconds", "5"]), ("worker = 2", ["ray_shard.worker", "workers"]),
    ('rows = "yes"', ["ray_shard.rows"]), ("ffn_chunks = 65", ["ray_shard.ffn_chunks", "1 to 64"]),
])
def test_an_error_names_file_and_key(tmp_path: Path, line: str, words: list[str]) -> None:
    """And the cure."""
    with pytest.raises(settings_module.SettingsError) as caught:
        read(tmp_path, f"[ray_shard]\n{line}\n")
    assert all(word in str(caught.value) for word in ["settings.toml", *words])


@pytest.mark.parametrize(("address", "local"), [("local", True), ("auto", False), ("127.0.0.1:6379", False)])
def test_whose_ray_it_is(address: str, local: bool) -> None:
    """Ours is ended with ComfyUI."""
    assert Settings(address=address).is_local is local
