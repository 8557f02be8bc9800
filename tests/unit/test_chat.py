"""Trying a variant: which one, what it is asked, how it answers, and what reaches the terminal."""

import os
import pty
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

import models
from smolquant import cli
from smolquant.chat.conversation import Chat, Reply, converse, told, typed_prompts
from smolquant.chat.place import best_of, choose, find
from smolquant.errors import Cancelled, CheckpointError, InputError
from smolquant.hub import Hub
from smolquant.record import FILE_NAME, FileRecord, Metrics, VariantRecord
from smolquant.report.console import Console
from unit.report_samples import variant_record


def record(variant: str, size: int, lost: float | None = None) -> VariantRecord:
    metrics = None if lost is None else Metrics(perplexity_increase_percent=lost)
    files = {"model.safetensors": FileRecord("0" * 64, size)}
    return replace(variant_record(variant, metrics), files=files)


@pytest.mark.parametrize(
    ("device", "int8", "int4", "best"),
    [
        ("cpu", 0.3, 8.0, "int4"),
        ("cpu", None, None, "int4"),
        ("cpu", 0.3, 37.0, "int8"),
        ("cpu", 20.0, 12.0, "int4"),
        ("cuda", 0.3, 8.0, "int8"),
        ("cuda", None, None, "int8"),
    ],
)
def test_the_best_to_try_depends_on_the_machine_and_on_what_was_measured(
    device: str, int8: float | None, int4: float | None, best: str
) -> None:
    records = {"int8": record("int8", 200, int8), "int4": record("int4", 100, int4)}
    assert best_of(records, device)[0] == best


@pytest.fixture
def variants(tmp_path: Path) -> Path:
    for name, size in (("int8", 200), ("int4", 100)):
        folder = tmp_path / "made" / name
        folder.mkdir(parents=True)
        (folder / FILE_NAME).write_text(record(name, size).to_json())
    return tmp_path / "made"


def found(place: Path, revision: str | None = None) -> Any:
    return find(str(place), Hub(), revision, pytest.fail, with_code=False)


def test_the_choice_is_told_in_one_line_where_there_is_one(variants: Path) -> None:
    said: list[str] = []
    assert choose(found(variants), "cpu", said.append) == "int4"
    assert said == ["Trying int4, the smallest, fast on a CPU; --variant chooses another: int8"]
    assert choose(found(variants / "int8"), "cpu", pytest.fail) == "int8", "named by its folder"
    (variants / "int8" / FILE_NAME).unlink()
    assert choose(found(variants), "cpu", pytest.fail) == "int4", "the only one"


def test_a_record_that_cannot_be_read_stops_nobody(variants: Path) -> None:
    (variants / "int4" / FILE_NAME).write_text("{")
    said: list[str] = []
    assert choose(found(variants), "cpu", said.append) == "int8"
    (variants / "int8" / FILE_NAME).write_text("{")
    assert choose(found(variants), "cpu", said.append) == "int8"


