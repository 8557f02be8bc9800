"""A variant's predictions are those that were recorded; `smolquant check` says so where they are not."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from compat.prove import fixtures
from smolquant.check import Checked, check, summary
from smolquant.evaluate import behaviour
from smolquant.evaluate.behaviour import differences, observe, predict
from smolquant.hub import Hub
from smolquant.record import FILE_NAME, Behaviour, InvalidRecord, VariantRecord
from smolquant.runtime.load import load_for_checking
from smolquant.runtime.plainly import computing_plainly, plain_bytes

FIXTURE = fixtures()[-1]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """One variant of the fixture, to be changed."""
    shutil.copytree(FIXTURE / "int8", tmp_path / "int8")
    return tmp_path


def changed_record(published: Path, **behaviour: Any) -> None:
    path = published / "int8" / FILE_NAME
    raw = json.loads(path.read_bytes())
    raw["behaviour"] |= behaviour
    path.write_text(json.dumps(raw))


def recorded(published: Path) -> Behaviour:
    record = VariantRecord.from_json((published / "int8" / FILE_NAME).read_bytes())
    assert record.behaviour is not None
    return record.behaviour


def checked(published: Path) -> Checked:
    (one,) = check(str(published), Hub(None))
    return one


def test_a_variant_as_it_was_made_predicts_what_was_recorded(published: Path) -> None:
    assert checked(published).verdict == "works, and predicts what was recorded"


@pytest.mark.fault(
    "record",
    "A token that a variant predicts is not the recorded one",
    "`check` exits 3 and names both.",
)
def test_one_other_token_is_told(published: Path) -> None:
    tokens = list(recorded(published).next_tokens)
    tokens[7] = (tokens[7] + 1) % 200
    changed_record(published, next_tokens=tokens)
    problem = checked(published).problem
    assert problem.startswith("After 't e r Ġ b o' it predicts ")
    assert problem.endswith("when it was made.")


def flipped(published: Path, bit: int) -> None:
    """Flip one bit of one level of a weight, and adjust the record to the file."""
    path = published / "int8/model.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + header])["model.layers.1.mlp.down_proj._weight_qdata"]
    content[8 + header + place["data_offsets"][0] + 5] ^= 1 << bit
    path.write_bytes(content)
    record = published / "int8" / FILE_NAME
    raw = json.loads(record.read_bytes())
    raw["files"][path.name]["sha256"] = hashlib.sha256(content).hexdigest()
    record.write_text(json.dumps(raw))


@pytest.mark.fault(
    "record",
    "A byte of a variant's weights differs, and its record was adjusted to it",
    "`check` exits 3: the perplexity of a short text is another one.",
)
@pytest.mark.parametrize("bit", [3, 7])
def test_one_other_byte_of_a_weight_is_told(published: Path, bit: int) -> None:
    flipped(published, bit)
    assert "perplexity on a short text is" in checked(published).problem or (
        "it predicts" in checked(published).problem
    )


@pytest.mark.fault(
    "record",
    "The installed libraries make other tokens of a text than those that a variant was made with",
    "`check` exits 3 and names the first.",
)
def test_another_tokenizer_is_told(published: Path) -> None:
    ids = list(recorded(published).token_ids)
    changed_record(published, text="W" + recorded(published).text)
    problem = checked(published).problem
    assert problem.startswith("Its tokenizer makes other tokens of a text than when it was made: ")
    assert f"token 2 is {ids[0]}, and was {ids[1]}." in problem


@pytest.mark.parametrize(
    ("change", "end"),
    [
        (None, "works; what it predicts was not recorded when it was made"),
        ({"computed": "in 2030"}, "in a way that this one does not know"),
        ({"text": "a" * 10_001}, "in a way that this one does not know"),
        (
            {"token_ids": [1] * 49, "next_tokens": [1] * 49, "margins": [1] * 49},
            "in a way that this one does not know",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(
    published: Path, change: dict[str, Any] | None, end: str
) -> None:
    """What a record asks to be computed is bounded: one of a million tokens would take all memory."""
    if change is None:
        path = published / "int8" / FILE_NAME
        raw = json.loads(path.read_bytes())
        del raw["behaviour"]
        path.write_text(json.dumps(raw))
    else:
        changed_record(published, **change)
    one = checked(published)
    assert not one.problem
    assert one.verdict.endswith(end)


@pytest.mark.fault(
    "record",
    "A file that libraries read was added to a variant, such as another tokenizer or an adapter",
    "`check` exits 3 and names it.",
)
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "chat_template.jinja", "model-2.safetensors", "modeling_x.py"]
)
def test_a_file_that_was_added_is_told_if_libraries_read_it(published: Path, name: str) -> None:
    (published / "int8/notes.txt").write_text("The owner's.")
    assert not checked(published).problem
    (published / "int8" / name).write_text("{}")
    assert checked(published).problem.startswith(f"{name} was put there later")


@pytest.mark.fault(
    "machine",
    "There is no memory to compute what a variant predicts in float32",
    "`check` loads it and says that this was not compared; a run that measures records nothing of it.",
)
def test_without_the_memory_it_is_not_compared(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behaviour, "available_bytes", lambda: 100)
    one = checked(published)
    assert not one.problem
    assert one.verdict.endswith("is not compared, for which this machine lacks the memory")
    model, tokenizer = load_for_checking(published, "int8", report=lambda info: None)
    assert observe(model, tokenizer) is None


def test_a_token_is_compared_only_where_it_is_clearly_ahead() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "int8")
    was = Behaviour("ab", tuple(tokenizer("ab")["input_ids"]), (5, 6), (1e-4, 3.0), 12.0)
    assert not list(differences(was, replace(was, next_tokens=(9, 6)), tokenizer))
    assert len(list(differences(was, replace(was, next_tokens=(5, 9)), tokenizer))) == 1
    assert not list(differences(was, replace(was, perplexity=12.0001), tokenizer))
    assert len(list(differences(was, replace(was, perplexity=12.01), tokenizer))) == 1


def test_a_model_computes_plainly_what_its_plain_float32_weights_give() -> None:
    """And afterwards it is as it was: its attention, its forwards and its stored weights."""
    model, tokenizer = load_for_checking(FIXTURE, "int8", report=lambda info: None)
    before = {name: id(weight) for name, weight in model.named_parameters()}
    attention = model.config._attn_implementation
    now = observe(model, tokenizer)
    assert {name: id(weight) for name, weight in model.named_parameters()} == before
    assert model.config._attn_implementation == attention
    assert not any("forward" in module.__dict__ for module in model.modules())
    with safe_open(FIXTURE / "int8/model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    state = {name: values for name, values in stored.items() if "._weight" not in name}
    for name in [name for name in stored if name.endswith("_qdata")]:
        weight = stored[name].float() * stored[name.replace("qdata", "scale")].float()
        state[name.replace("._weight_qdata", ".weight")] = weight
    plain.load_state_dict(state, strict=False)
    plain.tie_weights()
    expected = predict(plain.eval(), behaviour.TEXT, now.token_ids if now else ())
    assert now is not None
    assert now.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert now.next_tokens == expected.next_tokens
    assert plain_bytes(model) == 4 * (3 * 64 * 32 + (32 + 16 + 16 + 32) * 32 + 2 * 32)


def test_a_text_that_the_model_has_no_tokens_for_is_not_observed() -> None:
    model, _ = load_for_checking(FIXTURE, "int8", report=lambda info: None)
    for ids in ([5], [5, 10**6]):
        assert observe(model, lambda text, ids=ids, **_: {"input_ids": ids}) is None


def test_a_failure_while_computing_leaves_the_model_as_it_was() -> None:
    model, _ = load_for_checking(FIXTURE, "int8", report=lambda info: None)
    with pytest.raises(IndexError):
        predict(model, "a text", [10**6])
    assert not any("forward" in module.__dict__ for module in model.modules())
    with computing_plainly(model):
        assert any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": [1]},
        {"token_ids": [1, -2], "next_tokens": [1, 2], "margins": [1, 2]},
        {"token_ids": [1, True], "next_tokens": [1, 2], "margins": [1, 2]},
        {"margins": ["1"] * 48},
        {"perplexity": None},
        {"perplexity": 1e30},
        {"text": 5},
        {"computed": None},
    ],
)
def test_what_is_no_behaviour_is_no_record(published: Path, change: dict[str, Any]) -> None:
    changed_record(published, **change)
    with pytest.raises(InvalidRecord):
        recorded(published)
    assert "not a readable quantization.json" in checked(published).problem


def test_the_summary_is_a_table_that_no_foreign_text_breaks() -> None:
    results = [
        Checked("int8", "", {"torch": "2.13.0"}, ", and predicts what was recorded"),
        Checked("int4", "It does not run: Error: a | b\nc <img>", {"torch": "2|3"}),
    ]
    lines = summary("alice/model", results).splitlines()
    assert lines[0] == "## smolquant check `alice/model`"
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert "✅ | works, and predicts what was recorded | torch 2.13.0 |" in rows[2]
    assert r"It does not run: Error: a \| b c \<img\>" in rows[3]
    assert lines[-1].startswith("Checked with ") and "transformers 5" in lines[-1]
