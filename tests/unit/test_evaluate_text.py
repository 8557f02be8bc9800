"""Texts are cut into the same windows on every run, in every language's turn."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import models
from smolquant.errors import CheckpointError, InputError
from smolquant.evaluate import text as text_module
from smolquant.evaluate.documents import EvalText, bundled_text, read_text
from smolquant.evaluate.text import (
    WINDOW,
    default_tokens,
    load_tokenizer,
    require_known,
    token_windows,
    unknown_tokens,
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
    documents = list(map(str, bundled_text().documents))
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


@pytest.mark.parametrize(("tokens", "windows"), [(4096, 8), (2048, 4), (1024, 2), (512, 1)])
@pytest.mark.parametrize("opening", [False, True])
def test_tokens_of_the_ladder_are_windows_of_512(tokens: int, windows: int, opening: bool) -> None:
    text = EvalText("one", [words(100, 4200)])
    start = [BOS] if opening else []
    step = WINDOW - len(start)
    expected = [
        [*start, *range(100 + window * step, 100 + (window + 1) * step)]
        for window in range(windows)
    ]
    assert token_windows(text, tokenizer(opening=opening), tokens).tolist() == expected


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        (1000, (2, 500)),
        (1500, (3, 500)),
        (513, (2, 256)),
        (511, (1, 511)),
        (1537, (4, 384)),
        (2, (1, 2)),
    ],
)
def test_tokens_that_are_no_multiple_of_512_are_as_few_equal_windows_as_hold_them(
    tokens: int, shape: tuple[int, int]
) -> None:
    text = EvalText("one", [words(100, 2000)])
    windows = token_windows(text, tokenizer(), tokens, exact=True)
    assert windows.shape == shape
    assert windows.flatten().tolist() == list(range(100, 100 + shape[0] * shape[1]))
    assert 0 <= tokens - windows.numel() < len(windows)


def test_windows_are_no_longer_than_the_text_the_model_or_the_tokens_asked_for() -> None:
    long = EvalText("long", [words(100, 2000)])
    assert token_windows(long, tokenizer(), 1500).shape == (3, 500)
    assert token_windows(long, tokenizer(), 1500, longest=100).shape == (15, 100)
    assert token_windows(long, tokenizer(), 30).shape == (1, 30)
    assert token_windows(EvalText("short", [words(100, 9)]), tokenizer(), 1000).shape == (1, 9)


def test_all_there_is_is_taken_in_windows_as_long_as_can_be_where_no_number_was_asked_for() -> None:
    short = EvalText("short", [words(100, 1100)])
    assert token_windows(short, tokenizer(), 4000).shape == (2, WINDOW)
    assert token_windows(short, tokenizer(opening=True), 4000).shape == (2, WINDOW)
    few = EvalText("few", [words(100, 9), words(200, 20), words(300, 25)])
    assert token_windows(few, tokenizer(), 1000).tolist() == [list(range(300, 325))]


@pytest.mark.fault(
    "input",
    "The text to measure on is shorter than asked for",
    "Exit 2 with both numbers.",
)
def test_too_little_text_is_refused_where_so_much_was_asked_for() -> None:
    text = EvalText("mine.txt", [words(100, 50)])
    with pytest.raises(InputError, match=r"mine\.txt has 50 tokens.* the 1000 "):
        token_windows(text, tokenizer(), 1000, exact=True)
    with pytest.raises(InputError, match="has 1 tokens"):
        token_windows(EvalText("mine.txt", ["w5"]), tokenizer(), 1000)
    with pytest.raises(InputError, match="has 2 tokens"):
        token_windows(EvalText("mine.txt", ["w5 w6"]), tokenizer(), 3, exact=True)
    with pytest.raises(InputError, match="has 0 tokens"):
        token_windows(EvalText("mine.jsonl", []), tokenizer(), 1000)


@pytest.mark.fault(
    "input",
    "The text to measure on is shorter than asked for",
    "Exit 2 with both numbers.",
)
def test_tokens_that_are_only_there_in_pieces_are_refused_where_so_many_were_asked_for() -> None:
    text = EvalText("two", [words(100, 700), words(1000, 700)])
    assert token_windows(text, tokenizer(), 1000, exact=True).shape == (2, 500)
    assert token_windows(text, tokenizer(), 1400).shape == (2, WINDOW)
    complaint = r"has 1400 tokens.* 932 in whole windows of 466: fewer than the 1400"
    with pytest.raises(InputError, match=complaint):
        token_windows(text, tokenizer(), 1400, exact=True)


def test_the_ladder_falls_with_size() -> None:
    sizes = (135_000_000, 500_000_000, 1_500_000_000, 3_100_000_000, 14_000_000_000, 70_000_000_000)
    ladder = [default_tokens(size) for size in sizes]
    assert ladder == sorted(ladder, reverse=True)
    assert ladder[0] > ladder[-1]
    assert all(tokens % WINDOW == 0 for tokens in ladder)


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [
        (135_000_000, 2_048),
        (8_000_000_000, 2_048),
        (8_000_000_001, 1_024),
    ],
)
def test_the_ladder_s_steps_stay_where_they_are_so_that_releases_compare(
    parameters: int, tokens: int
) -> None:
    assert default_tokens(parameters) == tokens


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
    ("content", "rendered"),
    [
        ("w100 w101", [100, 101]),
        ([{"type": "text", "text": "w100 "}, {"type": "text", "text": "w101"}], [100, 101]),
        ([], []),
        (None, []),
    ],
)
def test_a_turn_is_its_text_whole_or_in_parts_or_none_where_it_calls_tools(
    content: Any, rendered: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "chats.json"
    turns = [{"role": "assistant", "content": content}, {"role": "user", "content": "w102 w103"}]
    path.write_text(json.dumps([turns]))
    templated = tokenizer()
    templated.chat_template = "{% for m in messages %}{{ m['content'] }} w201 {% endfor %}"
    windows = token_windows(read_text(path), templated, 100)
    assert windows.tolist() == [[*rendered, 201, 102, 103, 201]]


TEMPLATE = "{% for m in messages %}<s> w200 {{ m['content'] }} {% endfor %}"


def test_no_window_begins_twice_where_the_chat_template_begins_it_too() -> None:
    conversations = [[{"role": "user", "content": words(first, 5)}] for first in (100, 110, 120)]
    templated = tokenizer(opening=True)
    templated.chat_template = TEMPLATE
    windows = token_windows(EvalText("chats", conversations), templated, 16, longest=4, exact=True)
    assert windows.tolist() == [
        [BOS, 200, 100, 101],
        [BOS, 102, 103, 104],
        [BOS, 200, 110, 111],
        [BOS, 112, 113, 114],
    ]


def test_a_text_that_the_chat_template_begins_is_no_longer_for_it() -> None:
    text = EvalText("chats", [[{"role": "user", "content": "w100 w101"}]])
    templated = tokenizer(opening=True)
    templated.chat_template = TEMPLATE
    assert token_windows(text, templated, 1000).tolist() == [[BOS, 200, 100, 101]]


@pytest.mark.fault(
    "input",
    "The chat template refuses a conversation",
    "Exit 2 with its number.",
)
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('System role not\\n\x1b[31msupported') }}",
            "System role not supported",
        ),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_conversations_that_the_chat_template_refuses_are_bad_input(
    template: str, said: str
) -> None:
    text = EvalText("chats.jsonl", [CHAT])
    templated = tokenizer()
    templated.chat_template = template
    with pytest.raises(InputError, match="conversation 1 of chats.jsonl") as refusal:
        token_windows(text, templated, 8)
    assert said in refusal.value.message
    assert "plain text" in refusal.value.hint
    assert "\n" not in refusal.value.message and "\x1b" not in refusal.value.message


@pytest.mark.fault(
    "input",
    "The chat template refuses a conversation",
    "Exit 2 with its number.",
)
def test_the_conversation_that_the_chat_template_refuses_is_told_and_its_words_are_kept_short() -> (
    None
):
    text = EvalText("chats.jsonl", [CHAT, [{"role": "system", "content": "w5"}, *CHAT]])
    templated = tokenizer()
    templated.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no ' * 9999) }}{% endif %}w200"
    )
    with pytest.raises(InputError, match='conversation 2 of .* "no no .*…"') as refusal:
        token_windows(text, templated, 8)
    assert len(refusal.value.message) < 300


@pytest.mark.fault(
    "input",
    "The text to measure on is missing, not UTF-8, or not what its name says",
    "Exit 2 with the file.",
)
@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": 5},
        {"role": "user", "content": {"type": "text", "text": "w5"}},
        {"role": "user", "content": ["w5"]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "text", "text": "w5"}, {"type": "image"}]},
        {"role": "user"},
        {"role": None, "content": "w5"},
        {"content": "w5"},
        "w5",
    ],
)
def test_a_turn_that_is_not_text_is_refused(turn: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([[*CHAT, turn]]))
    with pytest.raises(InputError, match="not a list of conversations"):
        read_text(path)


@pytest.mark.fault(
    "input",
    "The text to measure on is missing, not UTF-8, or not what its name says",
    "Exit 2 with the file.",
)
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("latin1.txt", "café".encode("latin-1"), "cannot be read"),
        ("broken.json", b"[{", "not a list of conversations"),
        ("empty.json", b"[[]]", "without messages"),
        ("other.jsonl", b'{"text": "hello"}', "not a list of conversations"),
        ("number.json", b"5", "not a list of conversations"),
        ("deep.json", b"[" * 99_999, "not a list of conversations"),
        (
            "half.json",
            b'[[{"role": "user", "content": "\\ud83d"}]]',
            "not a list of conversations.*surrogates",
        ),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(
    name: str, content: bytes, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_text(tmp_path / name)


@pytest.mark.fault(
    "input",
    "The text to measure on is far longer than needed",
    "It is tokenized as far as needed.",
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_text_of_any_size_is_tokenized_as_far_as_needed(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few megabytes stand for gigabytes: what is tokenized does not depend on the size."""
    encode, given = text_module._encode, []

    def noted(text: str, tokenizer: Any) -> list[int]:
        given.append(len(text))
        return encode(text, tokenizer)

    monkeypatch.setattr(text_module, "_encode", noted)
    line = words(100, 20)
    if suffix == ".jsonl":
        line = json.dumps([{"role": "user", "content": line + "\n"}])
    short, long = tmp_path / f"short{suffix}", tmp_path / f"long{suffix}"
    short.write_text(f"{line}\n" * 2_000)
    long.write_text(f"{line}\n" * 30_000)
    expected = token_windows(read_text(short), tokenizer(), 1024)
    given.clear()
    assert torch.equal(token_windows(read_text(long), tokenizer(), 1024), expected)
    assert sum(given) < 50_000
    entries = (
        [json.loads(one) for one in long.read_text().splitlines()] if suffix == ".jsonl" else None
    )
    whole = json.dumps(entries or [long.read_text()])
    assert read_text(long).digest == hashlib.sha256(whole.encode()).hexdigest()


