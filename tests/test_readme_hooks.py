"""The README says what the plugin touches, and the code is what it says it from."""
from __future__ import annotations

import re

import pytest
from support import hooks_table


def test_the_readme_lists_the_hooks_that_there_are() -> None:
    """After a change of a hook or of what a policy answers: `make hooks-table`."""
    assert hooks_table.render() == hooks_table.block(hooks_table.README.read_text(encoding="utf-8"))


def test_every_hook_has_somebody_who_needs_it() -> None:
    """By default, or with a setting, which is named."""
    table = hooks_table.render()

    assert hooks_table.NOBODY not in table
    assert "`comfy.model_base.BaseModel._apply_model` | `hybrid_split` with `ffn_chunks`; `ray_shard` |" in table
    assert "`comfy.sd.load_clip` | telemetry, always; `hybrid_split` with `devices` or `rules`; `preload_cache` |" in table


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, more in hooks_table.MORE.items() for key in more])
def test_each_setting_that_is_tried_adds_something(name: str, key: str) -> None:
    """So that none is tried in vain when it goes or is renamed."""
    assert re.search(f"`{name}` with [^;|]*`{key}`", hooks_table.render())


def test_rewriting_touches_only_the_table() -> None:
    """Before and after the comments everything stays, and a second time changes nothing."""
    written = hooks_table.rewrite("# Residency\n<!-- hooks -->\nold\n<!-- /hooks -->\nmore\n")

    assert f"# Residency\n<!-- hooks -->\n{hooks_table.render()}<!-- /hooks -->\nmore\n" == written
    assert written == hooks_table.rewrite(written)


def test_an_empty_block_can_be_filled() -> None:
    """The two comments are enough to start with."""
    assert hooks_table.render() in hooks_table.rewrite("<!-- hooks -->\n<!-- /hooks -->")
