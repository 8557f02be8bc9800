"""docs/faults.md lists what the tests are marked with; that it is up to date, test_readme.py holds."""

import pytest

from fault_page import KINDS, Fault, all_faults, faults_in, sections

MARKED = """
import pytest

@pytest.mark.fault("hub", "The Hub is " "silent", "Exit 5.")
@pytest.mark.fault("machine", "The disk | is full", "Exit 4.")
def test_one() -> None: ...

@pytest.mark.parametrize("case", [
    pytest.param(1, marks=pytest.mark.fault("hub", "The Hub is silent", "Exit 5.")),
    2,
])
def test_two(case: int) -> None: ...

def test_of_no_fault() -> None: ...
"""


def test_markers_are_found_on_tests_and_on_their_cases() -> None:
    assert list(faults_in(MARKED, "tests/a.py")) == [
        Fault("hub", "The Hub is silent", "Exit 5.", "tests/a.py", "test_one"),
        Fault("machine", "The disk | is full", "Exit 4.", "tests/a.py", "test_one"),
        Fault("hub", "The Hub is silent", "Exit 5.", "tests/a.py", "test_two"),
    ]


def test_a_files_own_marker_is_of_all_its_tests() -> None:
    source = """
pytestmark = [pytest.mark.fault("hub", "a", "B."), pytest.mark.container]
def helper(): ...
def test_one(): ...
def test_two(): ...
"""
    found = [(fault.fault, fault.test) for fault in faults_in(source, "tests/a.py")]
    assert found == [("a", "test_one"), ("a", "test_two")]


def test_tests_that_show_the_same_share_a_row_and_no_text_breaks_the_table() -> None:
    page = sections(faults_in(MARKED, "tests/a.py"))
    assert "| The Hub is silent | Exit 5. | [one](../tests/a.py), [two](../tests/a.py) |" in page
    assert r"| The disk \| is full | Exit 4. | [one](../tests/a.py) |" in page
    assert page.count("## ") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        '"hal", "a", "b"',
        '"hub", "a"',
        '"hub", "a", f"{b}"',
        '"hub", "a", "b", "c"',
        '"hub", fault="a"',
    ],
)
def test_a_marker_that_makes_no_row_is_refused_with_its_place(arguments: str) -> None:
    source = f"@pytest.mark.fault({arguments})\ndef test_a(): ...\n"
    with pytest.raises(ValueError, match=r"tests/a\.py, line 1: .*three literal texts"):
        list(faults_in(source, "tests/a.py"))


def test_every_section_has_rows_that_read_alike() -> None:
    faults = all_faults()
    assert {fault.kind for fault in faults} == set(KINDS)
    for fault in faults:
        assert not fault.fault.endswith("."), fault
        assert fault.behaviour.endswith("."), fault
