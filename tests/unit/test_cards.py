"""The model cards: whose text stays, what is claimed, and that nothing untrusted breaks out."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, metadata_save

from smolquant.errors import InputError
from smolquant.publish.cards import BEGIN, END, root_card, variant_card
from smolquant.publish.front_matter import Readme, declared_license
from smolquant.record import FileRecord, Metrics, SourceRecord, TensorRecord, VariantRecord
from smolquant.report.plot import FILE_NAME as PLOT
from smolquant.schemes import BY_VARIANT
from smolquant.schemes.int8_weight_only import Int8WeightOnly

REPO = "alice/tiny"
NEW = "sha256:" + "a" * 64
OLD = "sha256:" + "b" * 64
METRICS = Metrics(
    perplexity=12.3456,
    source_perplexity=12.0,
    perplexity_increase_percent=2.88,
    mean_kl=0.0123,
    top1_agreement=0.95,
    tokens_per_second=40.0,
    source_tokens_per_second=20.0,
    prefill_tokens_per_second=500.0,
    source_prefill_tokens_per_second=300.0,
    peak_memory_bytes=700_000_000,
    source_peak_memory_bytes=900_000_000,
    tokens=4088,
    text="Debian Reference, six languages",
    text_sha256="e" * 64,
    machine="AMD EPYC, 2 cores",
)


def record(variant: str = "int8", **changes: Any) -> VariantRecord:
    smaller = "576 columns are not a multiple of 128, group 64"
    group, reason = (64, smaller) if variant == "int4" else (None, "")
    tensors = {
        f"model.layers.{layer}.mlp.up_proj.weight": TensorRecord(
            True, 300_000, 150_000, group, 0.01, reason
        )
        for layer in range(3)
    }
    tensors["model.embed_tokens.weight"] = TensorRecord(False, 100_000, 100_000, reason="embedding")
    made = VariantRecord(
        variant=variant,
        quant_type=BY_VARIANT[variant].quant_type,
        source=SourceRecord(NEW, 1_000_000, REPO, "c" * 40),
        options={"dtype": "auto", "skip": []},
        dtype="bfloat16",
        versions={"torch": "2.13.0", "torchao": "0.18.0"},
        tensors=tensors,
        files={"model.safetensors": FileRecord("d" * 64, 550_000)},
    )
    return replace(made, **changes)


def root(existing: str | None = None, *records: VariantRecord, **changes: Any) -> str:
    values: dict[str, Any] = {
        "location": REPO,
        "has_main_model": True,
        "source_identity": NEW,
        **changes,
    }
    return root_card(existing, {one.variant: one for one in records or (record(),)}, **values)


def card(made: VariantRecord, location: str = REPO, base_model: str | None = REPO) -> str:
    return variant_card(made, location=location, base_model=base_model, terms={"license": "mit"})


def front(text: str) -> dict[str, Any]:
    return Readme.split(text).values()


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# The root card


def test_a_new_root_card_lists_every_variant_with_its_numbers_and_snippets() -> None:
    text = root(None, record("int4"), record("int8"), record("int8_dynamic"))
    rows = table_rows(text)
    assert rows[0] == [
        "Variant", "Type", "Size", "Of the original", "Tensors quantized / kept",
    ]  # fmt: skip
    assert [row[0] for row in rows[2:]] == [
        "main model",
        "[int8](int8/README.md)",
        "[int4](int4/README.md)",
        "[int8\\_dynamic](int8_dynamic/README.md)",
    ]
    assert rows[3][2:] == ["550 kB", "55.0%", "3 / 1"]
    assert "# tiny" in text
    assert "Stock transformers alone cannot run int4 on a CPU" in text
    for subfolder in ("", ', subfolder="int8"', ', subfolder="int8_dynamic"'):
        assert f'AutoTokenizer.from_pretrained("alice/tiny"{subfolder})' in text
    assert 'smolquant.load("alice/tiny", variant="int4")' in text
    for snippet in snippets(text):
        ast.parse(snippet)
    assert len(snippets(text)) == 5  # main, int8, int8_dynamic, and two ways for int4


def test_only_what_exists_is_shown() -> None:
    text = root(None, record("int8"), has_main_model=False)
    assert "main model" not in text
    assert "int4" not in text
    assert len(snippets(text)) == 1


def test_ten_variants_have_a_row_each_whatever_made_them() -> None:
    """Five of this version's, and five of later ones that it knows nothing of."""
    names = [*BY_VARIANT, *(f"later{number}" for number in range(5))]
    assert len(names) >= 10
    records = [
        record(name) if name in BY_VARIANT else replace(record(), variant=name, quant_type=name)
        for name in names
    ]
    text = root(None, *records)
    first = [row[0].replace("\\", "") for row in table_rows(text)[2:]]
    assert first == ["main model", *(f"[{name}]({name}/README.md)" for name in names)]
    assert root(text, *reversed(records)) == text
    for name in BY_VARIANT:
        assert f'variant="{name}"' in text or f'subfolder="{name}"' in text


