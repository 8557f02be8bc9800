"""What the Hub reads in a README: its YAML front matter, and what it finds wrong with it."""

import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")


def front_matter(readme: str) -> dict[str, Any] | None:
    """The card's metadata, None if it has none; ValueError if it is not a YAML mapping."""
    match = _FRONT_MATTER.match(readme)
    if match is None:
        return None
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"YAML metadata cannot be read: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError("YAML metadata must be a mapping")
    return data


def problems(readme: str) -> tuple[list[str], list[str]]:
    """Errors, for which the Hub refuses a card, and warnings."""
    try:
        data = front_matter(readme)
    except ValueError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    if any(not _REPO_ID.fullmatch(str(name)) for name in _listed(data.get("base_model"))):
        errors.append('"base_model" with the value of one or more invalid repo ids')
    if data.get("base_model_relation", "quantized") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    if any(not isinstance(tag, str) for tag in _listed(data.get("tags"))):
        errors.append('"tags" must be an array of strings')
    for index, result in enumerate(_listed(data.get("model-index"))):
        if not isinstance(result, dict) or not {"name", "results"} <= result.keys():
            errors.append(f'"model-index[{index}]" must have a name and results')
    return errors, []


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
