"""Loads variants with transformers alone, in a process that knows nothing of smolquant.

    PYTHONPATH=tools python -m compat.stock FIXTURE VARIANT...

Writes an object of JSON: each variant's problem, empty where it gives its recorded logits.
"""

import json
import sys
from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from compat.logits import problem_of


def main() -> None:
    """Load what the arguments name."""
    logging.disable_progress_bar()
    fixture, variants = Path(sys.argv[1]), sys.argv[2:]
    found = {}
    for variant in variants:
        load = partial(AutoModelForCausalLM.from_pretrained, fixture / variant, device_map="cpu")
        found[variant] = problem_of(fixture, variant, load)
    assert "smolquant" not in sys.modules, "transformers was not alone"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