def test_the_root_card_is_a_pure_function_whatever_the_order() -> None:
    first = root(None, record("int4"), record("int8"))
    assert first == root(None, record("int8"), record("int4"))
    assert root(first, record("int4"), record("int8")) == first


@pytest.mark.fault(
    "text",
    "The owner has a README with text and front matter of their own",
    "It survives to the byte, outside of our two markers.",
)
def test_the_owners_text_and_front_matter_survive_to_the_byte() -> None:
    owner = (
        "---\n"
        "# keep this comment\n"
        "license: mit   # and this\n"
        "language:\n- no\n- en\n"
        'base_model: "someone/else"\n'
        "model-index:\n- name: x\n  results: []\n"
        "---\n\n# My model\n\nText.  \n\n<div>html</div>\n"
    )
    text = root(owner)
    assert text.startswith(owner.replace("\n---\n\n#", "\ntags:\n- torchao\n- smolquant\n---\n\n#"))
    assert text.count(BEGIN) == text.count(END) == 1
    assert root(text) == text


def test_our_part_is_replaced_where_it_stands() -> None:
    text = root("# Mine\n\nabove\n")
    moved = text.replace(END, f"{END}\n\nbelow")
    updated = root(moved, record("int4"))
    assert updated.index("above") < updated.index(BEGIN) < updated.index("below")
    assert "[int4]" in updated
    assert "[int8]" not in updated
    assert updated.count("below") == 1


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("tags: [a, b]", ["a", "b", "torchao", "smolquant"]),
        ("tags:\n  - a\n  - smolquant", ["a", "smolquant", "torchao"]),
        ("tags: a", ["a", "torchao", "smolquant"]),
        ("tags:", ["torchao", "smolquant"]),
        ("tags: []", ["torchao", "smolquant"]),
        ("tags:\n- 'a: b'", ["a: b", "torchao", "smolquant"]),
        ("license: mit", ["torchao", "smolquant"]),
    ],
)
def test_tags_are_added_to_the_owners_however_they_are_written(
    written: str, expected: list[str]
) -> None:
    text = root(f"---\nlanguage: en\n{written}\nlibrary_name: vllm\n---\nText\n")
    assert front(text)["tags"] == expected
    assert front(text)["language"] == "en"
    assert front(text)["library_name"] == "vllm"
    assert root(text) == text


@pytest.mark.fault(
    "text",
    "A tag is one that YAML reads as something else, such as `on`",
    "It keeps its spelling.",
)
def test_a_tag_that_yaml_would_misread_keeps_its_spelling() -> None:
    assert "\n- on\n- torchao\n" in root("---\ntags:\n- on\n---\n")


def test_complete_tags_leave_the_front_matter_alone() -> None:
    owner = "---\ntags: [smolquant,   torchao]  # mine\n---\nText\n"
    assert root(owner).startswith(owner)


