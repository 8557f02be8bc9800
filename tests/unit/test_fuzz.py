"""The search of `make fuzz`: it finds what it is for, and each case can be repeated."""

from pathlib import Path

import pytest

import fuzz
from smolquant.errors import CheckpointError


def breaks_at_a_comma(content: bytes, _: Path) -> None:
    if b",," in content:
        raise KeyError("a reader's own mistake")
    if content != b"a,b":
        raise CheckpointError("damaged")


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> str:
    broken = fuzz.Target(lambda: b"a,b", breaks_at_a_comma, CheckpointError)
    monkeypatch.setattr(fuzz, "TARGETS", {"broken": broken})
    return "broken"


def test_a_mistake_is_found_and_found_again_by_its_seed_and_number(
    target: str, tmp_path: Path
) -> None:
    cases, found = fuzz.search([target], 7, 20.0, tmp_path)
    assert found is not None
    assert (found.case, found.what) == (cases, 'KeyError: "a reader\'s own mistake"')
    assert b",," in found.content
    assert fuzz.run_case(fuzz.TARGETS[target], target, 7, found.case, tmp_path) == found
    assert fuzz.run_case(fuzz.TARGETS[target], target, 8, found.case, tmp_path) != found


@pytest.mark.fault(
    "checkpoint",
    "Weights, index, config, record or card are damaged at random (`make fuzz`)",
    "Each is read or refused in one line; nothing else is ever raised, and nothing takes long.",
)
@pytest.mark.filterwarnings("ignore")  # of torch, about damaged pickles
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_first_cases_of_each_reader_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target = fuzz.TARGETS[name]
    target.read(target.valid(), tmp_path)
    cases = 20 if name == "config" else 100
    assert [fuzz.run_case(target, name, 1, case, tmp_path) for case in range(cases)] == [
        None
    ] * cases
    damaged = {fuzz.case_of(target, name, 1, case) for case in range(cases)}
    assert len(damaged) > cases / 2
