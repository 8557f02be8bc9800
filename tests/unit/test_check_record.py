"""What `smolquant check` says of variants that need not be loaded to be known as broken."""

from dataclasses import replace
from pathlib import Path

import pytest

from smolquant.check import _misfits, check
from smolquant.hub import Hub
from smolquant.record import FILE_NAME, TensorRecord
from unit.report_samples import variant_record


@pytest.mark.fault(
    "record",
    "`check` finds a record that is none, or another variant's",
    "It is that variant's problem; the others are checked.",
)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (variant_record("int8").to_json().encode(), "that of 'int8'"),
        (b"\xff not text", "not a readable quantization.json"),
    ],
)
def test_a_record_that_is_none_or_another_variants_is_a_problem_of_its_variant_alone(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    for variant, record in {
        "int4": content,
        "int8": variant_record("int8").to_json().encode(),
    }.items():
        (tmp_path / variant).mkdir()
        (tmp_path / variant / FILE_NAME).write_bytes(record)
    found = {one.variant: one.problem for one in check(str(tmp_path), Hub(None))}
    assert problem in found["int4"]
    assert found["int8"] == "model.safetensors is missing."


def test_tensors_that_a_variant_carries_along_are_not_too_many() -> None:
    record = replace(
        variant_record("int8"), tensors={"mtp.x": TensorRecord(False, 8, 8, reason="carried along")}
    )
    assert not list(_misfits({"missing_keys": [], "unexpected_keys": {"mtp.x"}}, record))
    (problem,) = _misfits({"missing_keys": [], "unexpected_keys": {"mtp.x", "y"}}, record)
    assert "no place for, 'y' among them" in problem