@pytest.mark.fault(
    "text",
    "The front matter is in a style that cannot be edited line by line",
    "It is left as it is.",
)
@pytest.mark.parametrize(
    "written", ["{license: mit, tags: a}", "  license: mit", "tags:\n  nested: mapping"]
)
def test_front_matter_of_an_unusual_style_is_left_alone(written: str) -> None:
    owner = f"---\n{written}\n---\nText\n"
    text = root(owner)
    assert text.startswith(owner)
    assert root(text) == text


@pytest.mark.fault(
    "text",
    "The front matter is broken YAML",
    "Exit 2 with the line, before any work.",
)
@pytest.mark.parametrize(
    ("written", "line"), [("license: mit\ntags: [a", "3"), ("a: b: c", "2"), ("a:\n\t- b", "3")]
)
def test_broken_front_matter_is_refused_with_its_line(written: str, line: str) -> None:
    with pytest.raises(InputError, match=rf"cannot be read \(line {line}\)"):
        root(f"---\n{written}\n---\nText\n")


@pytest.mark.fault(
    "text",
    "The front matter is no mapping",
    "Exit 2.",
)
def test_front_matter_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(InputError, match="key: value"):
        root("---\njust a sentence\n---\nText\n")


def test_a_readme_that_starts_with_a_rule_has_no_front_matter() -> None:
    text = root("---\n\nText without a second rule\n")
    assert front(text) == {"tags": ["torchao", "smolquant"]}
    assert "---\n\nText without a second rule\n" in text


@pytest.mark.fault(
    "text",
    "The README has Windows line ends",
    "They stay.",
)
def test_windows_line_ends_stay() -> None:
    owner = "---\r\nlicense: mit\r\ntags:\r\n- a\r\n---\r\n\r\n# Mine\r\n"
    text = root(owner)
    assert "\n" not in text.replace("\r\n", "")
    assert front(text) == {"license": "mit", "tags": ["a", "torchao", "smolquant"]}
    assert text.count("# Mine\r\n") == 1
    assert root(text) == text


@pytest.mark.fault(
    "text",
    "One of our markers in the README lacks its partner, or stands there twice",
    "The owner loses no text.",
)
@pytest.mark.parametrize("marker", [BEGIN, END])
def test_a_marker_without_its_partner_costs_the_owner_no_text(marker: str) -> None:
    text = root(f"# Mine\n\nabove\n{marker}\nbelow\n")
    assert "# Mine\n\nabove\nbelow\n" in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert root(text) == text


@pytest.mark.fault(
    "text",
    "One of our markers in the README lacks its partner, or stands there twice",
    "The owner loses no text.",
)
def test_damaged_markers_before_a_whole_part_cost_the_owner_no_text() -> None:
    whole = root("# Mine\n\nabove\n")
    damaged = whole.replace(BEGIN, f"{BEGIN}\nkept\n{BEGIN}") + f"{END}\n"
    text = root(damaged)
    assert "kept" in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert root(text) == text


@pytest.mark.fault(
    "text",
    "Our part stands in the README twice",
    "One of them goes.",
)
def test_a_second_copy_of_our_part_goes() -> None:
    whole = root("# Mine\n")
    section = whole[whole.index(BEGIN) : whole.index(END) + len(END)]
    text = root(f"{whole}\nbetween\n\n{section}\nafter\n")
    assert text.count(BEGIN) == 1
    assert text.index(BEGIN) < text.index("between") < text.index("after")


def test_another_repo_without_a_main_model_names_what_it_was_made_from() -> None:
    text = root(None, has_main_model=False, location="bob/tiny-quantized")
    assert front(text) == {
        "tags": ["torchao", "smolquant"],
        "library_name": "transformers",
        "base_model_relation": "quantized",
        "base_model": REPO,
    }
    assert f"made from [alice/tiny](https://huggingface.co/{REPO})" in text
    again = record(source=SourceRecord(NEW, 1_000_000, "carol/other"))
    assert front(root(text, again, has_main_model=False, location="bob/x"))["base_model"] == (
        "carol/other"
    )


