"""`make compat`: loads the published fixtures in environments of their own, and writes the page.

    PYTHONPATH=entrypoint:tools .venv/bin/python -m compat [--torch 2.14.1 ...] [--python 3.12 ...]

runs every named torch with every named Python, by default those that this environment has. What was found
goes into docs/compatibility.jsonl in place of what was known of the same versions; the page tells of all.
"""

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import yaml

from compat.environments import RESOLUTIONS, ROOT, Environment, Failed, NotRun, environment
from compat.page import Row, render
from smolquant.evaluate import machine

PAGE = ROOT / "docs/compatibility.md"
RESULTS = ROOT / "docs/compatibility.jsonl"
WORKFLOW = ROOT / ".github/workflows/compat.yml"


def main() -> int:
    """Run what is asked for, and return how many environments failed or could not be had."""
    asked = _asked()
    failed = 0
    for torch in asked.torch:
        for python in asked.python:
            print(f"torch {torch}, Python {python}:", flush=True)
            try:
                with environment(python, torch) as place:
                    for row in _rows(place, python, torch):
                        print(
                            f"  {row.end}: {'; '.join(row.problems) or 'all is well'}", flush=True
                        )
                        failed += bool(row.problems)
                        _keep(row)
            except NotRun as reason:
                print(f"  not run: {reason}", flush=True)
                failed += 1
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return failed


def matrix() -> list[tuple[str, str]]:
    """Every (torch, Python) that the workflow runs, which is what is supported."""
    said = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]["compat"]["strategy"]["matrix"]
    return [(torch, python) for torch in said["torch"] for python in said["python"]]


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compat", description=__doc__)
    ours = version("torch").partition("+")[0], platform.python_version().rpartition(".")[0]
    parser.add_argument("--torch", nargs="+", default=[ours[0]], metavar="RELEASE")
    parser.add_argument("--python", nargs="+", default=[ours[1]], metavar="RELEASE")
    return parser.parse_args()


def _rows(place: Environment, python: str, torch: str) -> Iterator[Row]:
    day, here = datetime.now(UTC).date().isoformat(), machine("cpu")
    for end in RESOLUTIONS:
        row = Row(end, python, torch, day=day, machine=here)
        try:
            place.take(end)
            told = place.prove()
        except Failed as reason:
            yield replace(row, failed=str(reason))
        else:
            yield replace(row, versions=told["versions"], proofs=told["proofs"])


def _keep(row: Row) -> None:
    """Write a result in place of the one that there was, and the page."""
    known = [Row.read(line) for line in RESULTS.read_text("utf-8").splitlines()]
    rows = in_order([*(one for one in known if one.key != row.key), row])
    RESULTS.write_text("".join(one.written() for one in rows), encoding="utf-8")
    PAGE.write_text(render(rows, matrix()), encoding="utf-8")


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Those that are still supported, as the workflow orders them, the oldest libraries first."""
    places = {(end, *pair): at for at, pair in enumerate(matrix()) for end in RESOLUTIONS}
    ends = list(RESOLUTIONS)
    kept = [row for row in rows if row.key in places]
    return sorted(kept, key=lambda row: (places[row.key], ends.index(row.end)))


if __name__ == "__main__":
    sys.exit(main())
