"""Writes the README's table of hooks: `python hooks_table.py`. It stands between two comments, `hooks` and `/hooks`."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.loading import ROOT, load

README = ROOT / "README.md"
START, END = "<!-- hooks -->\n", "<!-- /hooks -->"
NOBODY = "no policy yet"
# By policy: settings by which it answers more than by default, and a value that does it.
MORE: dict[str, dict[str, Any]] = {"hybrid_split": {"devices": "cpu,*", "rules": [{}], "ffn_chunks": 2},
                                   "preload_cache": {"snapshot": True}}


class _Listener:
    """Nobody to tell: the hooks are only listed."""

    chain: Any = None

    def prompt_starts(self) -> None: ...


def render() -> str:
    """The table, from the hooks and from what each policy answers, by default or where a setting says so."""
    load()
    from residency import hooks, policies
    from residency.policies.files.bank import Bank

    tools = policies.Tools.make(hooks.host.connect())
    answers = [_answers(name, tools) for name in policies.tables()]
    rows = ["| what happens | host function | needed by |", "|---|---|---|"]
    for hook in hooks.all_hooks(Bank(), _Listener()):
        needed = ["telemetry, always"] if hook.report is not None else []
        needed += [found[hook.asks] for found in answers if hook.asks in found]
        rows.append(f"| {_sentence(hook.asks)} | `{hook.name}` | {'; '.join(needed) or NOBODY} |")
    return "\n".join(rows) + "\n"


def _answers(name: str, tools: Any) -> dict[type[Any], str]:
    """By request that a policy answers: its name, and which settings it takes."""
    import importlib

    from residency.settings import fill

    policy = importlib.import_module(f"residency.policies.{name}")
    default = policy.create(policy.Settings(), tools).answers
    keys: dict[type[Any], list[str]] = {}
    for key, value in MORE.get(name, {}).items():
        for kind in policy.create(fill(policy.Settings, {key: value}, key), tools).answers - default:
            keys.setdefault(kind, []).append(f"`{key}`")
    return {**dict.fromkeys(default, f"`{name}`"), **{kind: f"`{name}` with {' or '.join(by)}" for kind, by in keys.items()}}


def _sentence(kind: type[Any]) -> str:
    """The first sentence of a request's docstring."""
    text = " ".join((kind.__doc__ or kind.__name__).split())
    return text.split(". ")[0].removesuffix(".").replace("|", "\\|")


def block(readme: str) -> str:
    """What stands between the comments.

    Raises:
        ValueError: one of them is missing.
    """
    return readme[readme.index(START) + len(START):readme.index(END)]


def rewrite(readme: str) -> str:
    """The README with today's table."""
    return readme.replace(START + block(readme) + END, START + render() + END)


if __name__ == "__main__":
    README.write_text(rewrite(README.read_text(encoding="utf-8")), encoding="utf-8")