def test_in_the_models_own_repo_only_tags_are_added() -> None:
    assert front(root(None)).keys() == {"tags"}
    from_folder = record(source=SourceRecord(NEW, 1_000_000))
    assert front(root(None, from_folder)).keys() == {"tags"}


def test_variants_of_several_sources_name_them_all() -> None:
    other = record("int4", source=SourceRecord(OLD, 1_000_000, "bob/base"))
    text = root(None, record(), other, has_main_model=False, location="c/d")
    assert front(text)["base_model"] == [REPO, "bob/base"]


def test_a_variant_from_an_older_source_is_marked() -> None:
    old = record("int4", source=SourceRecord(OLD, 900_000, REPO))
    text = root(None, record(), old)
    rows = {row[0]: row for row in table_rows(text)}
    assert "[int4](int4/README.md) †" in rows
    assert "[int8](int8/README.md)" in rows
    assert rows["main model"][2] == "1.00 MB"
    assert "† This variant was made from another source" in text
    assert "†" not in root(None, record())


def test_metrics_are_shown_only_where_measured() -> None:
    text = root(None, record("int8", metrics=METRICS), record("int4"))
    header, _, main, int8, int4 = table_rows(text)
    column = header.index("Perplexity")
    assert header[column:] == [
        "Perplexity", "Perplexity increase", "Mean KL", "Same top token",
        "Tokens/s", "Prompt tokens/s", "Peak memory",
    ]  # fmt: skip
    assert main[column:] == ["12.000", "", "", "", "20.0", "300.0", "900 MB"]
    assert int8[column:] == ["12.346", "+2.88%", "0.0123", "95.0%", "40.0", "500.0", "700 MB"]
    assert set(int4[column:]) == {""}
    only_speed = root(None, record(metrics=Metrics(tokens_per_second=3.0)))
    assert "Tokens/s" in only_speed
    assert "Perplexity" not in only_speed


@pytest.mark.fault(
    "record",
    "A record holds NaN, infinity or another number that is none",
    "It is not shown.",
)
def test_a_number_that_is_none_is_not_shown() -> None:
    assert "nan" not in root(None, record(metrics=Metrics(perplexity=float("nan"))))


def test_what_was_nearly_kept_does_not_read_as_wholly_kept() -> None:
    close = replace(
        METRICS, mean_kl=0.0000123, top1_agreement=0.9996, perplexity_increase_percent=0.0034
    )
    shown = ["+0.0034%", "0.0000123", "99.96%"]
    header, _, _, int8 = table_rows(root(None, record(metrics=close)))
    column = header.index("Perplexity increase")
    assert int8[column : column + 3] == shown
    rows = {row[0]: row[1] for row in table_rows(card(record(metrics=close)))}
    assert [rows[title] for title in header[column : column + 3]] == shown


def pair(int4: Metrics, **changes: Any) -> tuple[str, dict[str, dict[str, str]]]:
    """The root card of int8 with METRICS and int4 with its own; its table as row -> column -> cell."""
    text = root(None, record("int8", metrics=METRICS), record("int4", metrics=int4), **changes)
    header, _, *rows = table_rows(text)
    names = {"[int8](int8/README.md)": "int8", "[int4](int4/README.md)": "int4"}
    return text, {
        names.get(row[0].removesuffix(" †"), row[0]): dict(zip(header, row, strict=True))
        for row in rows
    }


def test_the_table_says_once_what_all_its_numbers_were_measured_on() -> None:
    text, rows = pair(replace(METRICS, perplexity=13.5, tokens_per_second=50.0))
    assert (
        "\n\nsmolquant measured quality on 4,088 tokens of Debian Reference, six languages; "
        "speed and memory on AMD EPYC, 2 cores.\n\n"
    ) in text
    assert [rows[name]["Perplexity"] for name in ("main model", "int8", "int4")] == [
        "12.000", "12.346", "13.500",
    ]  # fmt: skip
    assert [rows[name]["Tokens/s"] for name in ("main model", "int8", "int4")] == [
        "20.0", "40.0", "50.0",
    ]  # fmt: skip
    assert "→" not in text


