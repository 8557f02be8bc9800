"""The logits that are recorded beside a fixture's variants, and how a model's are compared with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LOGITS = "logits.safetensors"
"""In a fixture's folder: the prompt's ids, and of each variant the (tokens, vocabulary) float32 logits of
its weights as they are stored."""

MOST_DIFFERENCE = 0.1
"""Of logits computed in bfloat16 from the recorded ones, in the Frobenius norm. On weights as random as
these, quantizing the inputs to int8 makes 6 %; scales in the wrong places make half and more."""


def problem_of(fixture: Path, variant: str, load: Callable[[], Any]) -> str:
    """Why a variant does not give its recorded logits; empty where it does.

    Args:
        load: loads the model.
    """
    recorded = load_file(fixture / LOGITS)
    try:
        model = load()
        with torch.inference_mode():
            logits = model(input_ids=recorded["ids"].to(model.device), use_cache=False).logits[0]
    except Exception as error:  # whatever the installed libraries raise is the answer
        return told(error)
    expected = recorded[variant]
    difference = float((logits.cpu().float() - expected).norm() / expected.norm())
    if not difference <= MOST_DIFFERENCE:
        return f"its logits are {100 * difference:.1f} % away from the recorded ones"
    return ""


def told(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
