"""Tokenizers and chat templates that loop or grow are stopped, and named."""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import models
from smolquant.errors import CannotMeasure, InputError
from smolquant.evaluate.bounded import at, bounded
from smolquant.evaluate.documents import EvalText
from smolquant.evaluate.text import load_tokenizer, require_known, token_windows


def tokens(folder: Path) -> Any:
    """What a run does with a tokenizer and its chat template."""
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    windows = token_windows(EvalText("a text", ["<5> <6> e " * 200]), tokenizer, 64)
    require_known(windows, tokenizer, 320)
    return windows.tolist()


def with_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


def with_normalizer(folder: Path, normalizer: dict[str, Any]) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))


TWICE = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWTH = (
    "{% set t = namespace(x='ab') %}{% for i in range(60) %}{% set t.x = t.x ~ t.x %}{% endfor %}"
)


@pytest.mark.fault(
    "checkpoint",
    "A tokenizer or a chat template loops, or grows without end",
    "It is stopped at its limit of time or memory, and its file is named.",
)
@pytest.mark.parametrize(
    ("spoil", "file"),
    [
        (partial(with_template, template=LOOP), "chat_template.jinja"),
        (partial(with_template, template=GROWTH), "chat_template.jinja"),
        (
            partial(with_normalizer, normalizer={"type": "Sequence", "normalizers": [TWICE] * 9}),
            "tokenizer.json",
        ),
    ],
    ids=["loop", "growth", "normalizer"],
)
def test_what_loops_or_grows_is_stopped_and_named(
    tmp_path: Path, spoil: Callable[[Path], None], file: str
) -> None:
    models.save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    spoil(tmp_path)
    started = time.monotonic()
    with pytest.raises(CannotMeasure, match=rf"^{file} takes more than 1 s of computing"):
        bounded(partial(tokens, tmp_path), cpu_seconds=1, memory_bytes=400_000_000)
    assert time.monotonic() - started < 15


def test_what_is_in_order_gives_the_same_in_its_own_process(tmp_path: Path) -> None:
    models.save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert bounded(partial(tokens, tmp_path)) == tokens(tmp_path)


def test_what_the_work_raises_is_raised_here() -> None:
    def refuse() -> None:
        raise InputError("Too short.", hint="Give more.")

    with pytest.raises(InputError, match="Too short") as refusal:
        bounded(refuse)
    assert refusal.value.hint == "Give more."


@pytest.mark.fault(
    "checkpoint",
    "The process that reads the tokenizer dies",
    "The file that it had come to is named.",
)
def test_a_process_that_dies_is_told_with_the_file_that_it_had_come_to() -> None:
    def die() -> None:
        at("tokenizer.model")
        os._exit(1)

    with pytest.raises(CannotMeasure, match=r"^tokenizer\.model"):
        bounded(die)
