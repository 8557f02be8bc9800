"""`make docs`: the README's tables, made from the command itself and from what was measured."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from smolquant.cli import quantize

DOCS = Path(__file__).resolve().parent.parent / "docs"


def options() -> str:
    """Rows of markdown: option, the action's input, default, what it does."""
    rows = ["| option | input | default | |", "| :-- | :-- | :-- | :-- |"]
    for parameter in quantize.params:
        if not isinstance(parameter, click.Option):
            continue
        option = parameter.opts[0]
        variables = parameter.envvar or []
        names = [variables] if isinstance(variables, str) else list(variables)
        inputs = [
            name.removeprefix("INPUT_").lower() for name in names if name.startswith("INPUT_")
        ]
        default = parameter.default
        shown = (
            "" if default in (None, False) or not isinstance(default, str | int) else f"`{default}`"
        )
        choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
        help_text = (parameter.help or "").replace("|", "\\|")
        allowed = f" One of {', '.join(map(str, choices))}." if choices else ""
        rows.append(f"| `{option}` | `{', '.join(inputs)}` | {shown} | {help_text}{allowed} |")
    return "\n".join(rows) + "\n"


def measured(page: str) -> str:
    """The first table of a page that `make bench` or `make bench-quality` has written."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return "\n".join(rows) + "\n"


TABLES: Mapping[str, Callable[[], str]] = {
    "options": options,
    "performance": lambda: measured("performance.md"),
}
"""By the name in the markers around them."""


def with_tables(readme: str) -> str:
    """``readme`` with each table between its markers put up to date."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin (make docs) -->\n", f"<!-- {name}:end -->"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}{table()}{end}{after}"
    return readme


if __name__ == "__main__":
    path = Path("README.md")
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
