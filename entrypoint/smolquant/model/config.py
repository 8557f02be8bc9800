"""Reads a checkpoint's config.json, and refuses one that no machine could build a model of.

The file may come from anybody. A model is built of it without its weights, but every layer is an object, so
numbers that no real model has are refused before that: they would take hours and all the memory there is.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolquant.errors import CheckpointError

_LARGEST_FILE = 10_000_000
"""Bytes; the config of a large vision model with its labels has less than one."""

_MOST_LAYERS = 4_096
"""Twice as many as the deepest experiments have; released models have up to some two hundred."""
_LAYERS = re.compile(r"(?:num|n)_(?:\w+_)?(?:layers?|blocks?)|depths?")

_MOST_EXPERTS = 100_000
"""Families of very small experts have up to some ten thousand."""
_EXPERTS = re.compile(r"(?:num|n)_(?:\w+_)?experts?")

_MOST_IN_A_ROW = 10**8
"""The largest width or vocabulary, each of which is the side of a matrix."""
_WIDTHS = re.compile(r"(?:\w+_)?(?:size|sizes|dim|dims|width|heads|embd|inner|d_model|d_ff)")

_MOST_ENTRIES = 1_000_000
"""The number of entries that a list or a mapping may have, such as the names of labels."""
_ENTRIES = re.compile(r"(?:num|n)_(?:\w+_)?(?:labels|classes|speakers)|feature_size")
"""Numbers of entries that transformers makes up where a config does not list them."""

_SAVE_AGAIN = "Save the model again, or make sure that the file is the one that belongs to it."


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        CheckpointError: it is missing, no JSON object, or asks for what no model has.
    """
    path = folder / "config.json"
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise CheckpointError(f"config.json has {size:,} bytes.", hint=_SAVE_AGAIN)
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            "There is no config.json, so this is not a transformers checkpoint.",
            hint="Name the folder that `save_pretrained` wrote.",
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"config.json cannot be read: {error}.", hint="Save the model again."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not a JSON object.", hint="Save the model again.")
    if not isinstance(config.get("model_type"), str | None):
        raise CheckpointError(
            f"config.json has the model type {config['model_type']!r}, which is no name.",
            hint=_SAVE_AGAIN,
        )
    for name, value in _entries(config):
        _refuse_absurd(name, value)
    return config


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries, those of nested objects and lists too, each by its own or its list's name."""
    waiting = list(config.items())
    while waiting:
        name, value = waiting.pop()
        yield name, value
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((name, item) for item in value)


def _refuse_absurd(name: str, value: Any) -> None:
    if isinstance(value, list | dict):
        number, what = len(value), f"the number of entries of {name!r}"
        most: int | None = _MOST_ENTRIES
    elif isinstance(value, int):
        number, what = value, repr(name)
        most = next((limit for names, limit in _LIMITS if names.fullmatch(name)), None)
    else:
        return
    if most is not None and number > most:
        raise CheckpointError(
            f"config.json asks for what no model has: {what} is {number:,}, and {most:,} is the most.",
            hint=_SAVE_AGAIN,
        )


_LIMITS = (
    (_LAYERS, _MOST_LAYERS),
    (_EXPERTS, _MOST_EXPERTS),
    (_ENTRIES, _MOST_ENTRIES),
    (_WIDTHS, _MOST_IN_A_ROW),
)
