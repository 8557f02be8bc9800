"""What reads the text of an option, and refuses what makes no sense; see :mod:`smolquant.settings`."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smolquant.errors import InputError
from smolquant.evaluate.documents import read_text
from smolquant.evaluate.gate import Limits, parse_limits
from smolquant.schemes import BOTH, BY_VARIANT, SCHEMES
from smolquant.schemes.base import GROUP_SIZES
from smolquant.text import did_you_mean, one_of
from smolquant.tokens import HUB_TOKEN, clean_token

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TAG = re.compile(
    r"(?!.*(\.\.|//|@\{|\.lock$))[^\s~^:?*\[\\\x00-\x1f\x7f/.][^\s~^:?*\[\\\x00-\x1f\x7f]*"
)


def as_given(value: Any) -> Any:
    """The value itself, for what click has read."""
    return value


def read_token(token: str | None) -> str | None:
    """An access token without the white space around it; None for a blank one."""
    return clean_token(token, HUB_TOKEN)


def read_quant_types(text: str) -> tuple[str, ...]:
    """The names of quantization types in a list with commas, ``both`` spelt out."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    expanded = [part for name in names for part in (BOTH if name == "both" else (name,))]
    for name in expanded:
        if name not in SCHEMES:
            raise InputError(
                f"{name!r} is not a quantization type.",
                hint=f"{_meant_by(name)}Known: {', '.join(SCHEMES)}, both, or a comma-separated list.",
            )
    if not expanded:
        raise InputError(
            "No quantization type was named.", hint=f"Known: {', '.join(SCHEMES)}, both."
        )
    return tuple(dict.fromkeys(expanded))


def _meant_by(name: str) -> str:
    variant = BY_VARIANT.get(name.lower())
    return one_of([variant.quant_type]) if variant else did_you_mean(name, (*SCHEMES, "both"))


def read_group_size(group_size: int) -> int:
    """One of the group sizes that there are kernels for."""
    if group_size not in GROUP_SIZES:
        raise InputError(
            f"A group size of {group_size} has no kernel.",
            hint=f"Choose one of {', '.join(map(str, GROUP_SIZES))}.",
        )
    return group_size


def read_size(text: str) -> int:
    """Bytes of a size such as ``1GB``."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size < _UNITS["MB"]:
        raise InputError(
            f"{text!r} is not a shard size of at least 1MB.", hint="Write it as 1GB or 500MB."
        )
    return size


def read_tag(tag: str | None) -> str | None:
    """A name that git takes for a tag."""
    if tag is not None and not _TAG.fullmatch(tag):
        raise InputError(f"{tag!r} is not a valid tag name.", hint="Use a name such as `v1.0`.")
    return tag


def read_text_file(option: str) -> Callable[[str | None], Path | None]:
    """What reads the path of a text file, and refuses one that cannot be read, before any work."""

    def read(name: str | None) -> Path | None:
        if name is None:
            return None
        read_text(Path(name), option)
        return Path(name)

    return read


def read_token_count(tokens: int | None) -> int | None:
    """The number of tokens to measure on."""
    if tokens is not None and tokens < 2:
        raise InputError(
            f"--eval-tokens {tokens} is too few to predict one from another.",
            hint="Give at least 2; the default suits the model's size.",
        )
    return tokens


def read_limits(option: str) -> Callable[[str | None], Limits]:
    """What reads the limits on variants."""
    return lambda text: parse_limits(text, option) if text else {}


def read_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    """Regular expressions, each once."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"--skip {pattern!r} is not a regular expression: {error}.",
                hint=r"Write it as part of a module name, such as `layers\.0\.` or `down_proj$`.",
            ) from error
    return tuple(dict.fromkeys(patterns))