@pytest.mark.fault(
    "input",
    "The text to measure on is almost all white space",
    "It is read on until it has the tokens asked for.",
)
def test_a_text_of_few_tokens_is_read_on(tmp_path: Path) -> None:
    (tmp_path / "sparse.txt").write_text((" " * 5_000).join(f"w{i}" for i in range(100, 400)))
    windows = token_windows(read_text(tmp_path / "sparse.txt"), tokenizer(), 256, exact=True)
    assert windows.flatten().tolist() == list(range(100, 356))


@pytest.mark.fault(
    "input",
    "The text to measure on is a JSON list of more than 64 MB",
    "Exit 2; the hint names .jsonl.",
)
def test_a_list_that_does_not_fit_in_memory_is_refused_with_what_does(tmp_path: Path) -> None:
    with (tmp_path / "long.json").open("w") as file:
        file.write("[")
        file.truncate(65_000_000)
    with pytest.raises(InputError, match="a list of more than 64,000,000 bytes") as refusal:
        read_text(tmp_path / "long.json")
    assert ".jsonl" in refusal.value.hint


@pytest.mark.fault(
    "input",
    "The text to measure on is missing, not UTF-8, or not what its name says",
    "Exit 2 with the file.",
)
def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "nothing.txt")


@pytest.mark.fault(
    "checkpoint",
    "The tokenizer yields tokens that the embedding has no row for",
    "Exit 3 with both numbers.",
)
def test_a_token_without_a_row_is_refused_with_both_numbers() -> None:
    windows = token_windows(EvalText("one", [words(100, 20)]), tokenizer(), 20)
    require_known(windows, tokenizer(), 120)
    with pytest.raises(
        CheckpointError, match=r"yields token id 119 \('w119'\).* has 119 rows"
    ) as no:
        require_known(windows, tokenizer(), 119)
    assert "resize_token_embeddings" in no.value.hint


