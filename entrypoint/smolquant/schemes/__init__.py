"""The quantization types. One file each: its torchao config, its tensor function, its card text."""

from collections.abc import Iterable

from smolquant.schemes.base import Decision, Keep, Quantize, Scheme
from smolquant.schemes.float8_dynamic import Float8Dynamic
from smolquant.schemes.float8_weight_only import Float8WeightOnly
from smolquant.schemes.int4_weight_only import (
    DEFAULT_INT4_METHOD,
    INT4_METHODS,
    Int4Method,
    Int4WeightOnly,
)
from smolquant.schemes.int8_dynamic import Int8Dynamic
from smolquant.schemes.int8_weight_only import Int8WeightOnly

SCHEMES: dict[str, Scheme] = {
    scheme.quant_type: scheme
    for scheme in (
        Int8WeightOnly(),
        Int4WeightOnly(),
        Int8Dynamic(),
        Float8WeightOnly(),
        Float8Dynamic(),
    )
}
BY_VARIANT: dict[str, Scheme] = {scheme.variant: scheme for scheme in SCHEMES.values()}

BOTH = tuple(name for name, scheme in SCHEMES.items() if scheme.in_both)
"""What ``--quant-type both`` means."""
TABLE_SCHEMES: dict[str, Scheme] = {
    scheme.variant: scheme for scheme in SCHEMES.values() if scheme.stores_tables
}
"""What ``--embeddings`` may name beside ``source``."""


def in_order(variants: Iterable[str]) -> list[str]:
    """Variants in the order of tables: this version's as they stand above, then others by name."""
    known = list(BY_VARIANT)
    return sorted(
        variants, key=lambda name: (known.index(name) if name in known else len(known), name)
    )


def scheme_of(
    quant_type: str,
    *,
    int4_method: Int4Method = DEFAULT_INT4_METHOD,
    calibration: str | None = None,
) -> Scheme:
    """The scheme as a run asks for it; ``calibration`` is the text's sha256, where there is one."""
    if quant_type == Int4WeightOnly.quant_type:
        return Int4WeightOnly(int4_method, calibration=calibration)
    return SCHEMES[quant_type]


__all__ = [
    "BOTH",
    "BY_VARIANT",
    "DEFAULT_INT4_METHOD",
    "INT4_METHODS",
    "SCHEMES",
    "TABLE_SCHEMES",
    "Decision",
    "Int4Method",
    "Keep",
    "Quantize",
    "Scheme",
    "in_order",
    "scheme_of",
]
