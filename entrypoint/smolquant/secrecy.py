"""The secrets that this process was given, and what keeps them out of all that it tells and publishes.

A server, a library or a model's repository may repeat a token in a spelling of its own, so a secret is
looked for as it is, percent-encoded any number of times, in base64, behind backslashes (markdown, JSON,
a repr), and with white space and quotation marks inside it, as lines that are broken or folded leave it.
"""

import base64
import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from smolquant.errors import InputError

REDACTED = "***"

_SHORTEST = 8
"""Characters. A shorter secret is also a common word or a number: it is taken out of what is told where it
stands by itself, and no file is refused for it."""

_LONGEST_PIECE = 64
"""Characters. Of a longer secret its two ends are looked for, and what follows the first is taken out too:
tokens that carry claims have thousands, and are of no use without their ends."""

_TOKEN_SHAPE = re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{16,}[\w.-]*")
"""Anybody's token for the Hub: what a server repeats may be one that it made itself."""

_BETWEEN = r"""(?:[\s"',]|\\+[nrt]|%(?:25)*(?:0[aAdD9]|20))*"""
"""What may stand between two characters of a secret."""

_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "INPUT_HF-TOKEN",
    "TRACKIO_WRITE_TOKEN",
    "HF_OIDC_ID_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
    "ACTIONS_RUNTIME_TOKEN",
    "GITHUB_TOKEN",
)
_ADDRESSES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT")
"""Variables with an address, which may hold a password."""


_given = set[str]()


def remember(secret: str | None) -> None:
    """Keep a secret out of whatever is told or written from now on; several lines are a secret each."""
    lines = (line.strip() for line in (secret or "").split("\n"))
    _given.update(filter(None, lines))


def remember_environment(environ: Mapping[str, str]) -> None:
    """Remember the tokens, and the passwords in addresses, that an environment holds."""
    for name in _VARIABLES:
        remember(environ.get(name))
    for name in _ADDRESSES:
        for spelling in (name, name.lower()):
            remember(_password(environ.get(spelling, "")))


def redact(text: str) -> str:
    """``text`` with ``***`` for every known secret, and for what has the shape of a Hub token."""
    found = _finder(frozenset(_given))
    return _TOKEN_SHAPE.sub(REDACTED, found.sub(REDACTED, text) if found else text)


def holds_secret(content: bytes) -> bool:
    """Whether a file's content holds a known secret that is long enough to be no coincidence."""
    found = _finder(frozenset(secret for secret in _given if len(secret) >= _SHORTEST))
    # A secret is ASCII, so that its bytes are its characters.
    return found is not None and found.search(content.decode("latin-1")) is not None


def refuse_secret(name: str, content: bytes) -> None:
    """Refuse a file that is about to be saved or published, if it holds a known secret.

    Raises:
        InputError: naming the file, and never what it holds.
    """
    if holds_secret(content):
        raise InputError(
            f"{name} holds a token that this run was given; no such file is saved or published.",
            hint="Take it out of the file that it comes from. If others could read that file already, "
            "revoke the token and make another.",
        )


@lru_cache(maxsize=8)
def _finder(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """What finds any of the secrets, in any spelling; None for no secrets.

    It begins with the set of all first characters, from which the engine skips to candidates.
    """
    patterns = list[tuple[str, str]]()  # a first character, and what finds the rest of it
    # The longest first: a secret may be a part of another.
    for secret in sorted(secrets, key=lambda secret: (-len(secret), secret)):
        if len(secret) < _SHORTEST:
            patterns.append((secret[0], _by_itself(secret)))
            continue
        is_long = len(secret) > _LONGEST_PIECE
        rest = r"[^\s\"']*" if is_long else ""
        patterns += [(s[0], _anywhere(s) + rest) for s in _spellings(secret[:_LONGEST_PIECE])]
        if is_long:
            patterns += [(s[0], _anywhere(s)) for s in _spellings(secret[-_LONGEST_PIECE:])]
    if not patterns:
        return None
    first = "".join(sorted({re.escape(character) for character, _ in patterns}))
    return re.compile(f"[%{first}](?:{'|'.join(pattern for _, pattern in patterns)})")


def _by_itself(secret: str) -> str:
    """Finds a secret with neither a letter nor a digit next to it, once its first character is read."""
    first, others = re.escape(secret[0]), re.escape(secret[1:])
    return rf"(?<={first})(?<![^\W_]{first}){others}(?![^\W_])"


def _anywhere(spelling: str) -> str:
    """Finds a spelling, once its first character or the ``%`` before its code is read."""
    begin = rf"(?:(?<={re.escape(spelling[0])})|(?<=%){_code(spelling[0])})"
    others = (rf"{_BETWEEN}\\*(?:{re.escape(one)}|%{_code(one)})" for one in spelling[1:])
    return begin + "".join(others)


def _code(character: str) -> str:
    """A character percent-encoded, in either case and any number of times, after its first ``%``."""
    codes = (f"{byte:02x}" for byte in character.encode(errors="surrogateescape"))
    return "%".join("(?:25)*" + "".join(f"[{d}{d.upper()}]" for d in code) for code in codes)


def _spellings(secret: str) -> list[str]:
    """A secret as it is, and as either alphabet of base64 has it, wherever it begins in what is encoded.

    A character of base64 holds six bits; those at the ends, which hold a neighbour's too, are left out.
    """
    in_base64 = set()
    for before in range(3):
        data = bytes(before) + secret.encode(errors="surrogateescape")
        whole = slice(-(-before * 8 // 6), len(data) * 8 // 6)
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            in_base64.add(encode(data)[whole].decode())
    return [secret, *sorted(in_base64)]


def _password(address: str) -> str | None:
    try:
        return urlsplit(address).password
    except ValueError:  # not an address; whoever uses it will say so
        return None
