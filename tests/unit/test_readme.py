"""The README follows the command, and what was measured."""

from pathlib import Path

from readme_tables import with_tables

README = Path(__file__).parents[2] / "README.md"


def test_the_tables_are_the_commands_and_the_benchs() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `make docs`"
