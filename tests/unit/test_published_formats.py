"""What was published in each format so far still loads, and gives what was recorded."""

import json
from pathlib import Path

import pytest

from compat.page import CHECKED, LOADED
from compat.prove import fixtures, proofs
from smolquant.record import FILE_NAME, FORMAT_VERSION
from smolquant.runtime.contents import variants_in


def test_every_format_so_far_has_a_fixture() -> None:
    names = [f"format-{number}" for number in range(1, FORMAT_VERSION + 1)]
    assert [fixture.name for fixture in fixtures()] == names
    for fixture, number in zip(fixtures(), range(1, FORMAT_VERSION + 1), strict=True):
        for variant in variants_in(fixture):
            raw = json.loads((fixture / variant / FILE_NAME).read_bytes())
            assert raw["format_version"] == number


@pytest.mark.parametrize("fixture", fixtures(), ids=lambda fixture: fixture.name)
def test_a_published_variant_gives_what_was_recorded(fixture: Path) -> None:
    found = list(proofs(fixture))
    assert {one.way for one in found} == {LOADED, CHECKED}
    assert {one.variant for one in found} >= {"int8", "int4", "int8_dynamic", "float8"}
    assert not [one for one in found if one.problem]
