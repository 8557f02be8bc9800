"""Loads the published fixtures with the libraries at hand, and tells how each variant did, as JSON.

PYTHONPATH=entrypoint:tools python -m compat.prove
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import smolquant
from compat.logits import problem_of, told
from compat.page import CHECKED, LIBRARIES, LOADED, MADE, STOCK
from smolquant.check import check
from smolquant.hub import Hub
from smolquant.record import FORMAT_VERSION
from smolquant.runtime.contents import variants_in
from smolquant.runtime.load import load_for_checking
from smolquant.runtime.plainly import computing_plainly
from smolquant.schemes import BY_VARIANT
from try_dist import EXPECTED, try_here

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures"


@dataclass(frozen=True)
class Proof:
    """How a variant of a fixture did, loaded in one way."""

    format: str
    variant: str
    way: str
    """:data:`MADE`, :data:`LOADED`, :data:`STOCK` or :data:`CHECKED`."""
    problem: str
    """Empty where it gave what is recorded."""


def fixtures() -> list[Path]:
    """Their folders, the oldest format first."""
    return sorted(FIXTURES.glob("format-*"), key=lambda folder: int(folder.name.split("-")[1]))


def plain_logits(folder: Path, variant: str, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) float32 logits of the weights as they are stored, alike on every machine."""
    found: list[torch.Tensor] = []

    def examine(model: Any) -> None:
        with torch.inference_mode(), computing_plainly(model):
            found.append(model(input_ids=ids, use_cache=False).logits[0].clone())

    load_for_checking(folder, variant, report=lambda info: None, examine=examine)
    return found[0]


def made() -> Iterator[Proof]:
    """A small model, quantized and loaded again: int4 has to have the bytes that are recorded."""
    try:
        same = try_here() == EXPECTED
        problem = "" if same else "int4 has other bytes than those recorded"
    except Exception as error:  # whatever the installed libraries raise is the answer
        problem = told(error)
    for variant in ("int8", "int4"):
        yield Proof(f"format-{FORMAT_VERSION}", variant, MADE, problem)


def proofs(fixture: Path) -> Iterator[Proof]:
    """Each variant of a fixture, loaded by smolquant and checked."""
    for one in check(str(fixture), Hub(None)):
        name = one.variant
        problem = problem_of(fixture, name, partial(_loaded, fixture, name))
        yield Proof(fixture.name, name, LOADED, problem)
        yield Proof(fixture.name, name, CHECKED, one.problem)


def _loaded(fixture: Path, variant: str) -> Any:
    return smolquant.load(fixture, variant)[0]


def stock_proofs(fixture: Path) -> Iterator[Proof]:
    """Each variant whose scheme says that transformers alone loads it."""
    variants = [name for name in variants_in(fixture) if BY_VARIANT[name].stock_loads]
    for variant, problem in _stock(fixture, variants).items():
        yield Proof(fixture.name, variant, STOCK, problem)


def _stock(fixture: Path, variants: Sequence[str]) -> Mapping[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "compat.stock", str(fixture), *variants],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main() -> None:
    """Write one object: the versions, and what was found."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = [
        asdict(one) for fixture in fixtures() for one in (*proofs(fixture), *stock_proofs(fixture))
    ]
    found += [asdict(one) for one in made()]
    versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    versions["torch"] = torch.__version__  # with its build, which PyPI's own metadata does not name
    print(json.dumps({"versions": versions, "proofs": found}))


if __name__ == "__main__":
    main()