def test_speeds_of_two_machines_stand_beside_the_originals_of_each() -> None:
    on_cpu = replace(
        METRICS,
        tokens_per_second=9.0,
        source_tokens_per_second=4.0,
        prefill_tokens_per_second=90.0,
        source_prefill_tokens_per_second=60.0,
        peak_memory_bytes=500_000_000,
        source_peak_memory_bytes=1_100_000_000,
        machine="ARM, 4 cores",
    )
    text, rows = pair(on_cpu)
    speeds = ("Tokens/s", "Prompt tokens/s", "Peak memory")
    assert [rows["main model"][title] for title in speeds] == ["", "", ""]
    assert [rows["int8"][title] for title in speeds] == [
        "20.0 → 40.0", "300.0 → 500.0", "900 MB → 700 MB",
    ]  # fmt: skip
    assert [rows["int4"][title] for title in speeds] == [
        "4.0 → 9.0", "60.0 → 90.0", "1.10 GB → 500 MB",
    ]  # fmt: skip
    assert [row["Perplexity"] for row in rows.values()] == ["12.000", "12.346", "12.346"]
    assert (
        "six languages; speed and memory on AMD EPYC, 2 cores (int8) and ARM, 4 cores (int4).\n"
        "Where a cell holds two numbers, the first is the original's"
    ) in text


@pytest.mark.parametrize(
    ("on", "said"),
    [
        (
            {"text": "notes.txt", "text_sha256": "f" * 64, "tokens": 2000},
            "on 4,088 tokens of Debian Reference, six languages (int8) "
            "and 2,000 tokens of notes.txt (int4);",
        ),
        (
            {"tokens": 2044},
            "on 4,088 tokens of Debian Reference, six languages (int8) "
            "and 2,044 tokens of Debian Reference, six languages (int4);",
        ),
        (
            {"text_sha256": "f" * 64},
            "on 4,088 tokens of Debian Reference, six languages, sha256 eeeeeeee (int8) "
            "and 4,088 tokens of Debian Reference, six languages, sha256 ffffffff (int4);",
        ),
    ],
    ids=["another text", "less of it", "another text of that name"],
)
def test_perplexities_on_two_texts_stand_beside_the_originals_on_each(
    on: dict[str, Any], said: str
) -> None:
    text, rows = pair(replace(METRICS, **on))
    assert rows["main model"]["Perplexity"] == ""
    assert rows["int8"]["Perplexity"] == rows["int4"]["Perplexity"] == "12.000 → 12.346"
    assert said in text
    assert [row["Tokens/s"] for row in rows.values()] == ["20.0", "40.0", "40.0"]


def test_equal_speeds_on_two_machines_are_not_taken_for_one_measurement() -> None:
    text, rows = pair(replace(METRICS, machine="ARM, 4 cores"))
    assert [row["Tokens/s"] for row in rows.values()] == ["", "20.0 → 40.0", "20.0 → 40.0"]
    assert "on AMD EPYC, 2 cores (int8) and ARM, 4 cores (int4)." in text


def test_a_machine_that_was_slower_the_other_time_is_not_taken_for_one_measurement() -> None:
    _, rows = pair(replace(METRICS, tokens_per_second=30.0, source_tokens_per_second=15.0))
    assert [row["Tokens/s"] for row in rows.values()] == ["", "20.0 → 40.0", "15.0 → 30.0"]


def test_the_main_models_row_takes_no_number_of_an_older_source() -> None:
    header, _, main, int8 = table_rows(
        root(
            None,
            record("int8", metrics=METRICS, source=SourceRecord(OLD, 1_000_000, REPO)),
            record("int4"),
        )
    )[:4]
    column = header.index("Perplexity")
    assert (main[0], set(main[column:])) == ("main model", {""})
    assert (int8[column], int8[-1]) == ("12.000 → 12.346", "900 MB → 700 MB")


