"""What `make compat` chooses, and what its page says of what was run and what was not."""

from pathlib import Path
from typing import Any

import pytest

from compat import __main__ as compat
from compat.environments import ROOT
from compat.page import CHECKED, LOADED, MADE, STOCK, Row, render
from locks import requirements


def row(end: str = "newest", python: str = "3.11", torch: str = "2.13.0", **found: Any) -> Row:
    return Row(
        **{"day": "2026-11-30", "machine": "a CPU"} | found, end=end, python=python, torch=torch
    )


def proof(variant: str, way: str, problem: str = "") -> dict[str, str]:
    return {"format": "format-1", "variant": variant, "way": way, "problem": problem}


def test_the_workflow_runs_every_python_and_torch_that_pyproject_allows_with_torch_exactly() -> (
    None
):
    (torch,) = [one for one in requirements(ROOT / "pyproject.toml") if one.name == "torch"]
    assert all(torch.specifier.contains(release) for release, _ in compat.matrix())
    assert compat.matrix()[0] == ("2.13.0", "3.11")


def test_a_result_takes_the_place_of_the_one_before_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(compat, "PAGE", tmp_path / "page.md")
    compat.RESULTS.touch()
    worked = [proof("int8", LOADED)]
    for one in (
        row(torch="2.15.0", proofs=worked),
        row(proofs=worked, day="2026-10-01"),
        row("oldest", failed="pip is gone"),
        row(proofs=worked),
        row(torch="2.1.0", proofs=worked),
    ):
        compat._keep(one)
    kept = [Row.read(line) for line in compat.RESULTS.read_text().splitlines()]
    assert [one.written() for one in kept] == [
        row("oldest", failed="pip is gone").written(),
        row(proofs=worked).written(),
        row(torch="2.15.0", proofs=worked).written(),
    ]
    assert compat.PAGE.read_text() == render(kept, compat.matrix())


def test_the_page_is_what_the_kept_results_give() -> None:
    kept = [Row.read(line) for line in compat.RESULTS.read_text().splitlines()]
    assert compat.PAGE.read_text() == render(kept, compat.matrix())
    assert not [problem for one in kept for problem in one.problems]


def test_a_cell_says_what_worked_what_failed_and_what_was_not_run() -> None:
    proofs = [
        proof("int8", MADE),
        proof("int8", LOADED),
        proof("int4", LOADED, "its logits are 70 % away"),
        proof("int8", STOCK),
        proof("int8", CHECKED),
        proof("int4", CHECKED),
    ]
    versions = {"python": "3.11.7", "torch": "2.13.0+cpu", "torchao": "0.18.0"}
    rows = [
        row("oldest", proofs=proofs, versions=versions),
        row(python="3.12", failed="uv pip: no such release"),
    ]
    page = render(rows, [("2.13.0", "3.11"), ("2.13.0", "3.12"), ("2.13.0", "3.13")])
    assert (
        "| oldest | 3.11.7 | 2.13.0+cpu | 0.18.0 |  |  | int8 | int8; **fails: int4** | int8 | int8, int4 "
        "| 2026-11-30 |"
    ) in page
    assert "| newest | 3.12 | 2.13.0 |  |  |  |" + 4 * " **fails** |" + " 2026-11-30 |" in page
    assert "| oldest and newest | 3.13 | 2.13.0 |  |  |  |" + 4 * " not run |" + "  |" in page
    assert (
        "- oldest, Python 3.11, torch 2.13.0: format-1/int4 through `smolquant.load`: its logits are 70 %"
        in page
    )
    assert "- newest, Python 3.12, torch 2.13.0: uv pip: no such release" in page
    assert [bool(one.problems) for one in rows] == [True, True]
