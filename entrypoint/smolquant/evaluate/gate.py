"""The quality gate, which decides which numbers may be published. It knows neither torch nor files.

There are two kinds of limits. The owner's are options: how much worse a variant may be. The product's own
limit always holds: a variant so far off that something must have gone wrong is never published.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from smolquant.errors import GateError, InputError
from smolquant.record import Metrics
from smolquant.schemes import BOTH, BY_VARIANT, SCHEMES
from smolquant.text import did_you_mean, plain, rounded_up, significant

LARGEST_PLAUSIBLE_KL = 2.0
"""Nats. int4 costs 0.05 to 0.5 on the smallest models, weights read in a wrong layout cost 5 or more."""

_EXAMPLE = ",".join(
    f"{SCHEMES[name].variant}={limit}" for name, limit in zip(BOTH, (1, 12), strict=True)
)
_HOW_TO_WRITE = f"Write it as `5`, or as `{_EXAMPLE}`"

_NUMBER = re.compile(r"\d+(\.\d+)?")

Limits = Mapping[str, float]
"""Variant -> the largest value that may be published; a variant without one is not judged."""


@dataclass(frozen=True)
class Gate:
    """The owner's limits."""

    perplexity_increase: Limits = field(default_factory=dict)
    """Percent."""
    kl: Limits = field(default_factory=dict)
    """Nats."""

    def covers(self, variant: str) -> bool:
        """Whether ``variant`` has a limit, and so has to be measured."""
        return variant in self.perplexity_increase or variant in self.kl


@dataclass(frozen=True)
class Breach:
    """A limit that a variant does not keep, or that there is nothing to hold against."""

    variant: str
    text: str
    """What was measured, and the limit as it was given."""
    option: str
    passes_from: str = ""
    """The least limit that the variant would keep, in three digits; empty where no number would do."""


def parse_limits(text: str, option: str) -> dict[str, float]:
    """``5`` for every variant, or ``int8=1,int4=12`` for those that are named.

    Args:
        option: the option's name, for errors.

    Raises:
        InputError: a limit is not a number of at least 0, or a name is not a variant's.
    """
    if "=" not in text:
        limit = _number(text, option)
        return dict.fromkeys(BY_VARIANT, limit)
    limits: dict[str, float] = {}
    for part in text.split(","):
        variant, _, number = (piece.strip() for piece in part.partition("="))
        if variant not in BY_VARIANT or variant in limits:
            why = "is given twice" if variant in limits else "is not a variant"
            meant = "" if variant in limits else did_you_mean(variant, BY_VARIANT)
            raise InputError(
                f"{option} {text!r}: {variant!r} {why}.",
                hint=f"{meant}{_HOW_TO_WRITE}; variants: {', '.join(BY_VARIANT)}.",
            )
        limits[variant] = _number(number, option)
    return limits


def _number(text: str, option: str) -> float:
    if not _NUMBER.fullmatch(text.strip()):
        raise InputError(
            f"{option}: {text!r} is not a number of at least 0.",
            hint=f"{_HOW_TO_WRITE}.",
        )
    return float(text)


def judge(measured: Mapping[str, Metrics | None], gate: Gate) -> list[Breach]:
    """The limits that variants do not keep, in the variants' order.

    Args:
        measured: each variant of the release; None where it was not measured to the end.
    """
    return [breach for check in _checks(measured, gate) if (breach := check.breach)]


def verdict(measured: Mapping[str, Metrics | None], gate: Gate) -> str:
    """The limits that a release has passed, with the numbers; empty without any limit."""
    return "; ".join(
        f"{check.variant}: {check.measure} {significant(check.value)}{check.unit}, {check.limit_text}"
        for check in _checks(measured, gate)
        if check.value is not None
    )


@dataclass(frozen=True)
class _Check:
    """One limit and the value that is compared with it."""

    variant: str
    option: str
    measure: str
    unit: str
    value: float | None
    limit: float

    @property
    def limit_text(self) -> str:
        """The option as it was given."""
        return f"{self.option} {plain(self.limit)}{self.unit}"

    @property
    def breach(self) -> Breach | None:
        """How the limit is not kept; None where it is."""
        if self.value is None:
            why = f"{self.limit_text} was given, and the variant was not measured"
            return Breach(self.variant, why, self.option)
        if self.value <= self.limit:  # false for NaN, which no limit allows
            return None
        if not math.isfinite(self.value):
            text = f"{self.measure} {self.value}{self.unit}, above {self.limit_text}"
            return Breach(self.variant, text, self.option)
        # All its digits, which tell the two apart: 5.0004 against 5 must not read "5, above 5".
        text = f"{self.measure} {plain(self.value)}{self.unit}, above {self.limit_text}"
        least = f"{rounded_up(self.value)}{self.unit}"
        return Breach(self.variant, text, self.option, least)


def _checks(measured: Mapping[str, Metrics | None], gate: Gate) -> Iterator[_Check]:
    for variant, metrics in measured.items():
        if variant in gate.perplexity_increase:
            yield _Check(
                variant,
                "--max-perplexity-increase",
                "perplexity changed by",
                " %",
                metrics.perplexity_increase_percent if metrics else None,
                gate.perplexity_increase[variant],
            )
        if variant in gate.kl:
            yield _Check(
                variant,
                "--max-kl",
                "mean KL divergence is",
                "",
                metrics.mean_kl if metrics else None,
                gate.kl[variant],
            )


def check_plausible(variant: str, metrics: Metrics) -> None:
    """Refuse a variant that costs more than correct quantization can, whatever the options.

    Raises:
        GateError: the mean KL divergence is beyond :data:`LARGEST_PLAUSIBLE_KL`, or is not a number.
    """
    kl = metrics.mean_kl
    if kl is not None and not kl <= LARGEST_PLAUSIBLE_KL:
        raise GateError(
            f"{variant} has a mean KL divergence of {kl:.4g} from its source, and more than "
            f"{LARGEST_PLAUSIBLE_KL:g} means that something is broken rather than merely rounded.",
            hint="Please report this with the model's name; another scheme may work.",
        )