def test_without_a_main_model_the_original_stands_beside_each_variant() -> None:
    text, rows = pair(METRICS, has_main_model=False, location="bob/tiny-quantized")
    assert [row["Perplexity"] for row in rows.values()] == ["12.000 → 12.346"] * 2
    assert "Where a cell holds two numbers" in text


def test_a_variant_alone_is_shown_where_the_original_did_not_run() -> None:
    alone = replace(METRICS, source_tokens_per_second=None)
    header, _, main, int8 = table_rows(root(None, record(metrics=alone)))
    column = header.index("Tokens/s")
    assert (main[column], int8[column]) == ("", "40.0")


def test_of_a_machine_nothing_is_said_where_only_quality_was_measured() -> None:
    text = root(
        None, record(metrics=replace(Metrics(mean_kl=0.1), text="a", tokens=9, machine="m"))
    )
    assert "\nsmolquant measured quality on 9 tokens of a.\n" in text
    assert "measured" not in root(None, record())


@pytest.mark.fault(
    "text",
    "A published record holds markdown, HTML or line ends",
    "It is shown as text; nothing breaks out of the card.",
)
def test_nothing_from_a_published_record_breaks_out_of_the_card() -> None:
    evil = f"x|y\n{END}<script>[a](javascript:b)`"
    hostile = record(
        quant_type=evil,
        metrics=replace(METRICS, text=evil, text_sha256=evil, machine=evil),
        source=SourceRecord(NEW, 0, evil),
        tensors={evil: TensorRecord(False, 0, 0, reason=evil)},
    )
    text = root_card(
        "# Mine\n",
        {
            "int8": record(metrics=replace(METRICS, text=evil)),
            evil: replace(hostile, variant=evil),
        },
        location=REPO,
        has_main_model=False,
        source_identity=NEW,
    )
    assert text.count(END) == 1
    assert "<script>" not in re.sub(r"\\<script\\>", "", text)
    assert "[a](" not in text
    assert len({len(row) for row in table_rows(text)}) == 1
    assert "base_model" not in front(text)


# The variants' own cards


def test_a_variants_card_tells_the_hub_what_it_is() -> None:
    made = front(card(record("int4")))
    assert made == {
        "base_model": REPO,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["torchao", "smolquant", "int4_weight_only"],
    }
    assert front(card(record(metrics=METRICS)))["metrics"] == ["perplexity"]
    assert "base_model" not in front(card(record(), base_model=None))
    assert "base_model_relation" not in front(card(record(), base_model=None))


def results(text: str) -> list[EvalResult]:
    """What the Hub's own client reads from a card."""
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data.eval_results or []


def test_a_variants_card_gives_its_metrics_in_the_hubs_format() -> None:
    text = card(record("int4", metrics=replace(METRICS, text="My text.txt", tokens=4096)))
    (index,) = front(text)["model-index"]
    assert index["name"] == "tiny, int4"
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in results(text)} == {
        ("text-generation", "text", "My text.txt")
    }
    assert [(r.metric_type, r.metric_value) for r in results(text)] == [
        ("perplexity", 12.3456),
        ("kl_divergence", 0.0123),
        ("top1_agreement", 0.95),
    ]


def test_the_hubs_client_keeps_a_cards_metrics_when_it_saves_the_card(tmp_path: Path) -> None:
    text = card(record(metrics=replace(METRICS, text='a: "b"\n- c')))
    path = tmp_path / "README.md"
    ModelCard(text).save(path)
    assert metadata_load(path) == front(text)
    metadata_save(path, front(text))
    assert ModelCard.load(path).data.to_dict() == front(text)
    assert results(path.read_text(encoding="utf-8")) == results(text)


