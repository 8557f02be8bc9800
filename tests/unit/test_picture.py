"""The part of a card that `make picture` draws is there in the cards that are written."""

import pytest

from picture import shown_part
from unit.test_cards import METRICS, record, root


def test_the_table_and_the_picture_are_shown_and_the_advice_is_not() -> None:
    part = shown_part(root("---\nlicense: mit\n---\n# Mine\n", record(metrics=METRICS)))
    assert part.startswith("## Quantized variants")
    assert "| Variant |" in part
    assert "smolquant-variants.svg" in part
    assert "Mine" not in part
    assert "Which one to choose" not in part


def test_a_card_of_another_form_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="Quantized variants"):
        shown_part("# Mine\n")
