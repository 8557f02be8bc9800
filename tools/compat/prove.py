"""Loads the published fixtures with the libraries at hand, and tells how each variant did, as JSON.

PYTHONPATH=entrypoint:tools python -m compat.prove
"""

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import smolquant
from smolquant.check import check
from smolquant.hub import Hub
from smolquant.record import FILE_NAME, VariantRecord
from smolquant.runtime.contents import variants_in
from smolquant.runtime.load import load_for_checking
from smolquant.runtime.plainly import computing_plainly
from smolquant.schemes import BY_VARIANT
from smolquant.text import error_words, one_line

FIXTURES = Path(__file__).resolve().parents[2] / "tests/fixtures"
LOGITS = "logits.safetensors"
IDS = [1, *range(40, 56)]
"""The prompt whose logits are recorded."""

MOST_DIFFERENCE = 0.05
"""Of the logits that kernels compute in bfloat16 from the recorded ones, in the Frobenius norm."""

LOADED = "smolquant.load"
STOCK = "transformers"
CHECKED = "smolquant check"
WAYS = (LOADED, STOCK, CHECKED)


@dataclass(frozen=True)
class Proof:
    """How a variant of a fixture did, loaded in one way."""

    format: str
    variant: str
    way: str
    """One of :data:`WAYS`."""
    problem: str | None
    """Empty where it gave what is recorded; None where that way is not open to its scheme."""


def formats() -> list[Path]:
    """The fixtures' folders, the oldest format first."""
    return sorted(FIXTURES.glob("format-*"), key=lambda folder: int(folder.name.split("-")[1]))


def plain_logits(folder: Path, variant: str, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) float32 logits of the weights as they are stored, on any machine the same."""
    found: list[torch.Tensor] = []

    def examine(model: Any) -> None:
        with torch.inference_mode(), computing_plainly(model):
            found.append(model(input_ids=ids, use_cache=False).logits[0].clone())

    load_for_checking(folder, variant, report=lambda info: None, examine=examine)
    return found[0]


def prove(fixture: Path) -> Iterator[Proof]:
    """Load each variant of a fixture in each way."""
    recorded = load_file(fixture / LOGITS)
    checked = {one.variant: one for one in check(str(fixture), Hub(None))}
    for variant in variants_in(fixture):
        record = VariantRecord.from_json((fixture / variant / FILE_NAME).read_bytes())
        for way in (LOADED, STOCK):
            yield Proof(fixture.name, variant, way, _difference(fixture, variant, way, recorded))
        problem = checked[variant].problem
        if (
            not problem
            and record.behaviour is not None
            and "recorded" not in checked[variant].verdict
        ):
            problem = checked[variant].verdict
        yield Proof(fixture.name, variant, CHECKED, one_line(problem))


def _difference(
    fixture: Path, variant: str, way: str, recorded: Mapping[str, torch.Tensor]
) -> str | None:
    """Why the logits are not the recorded ones; None where the way is not open."""
    try:
        if way == STOCK:
            if not BY_VARIANT[variant].stock_loads:
                return None
            model = _stock(fixture / variant)
        elif BY_VARIANT[variant].cuda_capability is not None:
            model, _ = load_for_checking(fixture, variant, report=lambda info: None)
        else:
            model, _ = smolquant.load(fixture, variant, device="cpu")
        with torch.inference_mode():
            logits = model(input_ids=recorded["ids"].to(model.device), use_cache=False).logits[0]
    except Exception as error:  # whatever the installed libraries raise is the answer
        return one_line(error_words(error))
    expected = recorded[variant]
    difference = float((logits.cpu().float() - expected).norm() / expected.norm())
    if not difference <= MOST_DIFFERENCE:
        return f"its logits are {100 * difference:.1f} % away from the recorded ones"
    return ""


def _stock(folder: Path) -> Any:
    """The variant as stock transformers loads it, by itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def main() -> None:
    """Write one object: the versions, and what was found."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    names = ("torch", "torchao", "transformers", "huggingface_hub")
    json.dump(
        {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in names},
            "proofs": [asdict(one) for fixture in formats() for one in prove(fixture)],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
