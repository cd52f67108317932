"""Hits and misses, by numbers: the host's loader is called once, and never for what is stale."""
from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from residency.policies import Tools
from residency.policies.files import mounts, pages
from residency.policies.memory import Limits, Residency
from residency.policies.preload_cache import PreloadCache
from residency.policies.requests import FreeMemory, RunPrompt
from residency.telemetry.sinks import Ring
from support.loads import MB, FakeKept, Loader

File = Callable[..., Path]


def test_the_second_load_is_a_clone_of_the_first(loader: Loader, file: File, ring: Ring) -> None:
    """The host loads once; nobody gets the kept object itself."""
    path = file()
    assert [loader(path), loader(path), loader(path)] == ["model 1", "model 2", "model 3"]
    assert loader.calls == 1
    assert [event.fields["reason"] for event in ring.named("cache.miss")] == ["not loaded before"]
    assert [event.fields["model"] for event in ring.named("cache.hit")] == ["a.safetensors"] * 2


def test_a_mapped_files_pages_are_held_from_its_load_on(loader: Loader, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the prompt's end on, when the host has read them and let the kernel drop them. A private copy needs none."""
    woken: list[str] = []
    monkeypatch.setattr(loader.policy._watch, "wake", lambda: woken.append("woken"))  # type: ignore[attr-defined]
    path = file()
    loader(path)
    assert woken == ["woken"]
    loader(path)
    loader.where = {Residency.HOST: MB}
    loader(file("b.safetensors"))
    assert (woken, loader.calls) == (["woken"], 2)


def test_options_that_cannot_be_compared_are_left_to_the_host(loader: Loader, file: File, ring: Ring) -> None:
    """With the reason, each time."""
    assert [loader(file(), options={"ops": object()}) for _ in range(2)] == ["the host's own"] * 2
    assert loader.calls == 2
    assert {event.fields["reason"] for event in ring.named("cache.miss")} == \
        {"options.ops is a object, which cannot be compared"}


def test_a_missing_file_is_left_to_the_host(loader: Loader, tmp_path: Path) -> None:
    """Its error names the file better."""
    assert loader.policy.decide(loader.request(tmp_path / "none")) is None


def test_an_answer_that_cannot_be_kept_is_handed_on(loader: Loader, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the host's own, every time."""
    monkeypatch.setattr(loader, "_keep", lambda answer: None)
    path = file()
    assert [loader(path), loader(path)] == ["the host's own"] * 2


def test_a_model_that_a_pack_changed_is_loaded_anew(loader: Loader, file: File, ring: Ring) -> None:
    """ComfyUI alone would load it from the file again."""
    path = file()
    loader(path)
    loader.kept[0].change = "another pack changed the weight 0.a.0"
    loader(path)
    assert (loader.calls, loader.kept[0].dropped) == (2, True)
    assert [event.fields["reason"] for event in ring.named("cache.evicted")] == ["another pack changed the weight 0.a.0"]


@pytest.mark.parametrize("change", ["overwrite", "replace", "touch"])
def test_a_changed_file_is_another_model(loader: Loader, file: File, ring: Ring, change: str) -> None:
    """And what was kept of the old one leaves."""
    path = file()
    loader(path)
    if change == "overwrite":
        file(megabytes=2)
    elif change == "replace":
        os.replace(file("new", 1), path)
    else:
        os.utime(path, ns=(1, 1))
    loader(path)
    assert loader.calls == 2
    assert [event.fields["reason"] for event in ring.named("cache.evicted")] == ["its file was changed or is gone"]


def test_a_file_that_changes_while_it_is_loaded_is_not_kept(loader: Loader, file: File) -> None:
    """Nobody knows which bytes were read."""
    path = file()
    loader.meanwhile = lambda: os.utime(path, ns=(loader.calls, loader.calls))
    assert [loader(path), loader(path)] == ["the host's own"] * 2


def test_a_deleted_file_leaves_at_the_next_prompt(loader: Loader, file: File) -> None:
    """Before it runs."""
    path = file()
    loader(path)
    path.unlink()
    decision = loader.policy.decide(RunPrompt("1", lambda: None))
    assert decision is not None
    decision.act(lambda asked=None: None)
    assert loader.kept[0].dropped


def test_an_error_of_the_host_goes_up_and_nothing_is_kept(loader: Loader, file: File) -> None:
    """The next load tries again."""
    def fail() -> None:
        raise ValueError("no such model")

    loader.meanwhile = fail
    with pytest.raises(ValueError, match="no such model"):
        loader(file())
    loader.meanwhile = lambda: None
    assert loader(file()) == "model 1"


def test_two_threads_that_load_one_file_build_it_once(loader: Loader, file: File) -> None:
    """The second waits for the first."""
    path, begun = file(), threading.Event()
    loader.meanwhile = lambda: (begun.set(), threading.Event().wait(0.1))[1] and None  # type: ignore[func-returns-value]
    threads = [threading.Thread(target=loader, args=(path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (loader.calls, loader.kept[0].lent) == (1, 4)


class TestBudget:
    """The test's ledger has 1 GB and no pad."""

    def test_the_least_recently_used_leaves_first(self, loader: Loader, file: File, tools: Tools) -> None:
        """Three of 400 MB do not fit into 1000."""
        tools.ledger.limits = Limits(ram=1000 * MB, pad=0)
        loader.where = {Residency.HOST: 400 * MB}
        paths = [file(name, 400) for name in "abc"]
        loader(paths[0]), loader(paths[1]), loader(paths[0]), loader(paths[2])
        assert [kept.dropped for kept in loader.kept] == [False, True, False]

    def test_mapped_files_count_once_and_leave_too(self, loader: Loader, file: File, tools: Tools) -> None:
        """Two entries of one file share its pages."""
        tools.ledger.limits = Limits(ram=1000 * MB, pad=0)
        path = file("a", 600)
        loader(path), loader(path, options={"dtype": 1})
        assert [kept.dropped for kept in loader.kept] == [False, False]
        loader(file("b", 600))
        assert [kept.dropped for kept in loader.kept] == [True, True, False]

    def test_what_is_to_be_kept_leaves_last(self, loader: Loader, file: File, tools: Tools) -> None:
        """Though it is used least recently."""
        tools.ledger.limits = Limits(ram=1000 * MB, pad=0)
        loader.where = {Residency.HOST: 400 * MB}
        loader(file("a", 400))
        next(iter(loader.policy._loads.entries)).keep = True
        loader(file("b", 400)), loader(file("c", 400))
        assert [kept.dropped for kept in loader.kept] == [False, True, False]

    def test_what_is_in_use_stays_and_is_not_counted(self, loader: Loader, file: File, tools: Tools) -> None:
        """Letting go of it would free nothing; it leaves when it is idle."""
        tools.ledger.limits = Limits(ram=500 * MB, pad=0)
        loader.where = {Residency.HOST: 400 * MB}
        loader(file("a", 400))
        loader.kept[0].used = True
        loader(file("b", 400))
        assert [kept.dropped for kept in loader.kept] == [False, False]
        loader.kept[0].used = False
        loader.policy.prompt_ended()
        assert [kept.dropped for kept in loader.kept] == [True, False]

    def test_a_model_larger_than_the_budget_is_not_kept(self, loader: Loader, file: File, tools: Tools, ring: Ring) -> None:
        """It is used all the same, and the line has both numbers."""
        tools.ledger.limits = Limits(ram=300 * MB, pad=0)
        loader.where = {Residency.HOST: 400 * MB}
        assert loader(file("a", 400)) == "model 1"
        assert [event.fields["reason"] for event in ring.named("cache.evicted")] == ["it takes 400 MB, the budget is 300 MB"]
        assert list(loader.policy._loads.entries) == []

    def test_the_ledger_knows_what_is_kept(self, loader: Loader, file: File, tools: Tools) -> None:
        """Other policies draw from the same budget."""
        loader.where = {Residency.HOST: 300 * MB}
        loader(file("a", 300))
        loader.where = {Residency.MAPPED: 200 * MB}
        loader(file("b", 200))
        assert tools.ledger.room("another", Residency.HOST) == 2**30 - 500 * MB
        loader.policy.emptied()
        assert tools.ledger.room("another", Residency.HOST) == 2**30

    def test_room_is_made_before_a_load(self, loader: Loader, file: File, ram: dict[str, int]) -> None:
        """Private copies leave before the host takes as much again."""
        loader.where = {Residency.HOST: 400 * MB}
        loader(file("a", 400))
        ram["available"] = 100 * MB
        loader.meanwhile = lambda: seen.append(loader.kept[0].dropped)
        seen: list[bool] = []
        loader(file("b", 300))
        assert seen == [True]


class TestPressure:
    """What the watch asks for comes at a moment at which models may go."""

    @pytest.fixture(autouse=True)
    def one_private_model(self, loader: Loader, file: File) -> None:
        loader.where = {Residency.HOST: 400 * MB}
        loader(file("a", 400))

    def test_between_prompts_at_once(self, loader: Loader, ring: Ring) -> None:
        """The kernel need not wait."""
        loader.policy._shrink(1)
        assert loader.kept[0].dropped
        assert [event.fields["reason"] for event in ring.named("cache.evicted")] == ["memory pressure"]

    def test_in_a_prompt_when_the_host_frees_memory(self, loader: Loader) -> None:
        """Not in the middle of a step, from another thread."""
        decision = loader.policy.decide(RunPrompt("1", lambda: None))
        assert decision is not None

        def prompt(asked: Any = None) -> list[bool]:
            watch = threading.Thread(target=loader.policy._shrink, args=(1,))
            watch.start()
            watch.join(10)
            before = loader.kept[0].dropped
            freed = loader.policy.decide(FreeMemory("cpu", 1.0))
            assert freed is not None
            freed.act(lambda asked=None: None)
            return [before, loader.kept[0].dropped]

        assert decision.act(prompt) == [False, True]

    def test_only_as_much_as_is_wanted(self, loader: Loader, file: File) -> None:
        """The rest stays."""
        loader(file("b", 400))
        loader.policy._shrink(100 * MB)
        assert [kept.dropped for kept in loader.kept] == [True, False]

    def test_models_that_cost_nothing_private_stay(self, loader: Loader, file: File) -> None:
        """Their pages are the kernel's to take."""
        loader.where = {Residency.MAPPED: 400 * MB}
        loader(file("b", 400))
        loader.policy._shrink(2**40)
        assert [kept.dropped for kept in loader.kept] == [True, False]


def test_files_on_a_slow_mount_are_read_ahead(loader: Loader, file: File, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is not in the page cache yet."""
    monkeypatch.setattr(mounts, "slow", lambda path: "nfs4")
    monkeypatch.setattr(pages, "cached_fraction", lambda path: 0.2)
    loader(file("cold", 3))
    monkeypatch.setattr(pages, "cached_fraction", lambda path: 1.0)
    loader(file("warm", 3))
    assert [(event.fields["file"], event.fields["bytes"]) for event in ring.named("weights.read_ahead")] == [("cold", 3 * MB)]


def test_turned_off_it_lets_go_and_keeps_nothing_more(loader: Loader, file: File, policy: PreloadCache) -> None:
    """A load that was on its way is not kept either."""
    loader(file())
    policy.close()
    assert loader.kept[0].dropped
    assert loader(file("b")) == "the host's own"
    assert isinstance(loader.kept[0], FakeKept)
