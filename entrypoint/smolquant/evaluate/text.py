"""The text to measure or calibrate on, cut into windows of tokens that are the same on every run.

Windows are taken from the documents in turn, so that few tokens are as multilingual as many. A document is
tokenized as far as it is needed, however long it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.errors import CheckpointError, InputError
from smolquant.evaluate.bounded import at
from smolquant.evaluate.documents import Conversation, EvalText, TextFile
from smolquant.text import one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

WINDOW = 512
"""Tokens that see each other: long enough for context to matter, short enough to keep memory low."""

_DEFAULT_TOKENS = ((8_000_000_000, 2_048),)
"""Each model size up to which a number of tokens is the default, in parameters, and that number."""
_DEFAULT_TOKENS_OF_LARGEST = 1_024

_LONGEST_QUOTE = 200

_CHARACTERS_AT_FIRST = 16
"""A token has about four characters, and a text with fewer is read on."""
_MOST_CHARACTERS = 16_000_000
_CUT_TOKENS = 64
"""Tokens that the end of a text may change, if it is cut."""

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""Package -> a module of it."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "The tokenizer")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")

_SHORT_CONVERSATIONS: tuple[Conversation, ...] = (
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye!"},
    ],
    [{"role": "user", "content": "Hello!"}],
)
"""What a template should be able to render: with all roles, or, where it knows no system, with one."""


def default_tokens(parameters: int) -> int:
    """The number of tokens that a model with so many parameters is measured on.

    It depends on the model alone, so that a release is comparable with the one before it wherever either
    was made. Measuring takes minutes on a hosted runner, with fewer tokens where each costs more.
    """
    for most, tokens in _DEFAULT_TOKENS:
        if parameters <= most:
            return tokens
    return _DEFAULT_TOKENS_OF_LARGEST


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    at(_first_of(folder, _TOKENIZERS))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers raises what a missing or broken file makes it raise
        hint = (
            "Save the tokenizer beside the model. A run without one can use no limits, no --evaluate "
            "always and no --int4-method calibrated."
        )
        reason = one_line(str(error))
        if missing := _missing_packages(folder):
            # transformers then tries to read it as another format, and names that one's package.
            reason = (
                f"it is a .model file alone, and {' and '.join(missing)}, with which transformers "
                "reads one, cannot be imported."
            )
            hint = f"Install it: `pip install {' '.join(missing)}`."
        raise CheckpointError(
            "The checkpoint's tokenizer cannot be loaded, and without one there are no tokens: "
            f"{reason}",
            hint=hint,
        ) from error
    return tokenizer


def _first_of(folder: str | Path, names: Sequence[str]) -> str:
    """The first of these files that is in ``folder``, or else the last name."""
    return next((name for name in names if (Path(folder) / name).is_file()), names[-1])


def _missing_packages(folder: Path) -> list[str]:
    """The packages to install for a tokenizer that sentencepiece alone describes."""
    names = {path.name for path in folder.glob("*.model")} - {"tiktoken.model"}
    if not names or (folder / "tokenizer.json").is_file():
        return []
    return [name for name, module in _SENTENCEPIECE.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module would be in
        return False


def token_windows(
    text: EvalText,
    tokenizer: "PreTrainedTokenizerBase",
    tokens: int,
    *,
    longest: int = WINDOW,
    exact: bool = False,
) -> "torch.Tensor":
    """The first ``tokens`` tokens of ``text``, in as few windows of equal length as hold them.

    Where ``tokens`` is no multiple of that length, fewer than one a window are left out. Every window
    begins as the tokenizer begins a text (a beginning-of-sequence token where it has one), since models
    are far off without it. Conversations follow each other as the chat template renders them, or as
    plain text where there is no template.

    Args:
        longest: tokens that the model can see at once; windows have :data:`WINDOW` at most.
        exact: refuse a text that fills fewer windows; otherwise all there is is taken, in windows as
            long as they can be.

    Returns:
        (windows, window length) int64 token ids.

    Raises:
        InputError: too little text, or conversations that the chat template refuses.
    """
    import torch

    opening = _opening(tokenizer)
    enough = tokens + WINDOW
    sequences = [_beginning(pieces, tokenizer, enough) for pieces in _streams(text, tokenizer)]
    longest_sequence = max((len(_opened(ids, opening)) for ids in sequences), default=0)
    # A window of one token has nothing to predict.
    most = max(2, min(WINDOW, longest, longest_sequence))
    count = -(-tokens // most)
    length = max(2, tokens // count)
    windows = _interleaved(sequences, opening, length, count)
    if not windows or (exact and len(windows) < count):
        raise InputError(
            f"{text.name} has {sum(map(len, sequences))} tokens in this model's vocabulary, which make "
            f"{len(windows) * length} in whole windows of {length}: fewer than the "
            f"{tokens if exact else 2} that are needed.",
            hint="Give a longer text" + (", or a smaller --eval-tokens." if exact else "."),
        )
    if len(windows) < count:
        windows = _interleaved(sequences, opening, most, count)
    return torch.tensor(windows, dtype=torch.int64)


def require_known(
    windows: "torch.Tensor", tokenizer: "PreTrainedTokenizerBase", known: int
) -> None:
    """Make sure that a model has a row for every token of the text, and of its own chat template.

    Args:
        windows: token ids, any shape.
        known: the number of ids, from 0 on, that the model has rows for.

    Raises:
        CheckpointError: it does not, with the largest id and the number of rows.
    """
    if windows.numel() and int(windows.max()) >= known:
        raise _beyond("The tokenizer", int(windows.max()), tokenizer, known)
    of_template = max(_ids_of_template(tokenizer), default=0)
    if of_template >= known:
        raise _beyond("The chat template", of_template, tokenizer, known)


def unknown_tokens(tokenizer: "PreTrainedTokenizerBase", known: int) -> list[str]:
    """The tokens of a vocabulary that a model has no row for, in the order of their ids."""
    ids = {index: token for token, index in tokenizer.get_vocab().items() if index >= known}
    return [ids[index] for index in sorted(ids)]


def _ids_of_template(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of a short conversation; none where there is no template, or it wants another one."""
    if not tokenizer.chat_template:
        return []
    at(_first_of(tokenizer.name_or_path, _TEMPLATES))
    for conversation in _SHORT_CONVERSATIONS:
        try:
            text = tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
            return _encode(str(text), tokenizer)
        except MemoryError:
            raise
        except Exception:  # noqa: S112 - a template is the model's code: it raises what it likes
            continue
    return []


