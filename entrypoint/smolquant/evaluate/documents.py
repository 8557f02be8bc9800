"""The texts to measure and to calibrate on: those that come along, and the owner's, of any size.

A file is read as far as somebody asks for, and as a whole only in passing, for its digest. The bundled
texts are prose in six languages, from other works to measure on than to calibrate on; see text/ORIGIN.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from smolquant.errors import InputError
from smolquant.places import nearby
from smolquant.text import one_of

BUNDLED_NAME = (
    "Apache HTTP Server 2.4.71 documentation, a manual in English, French, German, Spanish and "
    "Portuguese, and NodeSchool workshops in Italian"
)
CALIBRATION_NAME = (
    "Electron documentation of December 2018, a manual in English, French, German, Spanish, Italian and "
    "Portuguese"
)
_EARLIER = frozenset({"fd49bfeb4bb15aec0ca521eca12b6f43f143ec6e0e5e4ba09e2df8e4403bb05c"})
_EARLIER_CALIBRATION = frozenset(
    {
        "3403d7a5c268056560f741dd055f671f38f0af86f30cfb2c5ecfcb8a1eb2ea80",
        "e41aa84b4118c309c2f284d2f21e666f45181b88654635ab29d54100be68c71d",
    }
)
"""Digests of the texts that versions before bundled. A text that is replaced leaves its digest here."""

_BUNDLED = Path(__file__).parent / "text"
_LANGUAGES = ("en", "fr", "de", "es", "it", "pt")

_CHUNK = 1 << 20
"""Characters of a file that are in memory at a time."""
_LONGEST_LINE = 16 << 20
"""Characters of a conversation."""
_LARGEST_LIST = 64_000_000
"""Bytes of a ``.json`` file, all of which has to be in memory to be read."""

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class TextFile:
    """A plain text on the disk."""

    path: Path

    def chunks(self) -> Iterator[str]:
        """The whole text in pieces.

        Raises:
            OSError, UnicodeDecodeError: it cannot be read, or is not UTF-8.
        """
        with self.path.open(encoding="utf-8") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


@dataclass(frozen=True)
class ConversationFile:
    """Conversations on the disk, one a line."""

    path: Path

    def __iter__(self) -> Iterator[Conversation]:
        """Read one after another.

        Raises:
            OSError, ValueError, KeyError, TypeError, RecursionError: a line is not a conversation.
        """
        with self.path.open(encoding="utf-8") as file:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
                if line.strip():
                    yield _conversation(json.loads(line))


@dataclass(frozen=True)
class EvalText:
    """Documents to measure or calibrate on, and what to call them."""

    name: str
    documents: Iterable[str | Conversation | TextFile]
    earlier: frozenset[str] = frozenset()
    """Digests of the texts that had this one's place in earlier versions of smolquant."""

    @cached_property
    def digest(self) -> str:
        """The sha256 of the documents, which does not depend on their name."""
        digest = hashlib.sha256(b"[")
        for number, document in enumerate(self.documents):
            digest.update(b", " if number else b"")
            for piece in _as_json(document):
                digest.update(piece.encode())
        digest.update(b"]")
        return digest.hexdigest()


def _as_json(document: str | Conversation | TextFile) -> Iterator[str]:
    """A document as ``json.dumps`` writes it, in pieces."""
    if not isinstance(document, TextFile):
        yield json.dumps(document)
        return
    yield '"'
    yield from (json.dumps(chunk)[1:-1] for chunk in document.chunks())
    yield '"'


def bundled_text() -> EvalText:
    """The text to measure on that comes with smolquant."""
    return EvalText(BUNDLED_NAME, _bundled(""), _EARLIER)


def bundled_calibration_text() -> EvalText:
    """The text to calibrate on that comes with smolquant; from another work than the one above."""
    return EvalText(CALIBRATION_NAME, _bundled("calibration-"), _EARLIER_CALIBRATION)


def _bundled(prefix: str) -> list[str]:
    return [
        (_BUNDLED / f"{prefix}{language}.txt").read_text(encoding="utf-8")
        for language in _LANGUAGES
    ]


def read_text(path: Path, option: str = "--eval-text") -> EvalText:
    """The owner's text: plain UTF-8, or conversations.

    A ``.json`` file is a list of conversations, a ``.jsonl`` file has one a line: a list of
    ``{"role", "content"}``, or an object that has one as ``messages``. A content is a text, a list of
    ``{"type": "text", "text"}``, or null.

    Args:
        option: the option that named the file.

    Raises:
        InputError: a file that cannot be read, is empty, or is not what its name says.
    """
    try:
        state = path.stat()
        return _read(path, option, (state.st_size, state.st_dev, state.st_ino, state.st_mtime_ns))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{option} {path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            hint=f"{one_of(nearby(str(path)))}Give a UTF-8 text file.",
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{option} {path} is not a list of conversations: {error!r}.",
            hint='Each is a list of {"role": ..., "content": ...}, or has one as "messages".',
        ) from error


@lru_cache(maxsize=4)
def _read(path: Path, option: str, state: tuple[int, ...]) -> EvalText:
    """The text in a file of this size, identity and time; all of it is looked at, and its digest known."""
    plain = TextFile(path)
    if not any(chunk.strip() for chunk in plain.chunks()):
        raise InputError(
            f"{option} {path} is empty.", hint="Leave the option out to use the bundled text."
        )
    if path.suffix == ".json":
        if state[0] > _LARGEST_LIST:
            raise InputError(
                f"{option} {path} is a list of more than {_LARGEST_LIST:,} bytes.",
                hint="Write one conversation a line, as a .jsonl file, which may have any size.",
            )
        entries = json.loads(path.read_text(encoding="utf-8"))
        return EvalText(_named(path, "conversations"), [_conversation(one) for one in entries])
    if path.suffix == ".jsonl":
        text = EvalText(_named(path, "conversations"), ConversationFile(path))
    else:
        text = EvalText(_named(path, "plain text"), [plain])
    text.digest  # noqa: B018 - reads all of it
    return text


def _named(path: Path, kind: str) -> str:
    """What the owner's text is called where its numbers are published: its language is not known."""
    return f"{path.name} ({kind})"


def _conversation(entry: Any) -> Conversation:
    messages = entry["messages"] if isinstance(entry, dict) else entry
    conversation = [
        {"role": _role(turn["role"]), "content": _content(turn["content"])} for turn in messages
    ]
    if not conversation:
        raise ValueError("a conversation without messages")
    for turn in conversation:
        turn["content"].encode()  # half a surrogate pair is no text, and refused as a ValueError
    return conversation


def _role(role: Any) -> str:
    if not isinstance(role, str):
        raise TypeError("a role that is not a text")
    return role


def _content(content: Any) -> str:
    match content:
        case str():
            return content
        case None:  # the turn calls tools
            return ""
        case list():
            return "".join(map(_part, content))
        case _:
            raise TypeError("a content that is neither a text nor a list of parts")


def _part(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case _:
            raise TypeError("a part of a content that is not a text")
