"""`python -m telemetry report [FILE]`, run in the plugin's folder."""
from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from unicodedata import east_asian_width

from .cells import Record, Table
from .report import Report

# From ComfyUI/custom_nodes/<the plugin>/telemetry to where ComfyUI keeps its user directory.
DEFAULT = Path(os.path.normpath(Path(__file__).parent / "../../../user/residency/telemetry.jsonl"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m telemetry", description="Reads back what Residency wrote down.")
    commands = parser.add_subparsers(dest="command", title="commands")
    report = commands.add_parser(
        "report", help="print a telemetry file as tables",
        description="Prints a telemetry file, and its rotated ones before it, as tables: prompts, what workers did for "
                    "them, models, files, hooks and policies that did not work, totals. 1 MB is 2**20 bytes. Workers: RAM of "
                    "each, where what several share counts in part. Models: times placed, and where the bytes were after "
                    "the last time. Files: 'from bank' counts loads that found the file mapped; 'released' is whether "
                    "letting go unmapped it, '-' before that.")
    report.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"default: {DEFAULT}".replace("%", "%%"))
    return parser


def siblings(path: Path) -> list[Path]:
    """The file and its rotated ones (`FILE.1` is the latest of those), oldest first; only those that exist."""
    names = [file.name for file in path.parent.glob("*")]
    numbers = [name[len(path.name) + 1:] for name in names if name.startswith(f"{path.name}.")]
    rotated = sorted(filter(str.isdecimal, numbers), key=int, reverse=True)
    return [*(path.with_name(f"{path.name}.{number}") for number in rotated), *([path] if path.exists() else [])]


def read(files: Iterable[Path]) -> Iterator[Record | None]:
    """The events in the files, as they were written; None for a line that is no event (a last line written by half).

    Raises:
        OSError: a file cannot be read.
    """
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in filter(str.strip, lines):
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    event = None
                yield event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def text(table: Table) -> str:
    """The table with aligned columns, numbers to the right."""
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(_width, column)) for column in columns]
    right = [all(cell.replace(".", "").lstrip("-").isdecimal() or cell == "-" for cell in column[1:]) for column in columns]
    lines = []
    for row in (table.head, ["-" * width for width in widths], *table.rows):
        padding = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = (space + cell if numbers else cell + space for cell, space, numbers in zip(row, padding, right, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _width(cell: str) -> int:
    """In columns of a terminal."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in cell)


def report(path: Path) -> int:
    """Prints the report of a file and its rotated siblings. Returns the exit status: 2 where it cannot be read."""
    try:
        files = siblings(path)
        if not files:
            print(f"{path}: no such file. Queue a prompt in ComfyUI first (with telemetry.file set in settings.toml), or name "
                  "the file: python -m telemetry report FILE", file=sys.stderr)
            return 2
        result = Report(read(files))
    except OSError as error:
        print(f"{error.filename or path}: cannot be read ({error.strerror}). Name a telemetry file that you may read: "
              "python -m telemetry report FILE", file=sys.stderr)
        return 2
    if result.events:
        print("\n\n".join(text(table) for table in result.tables() if table.rows))
    else:
        print(f"{path}: no events yet. Queue a prompt in ComfyUI, then run this again.")
    if result.broken:
        print(f"\n{result.broken} broken {'line was' if result.broken == 1 else 'lines were'} skipped.")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that cannot show a model's name
    try:
        if chosen.command is None:
            parser.print_help()
            status = 0
        else:
            status = report(chosen.file or DEFAULT)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer must not be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    return status


if __name__ == "__main__":
    sys.exit(main())
