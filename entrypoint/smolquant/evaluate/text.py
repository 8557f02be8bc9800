"""What is measured or calibrated on: a text, cut into windows of tokens that are the same on every run.

The bundled texts are prose in six languages, from one book to measure on and from another to calibrate on;
see text/ORIGIN. Windows are taken from the languages in turn, so that few tokens are as multilingual as
many.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BUNDLED_NAME = "Debian Reference 2.100, six languages"
CALIBRATION_NAME = "Debian GNU/Linux Installation Guide 20230508, six languages"
WINDOW = 512
"""Tokens that see each other: long enough for context to matter, short enough to keep memory low."""

_BUNDLED = Path(__file__).parent / "text"
_LANGUAGES = ("en", "fr", "de", "es", "it", "pt")
_LADDER = (
    (1_000_000_000, 4_096),
    (8_000_000_000, 2_048),
)
"""Parameters up to which so many tokens are taken."""
_FEWEST = 1_024

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class EvalText:
    """Documents to measure or calibrate on, and what to call them."""

    name: str
    documents: Sequence[str | Conversation]

    @property
    def digest(self) -> str:
        """Of the documents, whatever they are called."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def default_tokens(parameters: int) -> int:
    """How many tokens a model with so many parameters is measured on.

    A fixed ladder, so that a release is comparable with the one before it wherever either was made:
    minutes on a hosted runner, fewer tokens where each costs more.
    """
    for most, tokens in _LADDER:
        if parameters <= most:
            return tokens
    return _FEWEST


def bundled_text() -> EvalText:
    """The text to measure on that comes with smolquant."""
    return EvalText(BUNDLED_NAME, _bundled(""))


def bundled_calibration_text() -> EvalText:
    """The text to calibrate on that comes with smolquant; from another book than the one above."""
    return EvalText(CALIBRATION_NAME, _bundled("calibration-"))


def _bundled(prefix: str) -> list[str]:
    return [
        (_BUNDLED / f"{prefix}{language}.txt").read_text(encoding="utf-8")
        for language in _LANGUAGES
    ]


def read_text(path: Path, option: str = "--eval-text") -> EvalText:
    """The owner's text: plain UTF-8, or conversations.

    A ``.json`` file is a list of conversations, a ``.jsonl`` file has one a line: a list of
    ``{"role", "content"}``, or an object that has one as ``messages``.

    Args:
        option: that named the file.

    Raises:
        InputError: a file that cannot be read, is empty, or is not what its name says.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{option} {path} cannot be read: {error}.", hint="Give a UTF-8 text file."
        ) from error
    if not content.strip():
        raise InputError(f"{option} {path} is empty.", hint="Leave it out for the bundled text.")
    if path.suffix not in {".json", ".jsonl"}:
        return EvalText(path.name, [content])
    try:
        entries = (
            json.loads(content)
            if path.suffix == ".json"
            else [json.loads(line) for line in content.splitlines() if line.strip()]
        )
        return EvalText(path.name, [_conversation(entry) for entry in entries])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{option} {path} is not a list of conversations: {error!r}.",
            hint='Each is a list of {"role": ..., "content": ...}, or has one as "messages".',
        ) from error


def _conversation(entry: Any) -> Conversation:
    messages = entry["messages"] if isinstance(entry, dict) else entry
    conversation = [
        {"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages
    ]
    if not conversation:
        raise ValueError("a conversation without messages")
    return conversation


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises what a missing or broken file makes it raise
        raise CheckpointError(
            f"The checkpoint's tokenizer cannot be loaded, and without one there are no tokens: {error}",
            hint="Save the tokenizer beside the model. Without one: --evaluate never, and no "
            "--int4-method calibrated.",
        ) from error
    return tokenizer


def token_windows(
    text: EvalText,
    tokenizer: "PreTrainedTokenizerBase",
    tokens: int,
    *,
    longest: int = WINDOW,
    exact: bool = False,
) -> "torch.Tensor":
    """The first ``tokens`` tokens of ``text``, rounded down to whole windows.

    Every window begins as the tokenizer begins a text (a beginning-of-sequence token where it has
    one), since models are far off without it. Conversations follow each other as the chat template
    renders them, or as plain text where there is no template.

    Args:
        longest: tokens that the model can see at once; windows have :data:`WINDOW` at most.
        exact: refuse a text that has fewer tokens; otherwise all there are is taken.

    Returns:
        (windows, window length) int64 token ids.

    Raises:
        InputError: too little text.
    """
    import torch

    opening = _opening(tokenizer)
    sequences = [_encode(document, tokenizer) for document in _streams(text, tokenizer)]
    available = sum(map(len, sequences))
    if available < 2 or (exact and available < tokens):
        raise InputError(
            f"{text.name} has {available} tokens in this model's vocabulary, "
            f"fewer than the {max(tokens, 2)} that are wanted.",
            hint="Give a longer text, or a smaller --eval-tokens.",
        )
    length = min(WINDOW, longest, tokens, max(map(len, sequences)) + len(opening))
    step = length - len(opening)
    cut = [
        [[*opening, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
        for ids in sequences
    ]
    in_turn = [window for window in chain.from_iterable(zip_longest(*cut)) if window]
    return torch.tensor(in_turn[: max(1, tokens // length)], dtype=torch.int64)


def _streams(text: EvalText, tokenizer: "PreTrainedTokenizerBase") -> Iterable[str]:
    """Documents as they are; all conversations as one, since each alone may be shorter than a window."""
    yield from (document for document in text.documents if isinstance(document, str))
    conversations = [document for document in text.documents if not isinstance(document, str)]
    if not conversations:
        return
    if tokenizer.chat_template:
        yield "".join(
            str(tokenizer.apply_chat_template(conversation, tokenize=False))
            for conversation in conversations
        )
    else:
        yield "\n\n".join(turn["content"] for messages in conversations for turn in messages)


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    encoded: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    start = tokenizer("")["input_ids"][:1]
    return list(start) if start == [tokenizer.bos_token_id] else []
