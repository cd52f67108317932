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


class _Listener:
    """Nobody to tell: the hooks are only listed."""

    chain: Any = None

    def prompt_starts(self) -> None: ...


def render() -> str:
    """The table, from the hooks and from what each policy answers."""
    load()
    import importlib

    from residency import hooks, policies
    from residency.policies.files.bank import Bank

    tools = policies.Tools.make(hooks.host.connect())
    made = {name: importlib.import_module(f"residency.policies.{name}").create(settings(), tools)
            for name, settings in policies.tables().items()}
    rows = ["| what happens | host function | needed by |", "|---|---|---|"]
    for hook in hooks.all_hooks(Bank(), _Listener()):
        needed = ["telemetry, always"] if hook.report is not None else []
        needed += [f"`{name}`" for name, policy in made.items() if hook.asks in policy.answers]
        rows.append(f"| {_sentence(hook.asks)} | `{hook.name}` | {'; '.join(needed) or 'no policy yet'} |")
    return "\n".join(rows) + "\n"


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
