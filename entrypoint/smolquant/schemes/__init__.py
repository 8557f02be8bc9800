"""The quantization types. One file each: its torchao config, its tensor function, its card text."""

from smolquant.schemes.base import Decision, Keep, Quantize, Scheme
from smolquant.schemes.int4_weight_only import Int4WeightOnly
from smolquant.schemes.int8_dynamic import Int8Dynamic
from smolquant.schemes.int8_weight_only import Int8WeightOnly

SCHEMES: dict[str, Scheme] = {
    scheme.quant_type: scheme for scheme in (Int8WeightOnly(), Int4WeightOnly(), Int8Dynamic())
}
BY_VARIANT: dict[str, Scheme] = {scheme.variant: scheme for scheme in SCHEMES.values()}

BOTH = ("int8_weight_only", "int4_weight_only")
"""What ``--quant-type both`` means."""

__all__ = ["BOTH", "BY_VARIANT", "SCHEMES", "Decision", "Keep", "Quantize", "Scheme"]
