"""docs/families.md: the numbers of a sweep, and a row for every family."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from smolquant.schemes import SCHEMES

_MOST_WORDS = 220
"""Characters of a reason in the table."""

_LEAD = """# Families of models

`make families` writes this page. For every model type that transformers calls causal, and every one that
it calls image-text-to-text, it builds a small model with random weights from the family's own default
config, quantizes it as the command does, loads the variant as its card says (stock transformers, or
`smolquant.load` for int4), and compares it with torchao's own quantization of the same layers in memory,
and with the source:

- **works** (with so many weights quantized, where a stack of experts counts as one): the logits are
  torchao's within a thousandth of their norm, the generated tokens are the same, every weight that is not
  quantized is the source's, and no part that sees or hears is quantized.
- **refused**: the command says why and makes nothing. "stock too" means that transformers and torchao by
  themselves cannot quantize, save, load and run the model either.
- **wrong**: a variant was made, and it is not that.
- **cannot be built**: transformers makes no small model of the default config that runs on tokens alone or
  with a picture made by hand; nothing is known of the family.

A released checkpoint can still differ from its family's default config; the command tries every model's own
config on a small model first.
"""


def text(results: Sequence[Mapping[str, Any]], quant_types: Sequence[str]) -> str:
    """The page.

    Args:
        results: what :func:`families.prove.prove` has returned, or why it did not.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torchao", "torch"))
    parts = [_LEAD, f"With {versions}.\n"]
    for mapping, title in (
        ("causal", "Causal language models"),
        ("image-text-to-text", "Models that answer about pictures"),
    ):
        own = [one for one in results if one["key"].startswith(f"{mapping}/")]
        parts.append(f"## {title}\n\n{_numbers(own, quant_types)}\n{_table(own, quant_types)}")
    return "\n".join(parts)


def counts(results: Sequence[Mapping[str, Any]], quant_type: str) -> dict[str, int]:
    """How many families work, are refused (for a reason of stock's or not), wrong, or unknown."""
    found = dict.fromkeys(("works", "refused", "refused, stock runs it", "wrong", "not built"), 0)
    for one in results:
        found[_verdict(one, quant_type)] += 1
    return found


def _verdict(one: Mapping[str, Any], quant_type: str) -> str:
    outcome = one["outcomes"].get(quant_type)
    if outcome is None:
        return "not built"
    if outcome["verdict"] == "refused" and not outcome["stock"]:
        return "refused, stock runs it"
    return str(outcome["verdict"])


def _numbers(results: Sequence[Mapping[str, Any]], quant_types: Sequence[str]) -> str:
    rows = [
        "| | types | works | refused | refused, though stock runs it | wrong | cannot be built |"
    ]
    rows.append("| :-- | --: | --: | --: | --: | --: | --: |")
    for quant_type in quant_types:
        found = counts(results, quant_type)
        cells = " | ".join(str(number) for number in found.values())
        rows.append(f"| {SCHEMES[quant_type].variant} | {len(results)} | {cells} |")
    return "\n".join(rows) + "\n"


def _table(results: Sequence[Mapping[str, Any]], quant_types: Sequence[str]) -> str:
    variants = " | ".join(SCHEMES[quant_type].variant for quant_type in quant_types)
    rows = [f"| type | class | {variants} | |", "| :-- | :-- |" + " :-- |" * (len(quant_types) + 1)]
    for one in results:
        cells = " | ".join(_cell(one, quant_type) for quant_type in quant_types)
        name = one["key"].partition("/")[2]
        rows.append(f"| {name} | {one['class']} | {cells} | {_remark(one)} |")
    return "\n".join(rows) + "\n"


def _cell(one: Mapping[str, Any], quant_type: str) -> str:
    outcome = one["outcomes"].get(quant_type)
    if outcome is None:
        return "–"
    if outcome["verdict"] == "works":
        return f"works, {outcome['quantized']} weights"
    return str(outcome["verdict"])


def _remark(one: Mapping[str, Any]) -> str:
    """Why something does not work, once where all schemes agree; else what was looked at."""
    if unknown := one.get("broke") or one.get("cannot_build"):
        return _short(f"cannot be built: {unknown}")
    reasons = dict.fromkeys(
        _short(outcome["reason"]) + (" (stock too)" if outcome["stock"] else "")
        for outcome in one["outcomes"].values()
        if outcome["reason"]
    )
    sees = one["key"].startswith("image")
    return "; ".join(reasons) or ("with a picture" if one["image"] else "text only" if sees else "")


def _short(reason: str) -> str:
    plain = " ".join(reason.split()).replace("|", "\\|").rstrip(".")
    return plain if len(plain) <= _MOST_WORDS else f"{plain[:_MOST_WORDS]}…"