def _beyond(
    what: str, largest: int, tokenizer: "PreTrainedTokenizerBase", known: int
) -> CheckpointError:
    return CheckpointError(
        f"{what} yields token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the "
        f"model's table of tokens has {known} rows, for the ids 0 to {known - 1}.",
        hint="Resize the table and save the model again (`model.resize_token_embeddings("
        "len(tokenizer))`, before training), or save the tokenizer that belongs to the model beside it.",
    )


def _streams(text: EvalText, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Iterator[str]]:
    """Documents in pieces; all conversations as one, since each alone may be shorter than a window."""
    for document in text.documents:
        if isinstance(document, str):
            yield iter([document])
        elif isinstance(document, TextFile):
            yield document.chunks()
        else:
            yield _conversations(text, tokenizer)
            return


def _conversations(text: EvalText, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """All conversations, as the chat template renders them, or as plain text where there is none."""
    conversations = (document for document in text.documents if isinstance(document, list))
    if tokenizer.chat_template:
        for number, conversation in enumerate(conversations, 1):
            yield _rendered(conversation, f"conversation {number} of {text.name}", tokenizer)
        return
    gap = ""
    for turn in chain.from_iterable(conversations):
        yield gap + turn["content"]
        gap = "\n\n"


def _beginning(
    pieces: Iterator[str], tokenizer: "PreTrainedTokenizerBase", enough: int
) -> list[int]:
    """The first ``enough`` tokens of a text, or all where it has fewer.

    What is tokenized ends a little behind them, since the last word may be cut. A text that needs more than
    :data:`_MOST_CHARACTERS`, of which most tokens have one to ten, is taken to end there.
    """
    head, wanted = "", _CHARACTERS_AT_FIRST * enough
    most = max(_MOST_CHARACTERS, 2 * wanted)
    while True:
        head, ended = _longer(head, pieces, wanted)
        ids = _encode(head[:wanted], tokenizer)
        is_whole = ended and len(head) <= wanted
        if is_whole or len(ids) >= enough + _CUT_TOKENS or wanted >= most:
            return ids[:enough]
        wanted = min(4 * wanted, most)


def _longer(head: str, pieces: Iterator[str], wanted: int) -> tuple[str, bool]:
    """``head`` with as many pieces as make it ``wanted`` characters long, and whether there are no more."""
    parts, length = [head], len(head)
    while length < wanted:
        piece = next(pieces, None)
        if piece is None:
            return "".join(parts), True
        parts.append(piece)
        length += len(piece)
    return "".join(parts), False


def _rendered(conversation: Conversation, name: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    at(_first_of(tokenizer.name_or_path, _TEMPLATES))
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except MemoryError:
        raise
    except Exception as error:  # a template is the model's code: it raises what it likes
        said = one_line(str(error)) or type(error).__name__
        if len(said) > _LONGEST_QUOTE:
            said = f"{said[:_LONGEST_QUOTE]}…"
        raise InputError(
            f'The model\'s chat template refuses {name}, saying "{said}".',
            hint="Write the conversations as the template takes them, or give plain text.",
        ) from error


def _interleaved(
    sequences: Iterable[list[int]], opening: list[int], length: int, count: int
) -> list[list[int]]:
    """The first ``count`` windows, from each sequence in turn; fewer where there are no more."""
    cut = zip_longest(*(_cut(ids, opening, length) for ids in sequences))
    return list(islice(filter(None, chain.from_iterable(cut)), count))


def _cut(ids: list[int], opening: list[int], length: int) -> Iterator[list[int]]:
    """Windows of ``length``, one after another, without the rest that does not fill one."""
    start = 0
    while True:
        taken = ids[start : start + length]
        window = _opened(taken, opening)[:length]
        if len(window) < length:
            return
        yield window
        start += length if window == taken else length - len(opening)


def _opened(ids: list[int], opening: list[int]) -> list[int]:
    """``ids`` behind ``opening``; as they are where a chat template has printed it there already."""
    return ids if ids[: len(opening)] == opening else [*opening, *ids]


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    at(_first_of(tokenizer.name_or_path, _TOKENIZERS))
    encoded: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    start = tokenizer("")["input_ids"][:1]
    return list(start) if start == [tokenizer.bos_token_id] else []
