"""docs/compatibility.md: which libraries the published fixtures were loaded with, and how they did."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

# What is tried of a variant, as results name it.
MADE = "smolquant quantize"
LOADED = "smolquant.load"
STOCK = "transformers"
CHECKED = "smolquant check"

LIBRARIES = ("torch", "torchao", "transformers", "huggingface_hub")

WAYS = {
    MADE: "`smolquant quantize`",
    LOADED: "`smolquant.load`",
    STOCK: "transformers alone",
    CHECKED: "`smolquant check`",
}

HEAD = """# Compatibility

`make compat` writes this page. In an environment of each Python and torch it installs the oldest and the
newest releases of all other libraries that pyproject.toml allows and the registry has. There it quantizes a
small model, whose int4 bytes have to be the recorded ones; and it loads the published fixtures in
[tests/fixtures](../tests/fixtures), a tiny model in each format version so far, and compares what they
compute with what was recorded when they were made: logits through `smolquant.load` and, where the scheme
allows that, through transformers alone; files, tokens and perplexity through `smolquant check`.

A row tells when it was run. One that says *not run* was never run by who wrote this page;
[a workflow](../.github/workflows/compat.yml) runs all of them each week, with torch's builds for CPUs, and
shows in its summary what it found.
"""


@dataclass(frozen=True)
class Row:
    """An environment: its libraries and what was proved there."""

    end: str
    """Which of the allowed releases the libraries are: ``oldest`` or ``newest``."""
    python: str
    torch: str
    day: str
    """Of the run, in ISO 8601."""
    machine: str
    versions: Mapping[str, str] = field(default_factory=dict)
    proofs: Sequence[Mapping[str, Any]] = ()
    failed: str = ""
    """Why there is nothing proved, though there should be."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What there is one result of."""
        return self.end, self.torch, self.python

    @property
    def problems(self) -> list[str]:
        """What did not work, in sentences."""
        where = f"{self.end}, Python {self.python}, torch {self.torch}"
        if self.failed:
            return [f"{where}: {self.failed}"]
        return [
            f"{where}: {one['format']}/{one['variant']} through {WAYS[one['way']]}: {one['problem']}"
            for one in self.proofs
            if one["problem"]
        ]

    def written(self) -> str:
        """A line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> "Row":
        """What :meth:`written` wrote."""
        return cls(**json.loads(line))


def render(rows: Sequence[Row], supported: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        rows: what was run, in the order of the page.
        supported: each (torch, Python) that the page tells of, also where it was not run.
    """
    names = sorted({one["format"] for row in rows for one in row.proofs})
    lines = [line for name in names for line in _table(name, rows, supported)]
    machines = "; ".join(dict.fromkeys(row.machine for row in rows))
    return "\n".join([HEAD, *lines, f"Run on {machines}."]) + "\n"


def _table(
    fixture: str, rows: Sequence[Row], supported: Sequence[tuple[str, str]]
) -> Iterator[str]:
    yield f"## {fixture.replace('-', ' ').capitalize()}"
    yield ""
    heads = ["libraries", "Python", *LIBRARIES, *WAYS.values(), "run on"]
    yield f"| {' | '.join(heads)} |"
    yield "| :-- " * len(heads) + "|"
    for torch, python in supported:
        of_both = [row for row in rows if (row.torch, row.python) == (torch, python)]
        for row in of_both:
            yield f"| {' | '.join(_cells(row, fixture))} |"
        if not of_both:
            cells = ["oldest and newest", python, torch, *[""] * (len(LIBRARIES) - 1)]
            yield f"| {' | '.join([*cells, *['not run'] * len(WAYS), ''])} |"
    problems = [
        problem
        for row in rows
        for problem in row.problems
        if row.failed or f" {fixture}/" in problem
    ]
    if problems:
        yield ""
        yield from (f"- {problem}" for problem in problems)
    yield ""


def _cells(row: Row, fixture: str) -> Iterator[str]:
    versions = {"torch": row.torch, **row.versions}
    yield from (row.end, versions.get("python", row.python))
    yield from (versions.get(name, "") for name in LIBRARIES)
    for way in WAYS:
        of_way = [one for one in row.proofs if (one["format"], one["way"]) == (fixture, way)]
        yield "**fails**" if row.failed else _verdict(of_way)
    yield row.day


def _verdict(proofs: Sequence[Mapping[str, Any]]) -> str:
    """``int8, int4; **fails: float8**``."""
    by_problem = groupby(sorted(proofs, key=_fails), _fails)
    names = {fails: ", ".join(one["variant"] for one in group) for fails, group in by_problem}
    told = [names[False]] if False in names else []
    told += [f"**fails: {names[True]}**"] if True in names else []
    return "; ".join(told)


def _fails(proof: Mapping[str, Any]) -> bool:
    return bool(proof["problem"])