@pytest.mark.fault(
    "checkpoint",
    "The tokenizer yields tokens that the embedding has no row for",
    "Exit 3 with both numbers.",
)
@pytest.mark.parametrize(
    "refusal",
    [
        "",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    ],
)
def test_a_chat_template_without_rows_is_refused_whatever_the_text(refusal: str) -> None:
    windows = token_windows(EvalText("one", [words(100, 20)]), tokenizer(), 20)
    templated = tokenizer()
    templated.chat_template = refusal + "{% for m in messages %}w4321 {% endfor %}"
    require_known(windows, templated, 4322)
    with pytest.raises(CheckpointError, match="The chat template yields token id 4321"):
        require_known(windows, templated, 4321)
    templated.chat_template = "{{ raise_exception('tools only') }}"
    require_known(windows, templated, 120)  # it says nothing of tokens


@pytest.mark.fault(
    "checkpoint",
    "The tokenizer has more tokens than the model has rows",
    "Those without a row are named.",
)
def test_tokens_that_no_text_may_hold_are_told_apart() -> None:
    assert unknown_tokens(tokenizer(), 4998) == ["w4998", "w4999"]
    assert unknown_tokens(tokenizer(), 5000) == []


@pytest.mark.fault(
    "checkpoint",
    "The tokenizer cannot be loaded, and a package that it needs is not installed",
    "Exit 3 with the package.",
)
def test_the_packages_that_a_tokenizer_of_sentencepiece_needs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save_sentencepiece(tmp_path)
    assert load_tokenizer(tmp_path, trust_remote_code=False)("the hat")["input_ids"]
    monkeypatch.setattr(text_module, "_SENTENCEPIECE", {"sentencepiece": "no_such.module"})
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert "`pip install sentencepiece`" in error.value.hint
    assert "tiktoken" not in str(error.value), (
        "transformers tries another format, and names its package"
    )