@pytest.mark.parametrize(
    ("metrics", "types"),
    [
        (None, []),
        (Metrics(tokens_per_second=3.0), []),
        (Metrics(mean_kl=0.1), ["kl_divergence"]),
        (Metrics(perplexity=float("inf"), top1_agreement=0.5), ["top1_agreement"]),
    ],
)
def test_only_what_was_measured_is_in_the_front_matter(
    metrics: Metrics | None, types: list[str]
) -> None:
    text = card(record(metrics=metrics))
    assert [result.metric_type for result in results(text)] == types
    assert ("model-index" in front(text)) == bool(types)


def test_a_variants_metrics_never_reach_the_root_card() -> None:
    for changes in ({}, {"has_main_model": False, "location": "bob/tiny-quantized"}):
        assert "model-index" not in front(root(None, record(metrics=METRICS), **changes))


def test_a_variants_card_shows_its_picture() -> None:
    with_plot = record(files={**record().files, PLOT: FileRecord("e" * 64, 9000)})
    text = card(with_plot)
    assert re.search(rf"^!\[Relative error [^\]]+\]\({PLOT}\)$", text, re.MULTILINE)
    assert "1.00%, in `model.layers.0.mlp.up_proj.weight`" in text
    assert PLOT not in card(record())


def test_a_variants_card_gives_sizes_coverage_and_reasons() -> None:
    text = card(record("int4"))
    assert "550 kB, 55.0% of the original's 1.00 MB" in text
    assert "3 tensors quantized, 1 kept in `bfloat16`" in text
    assert "64 in 3 tensors" in text
    assert ["`model.embed_tokens.weight`", "embedding", "100 kB"] in table_rows(text)
    assert "`model.layers.*.mlp.up_proj.weight` ×3" in text
    assert "576 columns are not a multiple of 128" in text
    assert "`torch 2.13.0`, `torchao 0.18.0`" in text
    assert "`sha256:" + "a" * 64 + "` at commit `" + "c" * 40 + "`" in text


def test_a_variants_card_claims_nothing_unmeasured() -> None:
    text = card(record())
    for word in ("erplexity", "Tokens/s", "KL", "What it cost"):
        assert word not in text


def test_a_variants_card_holds_every_number_against_the_originals() -> None:
    text = card(record(metrics=METRICS))
    rows = table_rows(text)
    start = rows.index(["", "This variant", "Original"])
    assert rows[start + 2 : start + 9] == [
        ["Perplexity", "12.346", "12.000"],
        ["Perplexity increase", "+2.88%", ""],
        ["Mean KL", "0.0123", ""],
        ["Same top token", "95.0%", ""],
        ["Tokens/s", "40.0", "20.0"],
        ["Prompt tokens/s", "500.0", "300.0"],
        ["Peak memory", "700 MB", "900 MB"],
    ]


def test_a_variants_card_says_what_was_measured_on_what() -> None:
    text = " ".join(card(record(metrics=METRICS)).split())
    on_text = "on the same 4,088 tokens of `Debian Reference, six languages`."
    on_machine = "Speed and memory are those of one machine: `AMD EPYC, 2 cores`."
    assert f"and the original {on_text}" in text
    assert on_machine in text
    quality = Metrics(mean_kl=0.1, text="a", tokens=9, machine="m")
    assert "one machine" not in card(record(metrics=quality))
    speed = Metrics(tokens_per_second=3.0, text="a", tokens=9, machine="m")
    assert "tokens of" not in card(record(metrics=speed))


@pytest.mark.parametrize("variant", BY_VARIANT)
def test_a_variants_snippets_are_whole_programs(variant: str) -> None:
    text = card(record(variant))
    assert snippets(text)
    for snippet in snippets(text):
        ast.parse(snippet)
        assert "generate" in snippet
    warns = "Stock transformers alone cannot run int4 on a CPU" in text
    assert warns == (variant == "int4")
    if variant == "int4":
        smolquant, stock = snippets(text)
        assert 'smolquant.load("alice/tiny", variant="int4")' in smolquant
        assert stock.startswith("import smolquant.torchao\n")
        assert 'device_map="cpu"' in stock
    else:
        assert "smolquant" not in snippets(text)[0]


