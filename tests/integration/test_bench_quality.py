"""What docs/quality.md says of the default int4 holds, by the code that made its tables."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import quality
from smolquant.evaluate.documents import bundled_text
from smolquant.evaluate.text import token_windows
from smolquant.schemes import SCHEMES, scheme_of


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[quality.Bench]:
    windows = token_windows(bundled_text(), AutoTokenizer.from_pretrained(smollm2), 512)
    yield quality.Bench(smollm2, windows, torch.empty(0, 512, dtype=torch.int64))


def test_the_search_costs_less_than_rounding_and_no_more_than_hqq(bench: quality.Bench) -> None:
    rtn = scheme_of("int4_weight_only", int4_method="rtn")
    search = SCHEMES["int4_weight_only"]
    methods = {
        "rtn": quality.by_scheme(rtn, 64),
        "search": quality.by_scheme(search, 64, bench.input_mean_squares),
        "hqq": quality.each(quality.by_hqq(64)),
    }
    measured = {name: bench.measure("int4", "64", name, find) for name, find in methods.items()}
    kl = {method: row.kl for method, row in measured.items()}
    assert kl["search"] <= 0.85 * kl["rtn"], kl
    assert kl["search"] <= kl["hqq"], kl
    assert {round(row.bits, 3) for row in measured.values()} == {4.5}


def test_int8_is_measured_too(bench: quality.Bench) -> None:
    row = bench.measure("int8", "row", "", quality.by_scheme(SCHEMES["int8_weight_only"], 0))
    assert 0 < row.kl < 0.01
    assert row.cells().startswith("| int8 | row |  | 8.06 | 0.00")
