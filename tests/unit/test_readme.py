"""The README follows the command."""

from pathlib import Path

from options_table import with_table

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_options_is_the_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make docs`"