@pytest.mark.fault(
    "input",
    "A variant is tried or loaded that is not there",
    "Exit 2 with those that are, before torch is imported.",
)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["made", "--variant", "int3"], "'int3' is not a variant. What made has: int8 and int4."),
        (["made", "--variant", "float8"], "made has no float8. What made has: int8 and int4."),
        (["mode"], "Did you mean made?"),
        (["."], ". has no variants: no int8/, int4/"),
        (["made", "--revision", "v1"], "is a folder and has no revisions"),
        (["made", "--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    variants: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(variants.parent)
    log = StringIO()
    assert cli.run(["chat", *arguments], Console({}, log)) == 2
    assert said in log.getvalue()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("chat")
    models.save_tokenizer(folder)
    return models.build(models.FAMILIES["llama"]()), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chat(random_model: tuple[Any, Any]) -> Chat:
    model, tokenizer = random_model
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if 'forbidden' in message['content'] %}{{ raise_exception('not\nthat') }}{% endif %}"
        "{% if message['role'] == 'user' %}<3> {{ message['content'] }} <4> "
        "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    )
    return Chat(model, tokenizer, max_tokens=6, greedy=True)


def nowhere(_: str) -> None:
    """Let an answer go."""


def watched(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is given, question for question."""
    given: list[str] = []
    generate = type(chat.model).generate

    def watch(model: Any, **options: Any) -> Any:
        given.append(chat.tokenizer.decode(options["input_ids"][0]))
        return generate(model, **options)

    monkeypatch.setattr(type(chat.model), "generate", watch)
    return given


def test_answers_stream_and_are_the_greedy_ones_of_the_whole_conversation(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = watched(chat, monkeypatch)
    pieces: list[str] = []
    first = chat.ask("<10> <11>", pieces.append)
    assert "".join(pieces).strip() == first.text
    assert len([piece for piece in pieces if piece]) > 1, "in pieces"
    assert (first.tokens, first.cut, first.forgot) == (6, True, False)
    assert first.tokens_per_second is not None
    chat.ask("<12>", pieces.append)
    assert given == ["<3> <10> <11> <4>", f"<3> <10> <11> <4> {first.text} <3> <12> <4>"]


def test_the_oldest_messages_make_room(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    given = watched(chat, monkeypatch)
    monkeypatch.setattr(chat.model.config, "max_position_embeddings", 24)
    assert not chat.ask("<10> " * 6, nowhere).forgot
    assert chat.ask("<12> " * 6, nowhere).forgot
    assert "<10>" not in given[-1]
    with pytest.raises(InputError, match="The prompt has 32 tokens, and the model reads 24"):
        chat.ask("<13> " * 30, nowhere)


def test_without_a_template_each_text_is_gone_on_with(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = watched(chat, monkeypatch)
    chat.tokenizer.chat_template = None
    remarks: list[str] = []
    converse(chat, ["<10>", "  ", "<11>"], nowhere, remarks.append)
    assert given == ["<10>", "<11>"]
    assert len(remarks) == 2


@pytest.mark.fault(
    "model",
    "A chat template refuses the conversation",
    "Exit 3 with its words.",
)
def test_a_template_that_refuses_is_quoted(chat: Chat) -> None:
    with pytest.raises(CheckpointError, match=r"chat template refuses .*: not that\."):
        chat.ask("forbidden", nowhere)


def test_half_a_surrogate_pair_is_no_bug(chat: Chat) -> None:
    assert chat.ask("<10> \udc80", nowhere).tokens == 6


def test_a_processor_is_asked_in_parts() -> None:
    tokenizer = SimpleNamespace()
    processor: Any = SimpleNamespace(tokenizer=tokenizer, chat_template="x")
    message = Chat(None, processor, 1)._message("user", "Hi")
    assert message["content"] == [{"type": "text", "text": "Hi"}]
    assert Chat(None, tokenizer, 1)._message("user", "Hi")["content"] == "Hi"


def test_the_last_line_tells_length_and_speed() -> None:
    reply = Reply("x", 37, 2.04, 21.26, cut=False, forgot=False)
    assert told(reply) == "[37 tokens in 2.0 s, 21.3 tokens a second]"
    reply = replace(reply, tokens_per_second=None, cut=True, forgot=True)
    assert "--max-tokens" in told(reply)
    assert "forgotten" in told(reply)


def test_prompts_are_read_until_the_end_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("one\ntwo"))
    assert list(typed_prompts(is_terminal=False)) == ["one", "two"]


EVIL = "a\x1b[31mb\x1b]0;title\x07c\r\x08d\x9b1m"
"""Colours, a window title, a carriage return, a backspace, and the escape in one byte."""


def shown_on_a_terminal(write: Callable[[Console], None]) -> str:
    leader, follower = pty.openpty()
    attributes = termios.tcgetattr(follower)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(follower, termios.TCSANOW, attributes)
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        write(Console({}, stream))
        shown = os.read(leader, 4096)
    os.close(leader)
    return shown.decode()


@pytest.mark.fault(
    "text",
    "A model answers with terminal escapes or workflow commands",
    "They are taken out, even when they come in pieces.",
)
def test_what_a_model_writes_moves_no_cursor_and_commands_no_runner() -> None:
    def in_pieces(console: Console) -> None:
        for character in f"{EVIL}\n{EVIL}":
            console.piece(character)

    def at_once(console: Console) -> None:
        console.piece(f"{EVIL}\n{EVIL}")

    assert shown_on_a_terminal(at_once) == "abcd1m\nabcd1m"
    pieces = shown_on_a_terminal(in_pieces)
    assert not {c for c in pieces if ord(c) < 32 or 0x7F <= ord(c) < 0xA0} - {"\n"}

    log = StringIO()
    runner = Console({"GITHUB_ACTIONS": "true"}, log)
    for piece in (":", ":set-env name=A::b", "\n", "rest"):
        runner.piece(piece)
    runner.piece("\n")
    assert not [line for line in log.getvalue().splitlines() if line.startswith("::")]
    assert log.getvalue().endswith("rest\n")


def test_a_piece_shows_at_once_on_a_terminal_and_by_lines_elsewhere() -> None:
    log = StringIO()
    plain = Console({}, log)
    plain.piece("no line ")
    assert log.getvalue() == ""
    plain.piece("yet\nnext")
    assert log.getvalue() == "no line yet\n"
    assert shown_on_a_terminal(lambda console: console.piece("half a li")) == "half a li"


def test_ctrl_c_ends_a_chat_without_an_error(
    variants: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: object, **__: object) -> None:
        raise Cancelled(2)

    monkeypatch.setattr("smolquant.chat.place.opened", leave)
    log = StringIO()
    assert cli.run(["chat", str(variants)], Console({}, log)) == 130
    assert log.getvalue() == "\n"
