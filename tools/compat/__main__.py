"""`make compat`: loads the published fixtures in environments of their own, and writes the page.

It is `PYTHONPATH=entrypoint:tools .venv/bin/python -m compat`; `--alone` leaves other Pythons to others.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version

import yaml

from compat.environments import (
    ROOT,
    VARIED,
    Environment,
    Failed,
    NotRun,
    available,
    beside_ours,
    ends_of,
    of_python,
    supported,
)
from compat.page import Row, render

PAGE = ROOT / "docs/compatibility.md"
WORKFLOW = ROOT / ".github/workflows/compat.yml"

OURS = platform.python_version().rpartition(".")[0]
TORCH = version("torch").partition("+")[0]


def main() -> int:
    """Run what can be run here, and return how many environments something failed in."""
    rows = []
    for row in _rows(alone="--alone" in sys.argv[1:]):
        print(f"{row.name}, Python {row.python}, torch {row.torch}: {row.not_run or 'run'}")
        print("".join(f"  {problem}\n" for problem in row.problems), end="", flush=True)
        rows.append(row)
    PAGE.write_text(render(rows), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return sum(bool(row.problems) for row in rows)


def _rows(*, alone: bool) -> Iterator[Row]:
    yield from _of_this_torch()
    index = os.environ.get("TORCH_INDEX")
    matrix = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]["compat"]["strategy"]["matrix"]
    for python in matrix["python"]:
        if python != OURS and alone:
            yield Row("newest", python, TORCH, not_run="another Python runs here")
        elif python != OURS:
            yield _row("newest", python, partial(of_python, python, index))
    for torch in matrix["torch"]:
        if torch != TORCH:
            yield Row("oldest and newest", OURS, torch, not_run="another torch is installed here")


def _of_this_torch() -> Iterator[Row]:
    try:
        ends = {name: ends_of(supported()[name], available(name)) for name in VARIED}
    except NotRun as reason:
        yield Row("oldest and newest", OURS, TORCH, not_run=str(reason))
        return
    for place, name in enumerate(("oldest", "newest")):
        pinned = {library: versions[place] for library, versions in ends.items()}
        yield _row(name, OURS, partial(beside_ours, name, pinned))


def _row(name: str, python: str, make: Callable[[], Environment]) -> Row:
    try:
        told = make().prove()
    except NotRun as reason:
        return Row(name, python, TORCH, not_run=str(reason))
    except Failed as reason:
        return Row(name, python, TORCH, failed=str(reason))
    return Row(name, python, TORCH, versions=told["versions"], proofs=told["proofs"])


if __name__ == "__main__":
    sys.exit(main())
