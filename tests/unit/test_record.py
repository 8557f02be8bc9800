"""A record says the same when it is read back, and what is no record is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from smolquant.evaluate.measure import _MOST_NATS, _metrics
from smolquant.record import InvalidRecord, Metrics, VariantRecord, shows_no_difference
from unit.report_samples import variant_result

RECORD = replace(
    variant_result("int4").record,
    metrics=Metrics(
        perplexity=12.5,
        mean_kl=0.1,
        tokens=4088,
        text="a text",
        machine="a CPU",
        speed_ratio=1.5,
        speed_ratio_spread=(1.4, 1.625),
    ),
)


def test_what_is_written_is_read_back() -> None:
    assert VariantRecord.from_json(RECORD.to_json()) == RECORD


@pytest.mark.fault(
    "record",
    "A record was written by a later version",
    "What is unknown is left out.",
)
def test_what_a_later_version_adds_is_left_out() -> None:
    raw = json.loads(RECORD.to_json())
    raw["of_a_later_version"] = raw["metrics"]["of_a_later_version"] = [1]
    raw["source"]["of_a_later_version"] = {}
    assert VariantRecord.from_json(json.dumps(raw)) == RECORD


def test_a_record_tells_what_its_tensors_are_and_an_older_one_does_not() -> None:
    raw = json.loads(RECORD.to_json())
    name = "model.embed_tokens.weight"
    assert RECORD.tensors[name].kind == "embedding"
    raw["tensors"][name]["kind"] = "of a later version"
    del raw["metrics"]["compute_capability"]
    read = VariantRecord.from_json(json.dumps(raw))
    assert read.tensors[name].kind == "of a later version"
    del raw["tensors"][name]["kind"]
    assert VariantRecord.from_json(json.dumps(raw)).tensors[name].kind is None
    raw["tensors"][name]["kind"] = 5
    with pytest.raises(InvalidRecord):
        VariantRecord.from_json(json.dumps(raw))


def test_what_older_records_do_not_tell_of_a_model_follows_from_its_files() -> None:
    raw = json.loads(RECORD.to_json())
    del raw["has_chat_template"], raw["runs_own_code"]
    read = VariantRecord.from_json(json.dumps(raw))
    assert (read.has_chat_template, read.runs_own_code) == (False, False)
    raw["files"]["chat_template.jinja"] = {"sha256": "0" * 64, "size": 9}
    assert VariantRecord.from_json(json.dumps(raw)).has_chat_template
    raw["has_chat_template"] = False
    assert not VariantRecord.from_json(json.dumps(raw)).has_chat_template


def test_an_older_record_tells_of_no_ratio() -> None:
    raw = json.loads(RECORD.to_json())
    for name in ("speed_ratio", "speed_ratio_spread", "prefill_ratio", "prefill_ratio_spread"):
        del raw["metrics"][name]
    read = VariantRecord.from_json(json.dumps(raw)).metrics
    assert read is not None and read.perplexity == 12.5
    assert (read.speed_ratio, read.speed_ratio_spread) == (None, None)


@pytest.mark.parametrize(
    ("spread", "same"),
    [((0.97, 1.02), True), ((1.0, 1.3), True), ((1.01, 1.3), False), ((0.5, 0.9), False)],
)
def test_a_ratio_whose_quartiles_lie_around_one_is_no_difference(
    spread: tuple[float, float], same: bool
) -> None:
    assert shows_no_difference(spread) is same
    assert not shows_no_difference(None)


@pytest.mark.fault(
    "record",
    "A quantization.json has a field of the wrong type or out of range, or lacks one",
    "It is no record; it is told and left alone.",
)
@pytest.mark.parametrize(
    "change",
    [
        {"variant": 5},
        {"has_chat_template": "yes"},
        {"runs_own_code": 1},
        {"options": []},
        {"format_version": True},
        {"source": {"identity": "x"}},
        {"source": {"identity": "x", "size_bytes": -1}},
        {"source": {"identity": "x", "size_bytes": 2**70}},
        {"metrics": {"perplexity": "low"}},
        {"metrics": {"perplexity": 1e30}},
        {"metrics": {"speed_ratio": [1.0, 2.0]}},
        {"metrics": {"speed_ratio_spread": 1.5}},
        {"metrics": {"speed_ratio_spread": [1.0]}},
        {"metrics": {"speed_ratio_spread": [1.0, 2.0, 3.0]}},
        {"metrics": {"speed_ratio_spread": [1.0, "2"]}},
        {"metrics": {"prefill_ratio_spread": [1.0, True]}},
        {"metrics": {"prefill_ratio_spread": [1.0, 1e30]}},
        {"metrics": 5},
        {"files": {"model.safetensors": {"sha256": None, "size": 1}}},
        {"versions": {"torch": 2}},
    ],
)
def test_what_is_no_record_is_refused(change: dict[str, Any]) -> None:
    raw = json.loads(RECORD.to_json()) | change
    with pytest.raises(InvalidRecord):
        VariantRecord.from_json(json.dumps(raw))


@pytest.mark.fault(
    "record",
    "A quantization.json is not JSON, not an object, or nested without end",
    "It is no record; it is told and left alone.",
)
@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecord):
        VariantRecord.from_json(text)


class Surprised:
    """The predictions of a model that is ``nats`` surprised by each token."""

    def __init__(self, nats: float) -> None:
        import torch

        self.nll = torch.tensor([nats, nats])
        self.best = torch.tensor([0, 1])

    def of(self, *_: object) -> Any:
        return self.nll


@pytest.mark.fault(
    "record",
    "A model's errors are NaN or infinite",
    "Its record can be read back.",
)
@pytest.mark.parametrize("nats", [_MOST_NATS, 1e6])
def test_however_bad_a_model_is_its_record_can_be_read_back(nats: float) -> None:
    surprised: Any = Surprised(nats)
    for source in (Surprised(1.0), surprised):
        metrics = _metrics(source, surprised, surprised)  # type: ignore[arg-type]
        record = replace(RECORD, metrics=metrics)
        assert VariantRecord.from_json(record.to_json()) == record


def test_records_of_older_versions_are_of_text_alone_and_have_dropped_nothing() -> None:
    raw = json.loads(RECORD.to_json())
    name = next(name for name, tensor in RECORD.tensors.items() if not tensor.quantized)
    raw["task"], raw["tensors"][name]["dropped"] = "image-text-to-text", True
    read = VariantRecord.from_json(json.dumps(raw))
    assert (read.task, read.counts.dropped) == ("image-text-to-text", 1)
    assert read.counts.kept == RECORD.counts.kept - 1
    del raw["task"], raw["tensors"][name]["dropped"]
    older = VariantRecord.from_json(json.dumps(raw))
    assert (older.task, older.counts.dropped) == ("text-generation", 0)
    raw["tensors"][name]["dropped"] = "yes"
    with pytest.raises(InvalidRecord):
        VariantRecord.from_json(json.dumps(raw))