@pytest.mark.fault(
    "text",
    "A folder's name holds quotes or backslashes",
    "The snippets on the card hold it as a correct string.",
)
def test_a_folders_name_is_a_correct_string_in_the_snippets() -> None:
    folder = 'C:\\odd "folder"'
    calls = [
        node
        for node in ast.walk(ast.parse(snippets(card(record(), location=folder))[0]))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    ]
    assert folder in [call.args[0].value for call in calls]  # type: ignore[attr-defined]


@pytest.mark.fault(
    "text",
    "Names of tensors hold markdown or HTML",
    "They are shown as text.",
)
def test_names_and_reasons_of_a_variants_card_are_escaped() -> None:
    evil = "a|b <script>\n# heading"
    tensors = {evil: TensorRecord(False, 1, 1, reason=evil)}
    text = card(record(tensors=tensors))
    assert "<script>" not in re.sub(r"\\<script\\>", "", text)
    assert "\n# heading" not in text
    assert {len(row) for row in table_rows(text)} == {3}


class Elsewhere(Int8WeightOnly):
    """A scheme whose kernels few machines have."""

    variant: ClassVar = "toy"
    quant_type: ClassVar = "toy_type"
    title: ClassVar = "toy weights"
    caution: ClassVar = "It needs a rare GPU."
    cuda_capability: ClassVar = (8, 9)
    measured_as: ClassVar = "It was measured another way."


def test_a_scheme_of_its_own_has_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BY_VARIANT, "toy", Elsewhere())
    text = card(record("toy"))
    assert "It has toy weights (`toy_type`)." in text
    assert "How to load\n\nIt needs a rare GPU.\n\n```sh\npip install torch" in text
    whole = root(None, record("int8"), record("toy"))
    assert "\n**toy**: It needs a rare GPU.\n" in whole
    assert "- **toy** has toy weights." in whole
    assert 'from_pretrained("alice/tiny", subfolder="toy", device_map="auto")' in whole


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (METRICS, True),
        (replace(METRICS, compute_capability=8.6), True),
        (replace(METRICS, compute_capability=8.9), False),
        (replace(METRICS, compute_capability=12.0), False),
        (Metrics(tokens_per_second=3.0), False),
        (None, False),
    ],
)
def test_what_was_measured_without_its_kernels_says_so(
    metrics: Metrics | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BY_VARIANT, "toy", Elsewhere())
    made = record("toy", metrics=metrics)
    assert ("It was measured another way." in card(made)) == told
    assert ("**toy**: It was measured another way." in root(None, made)) == told


# The front matter on its own


def test_the_license_is_read_from_the_front_matter() -> None:
    text = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [a]\n---\n"
    assert declared_license(text) == {
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
    }
    assert declared_license(None) == {}
    assert declared_license("---\nlicense: [mit]\n---\n") == {}


def test_a_value_is_replaced_with_its_comments_around_it_kept() -> None:
    readme = Readme.split("---\n# top\nbase_model:\n- a/b\n# below\nlicense: mit # why\n---\nText")
    changed = readme.with_value("base_model", "c/d")
    assert changed.front == "# top\nbase_model: c/d\n# below\nlicense: mit # why"
    assert yaml.safe_load(changed.front) == {"base_model": "c/d", "license": "mit"}
    assert changed.with_value("base_model", "c/d") is changed


def test_what_only_smolquant_loads_is_not_said_to_need_less() -> None:
    """Experts that are multiplied from the right, of a scheme that stock transformers loads otherwise."""
    stack = TensorRecord(True, 8, 4, relative_error=0.01, kind="expert", experts=4, transposed=True)
    made = record(tensors={"model.layers.0.mlp.experts.gate_up_proj": stack})
    for text in (card(made), root(None, made)):
        assert "To load it, you need smolquant." in text
        assert BY_VARIANT["int8"].loading not in text
        assert 'subfolder="int8"' not in text
    assert BY_VARIANT["int8"].loading in card(record())
