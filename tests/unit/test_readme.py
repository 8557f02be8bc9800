"""README.md, docs/faults.md and action.yml follow the command, its schemes, docs/ and the tests."""

from pathlib import Path

import pytest

from readme_tables import PAGES, with_blocks
from smolquant.schemes import SCHEMES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_the_written_blocks_are_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert with_blocks(name, text) == text, "run `make docs`"


@pytest.mark.parametrize("name", PAGES)
def test_a_block_that_was_emptied_is_written_again(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    page = PAGES[name]
    emptied = text
    for content in (write() for write in page.blocks.values()):
        assert content in emptied
        emptied = emptied.replace(content, "")
    assert with_blocks(name, emptied) == text


def test_a_lost_marker_is_told_instead_of_writing_nonsense() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="variants:end"):
        with_blocks("action.yml", text.replace("variants:end", ""))


def test_the_readme_names_every_type_and_its_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for quant_type, scheme in SCHEMES.items():
        assert f"| `{quant_type}` | `{scheme.variant}/` |" in text
        assert f"── {scheme.variant}/ " in text
