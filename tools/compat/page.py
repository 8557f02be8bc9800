"""docs/compatibility.md: which libraries the published fixtures were loaded with, and how they did."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from compat.prove import CHECKED, LOADED, STOCK

WAYS = {
    LOADED: "`smolquant.load`",
    STOCK: "transformers alone",
    CHECKED: "`smolquant check`",
}

HEAD = """# Compatibility

`make compat` writes this page. It loads the published fixtures in [tests/fixtures](../tests/fixtures), a
tiny model in each format version so far, with other versions of the libraries, and compares what they
compute with what was recorded when they were made: logits through `smolquant.load` and, where the scheme
allows that, through transformers alone; files, tokens and perplexity through `smolquant check`. The oldest
and the newest versions are those that pyproject.toml allows and the registry has. A row that says *not run*
was not run on the machine that wrote this page; [a workflow](../.github/workflows/compat.yml) runs all of
them each week, with torch's builds for CPUs, and shows in its summary what it found.
"""


@dataclass(frozen=True)
class Row:
    """An environment: its libraries and what was proved there, or why it was not run."""

    name: str
    python: str
    torch: str
    versions: Mapping[str, str] = field(default_factory=dict)
    proofs: Sequence[Mapping[str, Any]] = ()
    not_run: str = ""
    failed: str = ""
    """Why there is nothing proved, though there should be."""

    @property
    def problems(self) -> list[str]:
        """What did not work, in sentences."""
        if self.failed:
            return [f"{self.name}, Python {self.python}: {self.failed}"]
        return [
            f"{self.name}: {one['format']}/{one['variant']} through {WAYS[one['way']]}: {one['problem']}"
            for one in self.proofs
            if one["problem"]
        ]


def render(rows: Sequence[Row]) -> str:
    """The page."""
    names = sorted({one["format"] for row in rows for one in row.proofs})
    return "\n".join([HEAD, *(line for name in names for line in _table(name, rows))]) + "\n"


def _table(fixture: str, rows: Sequence[Row]) -> Iterator[str]:
    yield f"## {fixture.replace('-', ' ').capitalize()}"
    yield ""
    heads = ["libraries", "Python", "torch", "torchao", "transformers", "huggingface_hub"]
    yield f"| {' | '.join([*heads, *WAYS.values()])} |"
    yield "| :-- " * (len(heads) + len(WAYS)) + "|"
    for row in rows:
        yield f"| {' | '.join(_cells(row, fixture))} |"
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
    yield from (row.name, row.python, row.torch)
    yield from (
        row.versions.get(name, "") for name in ("torchao", "transformers", "huggingface_hub")
    )
    if row.not_run:
        yield from [f"not run: {row.not_run}", *["not run"] * (len(WAYS) - 1)]
        return
    if row.failed:
        yield from ["**fails**"] * len(WAYS)
        return
    for way in WAYS:
        of_way = [one for one in row.proofs if (one["format"], one["way"]) == (fixture, way)]
        yield _verdict(of_way)


def _verdict(proofs: Sequence[Mapping[str, Any]]) -> str:
    """``int8, int4; **fails: float8**``."""
    by_problem = groupby(sorted(proofs, key=_fails), _fails)
    names = {fails: ", ".join(one["variant"] for one in group) for fails, group in by_problem}
    told = [names[False]] if False in names else []
    told += [f"**fails: {names[True]}**"] if True in names else []
    return "; ".join(told)


def _fails(proof: Mapping[str, Any]) -> bool:
    return bool(proof["problem"])
