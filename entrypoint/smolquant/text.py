"""Small texts for people: sizes, shares, and markdown that holds untrusted ones.

Names and reasons come from a model repository; whatever they hold, they render as plain text.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Decimal
from difflib import get_close_matches
from urllib.parse import quote

from smolquant.secrecy import redact

_ANSI_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours and cursor moves
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)"  # window titles and hyperlinks
    r"|[@-Z\\^_])"
)
# Blank in every font, and skipped when texts are compared, although not of category C.
_BLANKS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0]")
_MARKDOWN_SPECIAL = re.compile(r"[\\`*_\[\]<>|#~&$!]")
_BLOCK_START = re.compile(r"^(?=[-+=])|^(\d+)(?=[.)](?:\s|$))")
_LONGEST_QUOTE = 300
_AUTOLINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)


class Markdown(str):
    """Text that is markdown already and must not be escaped again."""

    __slots__ = ()


def human_size(n_bytes: int) -> str:
    """Bytes in decimal units with three significant digits, as the Hub shows them: ``269 MB``."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    size = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        # 999.5 and more would round to a four-digit number: that is 1.00 of the next unit.
        if size < 999.5 or unit == "TB":
            break
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{decimals}f} {unit}"


def human_duration(seconds: float) -> str:
    """Seconds as ``8.4 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def about(seconds: float) -> str:
    """An estimate of a duration, no more precise than it is: ``a few seconds``, ``about 2 min 30 s``."""
    if seconds < 7.5:
        return "a few seconds"
    if seconds < 57.5:
        return f"about {5 * round(seconds / 5)} s"
    if seconds < 285:
        minutes, rest = divmod(30 * round(seconds / 30), 60)
        return f"about {minutes} min" + (f" {rest} s" if rest else "")
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    hours, minutes = divmod(10 * round(minutes / 10), 60)
    return f"about {hours} h" + (f" {minutes} min" if minutes else "")


def percent(share: float) -> str:
    """A share of one as a percentage with one decimal, ``51.2%``; ``100%`` only where it is all.

    What would be rounded to all, or to nothing, gets the decimals that tell it apart:
    ``percent(0.9996) == "99.96%"``.
    """
    if share == 1:
        return "100%"
    decimals = 1
    while share and f"{share:.{decimals}%}" in {f"{1:.{decimals}%}", f"{0:.{decimals}%}"}:
        decimals += 1
    return f"{share:.{decimals}%}"


def significant(value: float, *, signed: bool = False) -> str:
    """A finite number's three significant digits, never with an exponent: ``0.0000123``, ``0.29``.

    Zero is only zero. ``signed``: a plus before what is not negative.
    """
    rounded = Decimal(f"{value:.2e}").normalize()
    return f"{rounded:+zf}" if signed else f"{rounded:zf}"


def rounded_up(value: float) -> str:
    """A finite number of three significant digits that is not below ``value``: ``37.2`` for 37.15."""
    exact = Decimal(repr(value))
    last_digit = Decimal(1).scaleb(exact.adjusted() - 2)
    return f"{exact.quantize(last_digit, ROUND_CEILING).normalize():zf}"


def plain(value: float) -> str:
    """All the digits of a finite number, never with an exponent: ``0.00005``, ``5``."""
    return f"{Decimal(repr(value)).normalize():zf}"


def visible(text: str) -> str:
    """``text`` without terminal escapes, control, formatting, broken and blank characters.

    Line ends are control characters too: they go.
    """
    shown = _BLANKS.sub("", _ANSI_ESCAPE.sub("", text))
    return "".join(character for character in shown if unicodedata.category(character)[0] != "C")


def one_line(text: str) -> str:
    """The visible part of ``text``, its white space folded to single spaces."""
    return visible(" ".join(text.split()))


def quoted(text: object) -> str:
    """Someone else's words: one line, of 300 characters at most, and without secrets."""
    line = redact(one_line(str(text or "")))  # before it is cut, which might leave a part of one
    return line if len(line) <= _LONGEST_QUOTE else f"{line[:_LONGEST_QUOTE]}…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``Did you mean int4? `` where a known word is much like ``word``, else nothing."""
    by_lower = {one.lower(): one for one in known}
    alike = get_close_matches(word.lower(), by_lower, n=2)
    return one_of([by_lower[one] for one in alike])


def one_of(meant: Sequence[str]) -> str:
    """``Did you mean a or b? ``; nothing where nothing is known that could be meant."""
    return f"Did you mean {' or '.join(map(quoted, meant))}? " if meant else ""


def error_words(error: BaseException) -> str:
    """An error of somebody else's code in a few words, for the middle of a sentence."""
    return quoted(f"{type(error).__name__}: {error}").rstrip(".")


def escape_markdown(text: str) -> Markdown:
    """``text`` as a line of markdown that renders as itself, in a paragraph or a table cell."""
    escaped = _MARKDOWN_SPECIAL.sub(r"\\\g<0>", one_line(text))
    escaped = _AUTOLINK.sub(r"\\\g<0>", escaped)
    # What would open a list or a heading if the text began its line.
    return Markdown(_BLOCK_START.sub(lambda match: (match[1] or "") + "\\", escaped))


def code_span(text: str) -> Markdown:
    """``text`` as inline code, in a paragraph or a table cell; empty for an empty text."""
    line = one_line(text)
    if not line:
        return Markdown("")
    if "|" in line:  # no code span can hold a pipe that is right both inside and outside a table
        return Markdown(f"<code>{escape_markdown(line)}</code>")
    fence = _fence(line, at_least=1)
    padding = " " if line[0] == "`" or line[-1] == "`" else ""
    return Markdown(f"{fence}{padding}{line}{padding}{fence}")


def code_block(text: str, language: str = "") -> Markdown:
    """``text`` as a fenced block of code; lines are kept, invisible characters are not."""
    code = "\n".join(visible(line) for line in text.expandtabs(4).splitlines())
    fence = _fence(code, at_least=3)
    return Markdown(f"{fence}{language}\n{code}\n{fence}")


def link(text: str, url: str | None) -> Markdown:
    """A link to a web address; only the text where ``url`` is None or not http(s).

    ``text`` is escaped unless it is :class:`Markdown`.
    """
    label = text if isinstance(text, Markdown) else escape_markdown(text)
    if url is None or not url.startswith(("https://", "http://")):
        return label
    return Markdown(f"[{label}]({quote(url, safe=':/?#@!$&*+,;=%~')})")


def listed(items: Sequence[Markdown]) -> Markdown:
    """``a``, ``a and b``, ``a, b and c``."""
    head = ", ".join(items[:-1])
    return Markdown(f"{head} and {items[-1]}" if head else "".join(items))


def _fence(code: str, at_least: int) -> str:
    longest_run = max((len(run) for run in re.findall("`+", code)), default=0)
    return "`" * max(at_least, longest_run + 1)
