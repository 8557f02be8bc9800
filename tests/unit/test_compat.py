"""What `make compat` chooses, and what its page says of what was run and what was not."""

import pytest
import yaml
from packaging.requirements import Requirement

from compat.__main__ import WORKFLOW
from compat.environments import NotRun, ends_of, supported
from compat.page import Row, render
from compat.prove import CHECKED, LOADED, STOCK


def test_the_ends_of_a_range_are_releases_that_there_are() -> None:
    requirement = Requirement("transformers>=5.23,<6")
    there = ["6.0", "5.24.0", "5.23.1", "5.23.0", "5.9.0", "5.25.0rc1"]
    assert ends_of(requirement, there) == ("5.23.0", "5.24.0")
    with pytest.raises(NotRun, match="has no transformers"):
        ends_of(requirement, ["4.0"])


def test_the_workflow_runs_every_python_and_torch_that_pyproject_allows_with_torch_exactly() -> (
    None
):
    matrix = yaml.safe_load(WORKFLOW.read_text())["jobs"]["compat"]["strategy"]["matrix"]
    assert all(supported()["torch"].specifier.contains(one) for one in matrix["torch"])
    assert matrix["python"][0] == "3.11"


def proof(variant: str, way: str, problem: str = "") -> dict[str, str]:
    return {"format": "format-1", "variant": variant, "way": way, "problem": problem}


def test_a_cell_says_what_worked_what_failed_and_what_was_not_run() -> None:
    proofs = [
        proof("int8", LOADED),
        proof("int4", LOADED, "its logits are 70 % away"),
        proof("int8", STOCK),
        proof("int8", CHECKED),
        proof("int4", CHECKED),
    ]
    rows = [
        Row("oldest", "3.11", "2.13.0", {"torchao": "0.18.0"}, proofs),
        Row("newest", "3.13", "2.13.0", not_run="there is no such Python here"),
        Row("newest", "3.12", "2.13.0", failed="pip cannot install it"),
    ]
    page = render(rows)
    assert (
        "| oldest | 3.11 | 2.13.0 | 0.18.0 |  |  | int8; **fails: int4** | int8 | int8, int4 |"
        in page
    )
    assert "| not run: there is no such Python here | not run | not run |" in page
    assert "| **fails** | **fails** | **fails** |" in page
    assert "- oldest: format-1/int4 through `smolquant.load`: its logits are 70 % away" in page
    assert "- newest, Python 3.12: pip cannot install it" in page
    assert [bool(row.problems) for row in rows] == [True, False, True]
