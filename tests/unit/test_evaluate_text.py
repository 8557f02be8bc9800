"""Texts are cut into the same windows on every run, in every language's turn."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from smolquant.errors import InputError
from smolquant.evaluate.text import (
    WINDOW,
    EvalText,
    bundled_text,
    default_tokens,
    read_text,
    token_windows,
)

BOS = 1


def tokenizer(*, opening: bool = False) -> PreTrainedTokenizerFast:
    """``w7`` is token 7."""
    vocabulary = {f"w{i}": i for i in range(5000) if i != BOS} | {"<s>": BOS}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    if opening:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def words(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_the_bundled_text_is_six_languages_without_repetition() -> None:
    documents = bundled_text().documents
    assert len(documents) == 6
    paragraphs = [p for text in documents for p in str(text).strip().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert all(20_000 < len(text) < 30_000 for text in documents)
    for text, word in zip(documents, ("the", "les", "und", "los", "della", "não"), strict=True):
        assert f" {word} " in text


def test_documents_take_turns() -> None:
    text = EvalText("two", [words(100, 20), words(200, 8)])
    windows = token_windows(text, tokenizer(), 16, longest=4)
    assert windows[:, 0].tolist() == [100, 200, 104, 204]
    assert windows[0].tolist() == [100, 101, 102, 103]


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    text = EvalText("two", [words(100, 40), words(200, 40)])
    short = token_windows(text, tokenizer(), 12, longest=4)
    long = token_windows(text, tokenizer(), 40, longest=4)
    assert torch.equal(long[: len(short)], short)


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    windows = token_windows(
        EvalText("one", [words(100, 20)]), tokenizer(opening=True), 12, longest=4
    )
    assert windows.tolist() == [[BOS, 100, 101, 102], [BOS, 103, 104, 105], [BOS, 106, 107, 108]]


def test_windows_are_no_longer_than_the_text_the_model_or_the_tokens_asked_for() -> None:
    long = EvalText("long", [words(100, 2000)])
    assert token_windows(long, tokenizer(), 1500).shape == (2, WINDOW)
    assert token_windows(long, tokenizer(), 1500, longest=100).shape == (15, 100)
    assert token_windows(long, tokenizer(), 30).shape == (1, 30)
    assert token_windows(EvalText("short", [words(100, 9)]), tokenizer(), 1000).shape == (1, 9)


def test_too_little_text_is_refused_where_so_much_was_asked_for() -> None:
    text = EvalText("mine.txt", [words(100, 50)])
    with pytest.raises(InputError, match=r"mine\.txt has 50 tokens.* the 1000 "):
        token_windows(text, tokenizer(), 1000, exact=True)
    with pytest.raises(InputError, match="has 1 tokens"):
        token_windows(EvalText("mine.txt", ["w5"]), tokenizer(), 1000)


def test_the_ladder_falls_with_size() -> None:
    sizes = (135_000_000, 500_000_000, 1_500_000_000, 3_100_000_000, 14_000_000_000, 70_000_000_000)
    ladder = [default_tokens(size) for size in sizes]
    assert ladder == sorted(ladder, reverse=True)
    assert ladder[0] > ladder[-1]
    assert all(tokens % WINDOW == 0 for tokens in ladder)


CHAT = [{"role": "user", "content": "w100 w101"}, {"role": "assistant", "content": "w102 w103"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chats.json", json.dumps([CHAT, {"messages": CHAT}])),
        ("chats.jsonl", f"{json.dumps(CHAT)}\n\n{json.dumps({'messages': CHAT})}\n"),
    ],
)
def test_conversations_are_rendered_by_the_chat_template(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    text = read_text(tmp_path / name)
    plain = tokenizer()
    assert token_windows(text, plain, 8).tolist() == [[100, 101, 102, 103, 100, 101, 102, 103]]
    templated = tokenizer()
    templated.chat_template = "{% for m in messages %}w200 {{ m['content'] }} w201 {% endfor %}"
    assert token_windows(text, templated, 8).tolist() == [[200, 100, 101, 201, 200, 102, 103, 201]]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("latin1.txt", "café".encode("latin-1"), "cannot be read"),
        ("broken.json", b"[{", "not a list of conversations"),
        ("empty.json", b"[[]]", "without messages"),
        ("other.jsonl", b'{"text": "hello"}', "not a list of conversations"),
        ("number.json", b"5", "not a list of conversations"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(
    name: str, content: bytes, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_text(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "nothing.txt")
