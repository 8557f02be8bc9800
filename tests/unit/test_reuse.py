"""Which variants need not be made again, decided from records alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smolquant.checkpoint.source import Source
from smolquant.evaluate.documents import bundled_calibration_text, bundled_text
from smolquant.record import Metrics, SourceRecord, VariantRecord, stack_versions
from smolquant.reuse import Reuse, decide_reuse
from smolquant.settings import Settings, make_settings

IDENTITY = "sha256:" + "1" * 64


class KnownSource(Source):
    """A source of which only the identity is asked; it counts how often."""

    def __init__(self, identity: str = IDENTITY) -> None:
        self.asked, self._identity = 0, identity

    @property
    def identity(self) -> str:
        self.asked += 1
        return self._identity

    folder = digests = state = property(lambda self: pytest.fail("not needed"))
    require_unchanged = to_fetch = fetch_weights = layout = lambda self: pytest.fail("not needed")


def settings(**options: Any) -> Settings:
    given = {"model_path": "user/model", "repo_name": None, "quant_type": "int8_weight_only"}
    return make_settings(**given | {"evaluate": "never"} | options)


def record(asked: Settings, **changes: Any) -> VariantRecord:
    quant_type = asked.quant_types[0]
    made = VariantRecord(
        variant="int8",
        quant_type=quant_type,
        source=SourceRecord(IDENTITY, 100),
        options=asked.options_of(quant_type),
        dtype="bfloat16",
        versions=stack_versions(),
        tensors={},
        files={},
    )
    return replace(made, **changes)


def decide(
    asked: Settings,
    there: VariantRecord | None = None,
    finished: VariantRecord | None = None,
    *,
    int4: VariantRecord | None = None,
    intact: bool = True,
) -> Reuse:
    def by_name(one: VariantRecord | None) -> Mapping[str, VariantRecord]:
        return {} if one is None else {"int8": one}

    return decide_reuse(
        by_name(there) if int4 is None else {"int4": int4},
        by_name(finished),
        KnownSource(),
        asked,
        is_whole=lambda folder, made: intact,
    )


def test_what_is_not_there_is_made_and_that_needs_no_words() -> None:
    reuse = decide(settings())
    assert (reuse.up_to_date, reuse.reusable) == ({}, {})
    assert reuse.to_make == ("int8_weight_only",)
    assert reuse.to_publish == ("int8",)
    assert reuse.reasons == {}


def test_the_same_source_and_options_are_up_to_date_whatever_the_versions() -> None:
    asked = settings()
    made = record(asked, versions={"torch": "1.0"})
    reuse = decide(asked, made, made)
    assert (reuse.up_to_date, reuse.to_make, reuse.to_publish) == ({"int8": made}, (), ())
    assert reuse.reasons == {"int8": "int8 is up to date"}


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"force": True}, {}, "--force asks for it"),
        ({"dtype": "float16"}, {}, "other options"),
        ({}, {"format_version": 0}, "another version"),
        ({}, {"source": SourceRecord("sha256:2", 1)}, "another source"),
        ({"evaluate": "always"}, {}, "not measured as asked for now"),
        ({"evaluate": "auto", "max_kl": "1"}, {}, "not measured as asked for now"),
    ],
)
def test_why_a_variant_is_made_again_is_said(
    options: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    asked = settings(**options)
    reuse = decide(asked, record(settings(), **changes))
    assert reuse.to_make == ("int8_weight_only",)
    assert reason in reuse.reasons["int8"]


def test_numbers_of_the_same_text_satisfy_a_limit() -> None:
    asked = settings(evaluate="always", max_kl="1", eval_tokens=64)
    metrics = Metrics(text_sha256=asked.measurement.text.digest, tokens_asked=64, mean_kl=0.1)
    assert decide(asked, record(asked, metrics=metrics)).up_to_date
    assert not decide(asked, record(asked, metrics=replace(metrics, tokens_asked=65))).up_to_date


CALIBRATED: dict[str, Any] = {"quant_type": "int4_weight_only", "int4_method": "calibrated"}


def calibrated(asked: Settings, text: str, **changes: Any) -> VariantRecord:
    options = {**asked.options_of("int4_weight_only"), "calibration_sha256": text}
    return record(asked, variant="int4", options=options, **changes)


@pytest.mark.parametrize("text", sorted(bundled_calibration_text().earlier))
def test_a_text_that_smolquant_replaced_leaves_what_was_calibrated_on_it_up_to_date(
    text: str, tmp_path: Path
) -> None:
    asked = settings(**CALIBRATED)
    assert text != bundled_calibration_text().digest
    made = calibrated(asked, text)
    assert decide(asked, int4=made).up_to_date == {"int4": made}
    assert decide(settings(**CALIBRATED, force=True), int4=made).to_make
    assert decide(settings(**CALIBRATED, group_size=32), int4=made).to_make
    assert decide(settings(**CALIBRATED | {"int4_method": "search"}), int4=made).to_make
    assert decide(asked, int4=calibrated(asked, "0" * 64)).to_make, "it was the owner's own text"
    (tmp_path / "own.txt").write_text("another text")
    own = settings(**CALIBRATED, calibration_text=str(tmp_path / "own.txt"))
    assert decide(own, int4=made).to_make


def test_numbers_of_a_text_that_smolquant_replaced_are_kept_as_what_they_are(
    tmp_path: Path,
) -> None:
    (earlier,) = bundled_text().earlier
    asked = settings(evaluate="always", max_kl="1")
    made = record(asked, metrics=Metrics(text="A Manual", text_sha256=earlier, mean_kl=0.1))
    kept = decide(asked, made).up_to_date["int8"].metrics
    assert kept is not None
    assert (kept.text, kept.text_sha256) == ("A Manual", earlier)
    assert not decide(asked, None, made).reusable, "what is published now is measured on today's"
    assert decide(settings(evaluate="always", force=True), made).to_make
    (tmp_path / "own.txt").write_text("another text")
    own = settings(evaluate="always", eval_text=str(tmp_path / "own.txt"))
    assert decide(own, made).to_make


def test_what_an_earlier_run_has_finished_only_has_to_be_published() -> None:
    asked = settings()
    reuse = decide(asked, None, record(asked))
    assert (set(reuse.reusable), reuse.to_make, reuse.to_publish) == ({"int8"}, (), ("int8",))
    assert "what an earlier run made of this source" in reuse.reasons["int8"]


@pytest.mark.parametrize(
    ("options", "changes", "intact"),
    [
        ({"force": True}, {}, True),
        ({"dry_run": True}, {}, True),
        ({}, {"versions": {"torch": "1.0"}}, True),
        ({}, {"source": SourceRecord("sha256:2", 1)}, True),
        ({"evaluate": "auto"}, {}, True),
        ({}, {}, False),
    ],
)
def test_what_this_run_would_make_otherwise_is_not_reused(
    options: dict[str, Any], changes: dict[str, Any], intact: bool
) -> None:
    finished = record(settings(), **changes)
    assert not decide(settings(**options), None, finished, intact=intact).reusable


def test_a_source_is_not_read_for_a_record_of_other_options() -> None:
    source = KnownSource()
    decide_reuse({"int8": record(settings(), options={})}, {}, source, settings())
    assert source.asked == 0


def test_every_type_is_decided_by_itself(tmp_path: Path) -> None:
    asked = settings(quant_type="both")
    reuse = decide(asked, record(settings()))
    assert (set(reuse.up_to_date), reuse.to_make) == ({"int8"}, ("int4_weight_only",))
