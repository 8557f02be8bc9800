"""The model cards: whose text stays, what is claimed, and that nothing untrusted breaks out."""

import ast
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, metadata_save

from smolquant.errors import InputError
from smolquant.publish.cards import root_card, variant_card
from smolquant.publish.front_matter import Readme, declared_license
from smolquant.publish.section import BEGIN, END
from smolquant.record import FileRecord, Metrics, SourceRecord, TensorRecord, VariantRecord
from smolquant.report.measures import speed_words
from smolquant.report.overview import FILE_NAME as OVERVIEW
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
    text="A Manual, six languages",
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


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, without the row of rules, their unbreakable spaces made plain."""
    found = re.findall(r"(?:^\| .*\n)+", text.replace("\u00a0", " "), re.MULTILINE)
    return [
        [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for index, line in enumerate(table.splitlines())
            if index != 1
        ]
        for table in found
    ]


def table_rows(text: str) -> list[list[str]]:
    return [row for table in tables(text) for row in table]


def main_table(text: str) -> dict[str, dict[str, str]]:
    """The root's table that all see: variant -> column -> cell."""
    header, *rows = tables(text)[0]
    names = [re.sub(r"^\[([^]]*)\]\(.*\)", r"\1", row[0]).replace("\\", "") for row in rows]
    return {
        name: dict(zip(header, row, strict=True)) for name, row in zip(names, rows, strict=True)
    }


def advice(text: str) -> dict[str, str]:
    """What is said of each variant under "Which one to choose"."""
    part = text.partition("### Which one to choose")[2].partition("### How to load")[0]
    return dict(re.findall(r"^- \*\*(.*?)\*\* (.*)$", part, re.MULTILINE))


# The root card


def test_a_new_root_card_lists_every_variant_with_its_numbers_and_snippets() -> None:
    text = root(None, record("int4"), record("int8"), record("int8_dynamic"))
    rows = main_table(text)
    assert list(rows) == ["main model", "int8", "int4", "int8_dynamic"]
    assert rows["int8"] == {
        "Variant": "[int8](int8/README.md)",
        "Size": "550 kB (55.0%)",
        "Best for": BY_VARIANT["int8"].best_for,
    }
    assert (rows["main model"]["Size"], rows["main model"]["Best for"]) == (
        "1.00 MB",
        "losing nothing",
    )
    assert ["[int8](int8/README.md)", "int8\\_weight\\_only", "3 / 1"] in tables(text)[1]
    assert "# tiny" in text
    assert "Stock transformers alone cannot run int4 on a CPU" in text
    for variant in ("int8", "int4", "int8_dynamic"):
        assert f'repo = "alice/tiny"\nvariant = "{variant}"\n' in text
        assert f'smolquant.load("alice/tiny", variant="{variant}")' in text
    for snippet in snippets(text):
        ast.parse(snippet)
    assert len(snippets(text)) == 7  # two ways for each, and the main model


def test_only_what_exists_is_shown() -> None:
    text = root(None, record("int8"), has_main_model=False)
    assert "main model" not in text
    assert "int4" not in text
    assert len(snippets(text)) == 2


def test_ten_variants_have_a_row_each_whatever_made_them() -> None:
    """Five of this version's, and five of later ones that it knows nothing of."""
    names = [*BY_VARIANT, *(f"later{number}" for number in range(5))]
    assert len(names) >= 10
    records = [
        record(name) if name in BY_VARIANT else replace(record(), variant=name, quant_type=name)
        for name in names
    ]
    text = root(None, *records)
    assert list(main_table(text)) == ["main model", *names]
    assert root(text, *reversed(records)) == text
    for name in BY_VARIANT:
        assert f'variant="{name}"' in text


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
    rows = {row["Variant"]: row for row in main_table(text).values()}
    assert "[int4](int4/README.md) †" in rows
    assert "[int8](int8/README.md)" in rows
    assert rows["main model"]["Size"] == "1.00 MB"
    assert "† This variant was made from another source" in text
    assert "†" not in root(None, record())


def test_metrics_are_shown_only_where_measured() -> None:
    text = root(None, record("int8", metrics=METRICS), record("int4"))
    rows = main_table(text)
    assert list(rows["int8"]) == [
        "Variant", "Size", "Perplexity change", "Same top token", "Best for",
    ]  # fmt: skip
    numbers = {name: list(row.values())[2:4] for name, row in rows.items()}
    assert numbers == {
        "main model": ["", ""],
        "int8": ["+2.88%", "95.0%"],
        "int4": ["", ""],
    }
    assert list(main_table(root(None, record()))["int8"]) == ["Variant", "Size", "Best for"]
    only_speed = root(None, record(metrics=Metrics(tokens_per_second=3.0)))
    assert "generates 3.0 tokens a second." in only_speed
    assert "erplexity" not in only_speed


def test_each_number_is_explained_once_beside_the_table() -> None:
    text = root(None, record("int8", metrics=METRICS), record("int4", metrics=METRICS))
    for title in ("Perplexity change", "Same top token", "Perplexity", "Mean KL"):
        assert len(re.findall(rf"^- \*\*{title}\*\*: .*\.$", text, re.MULTILINE)) == 1
    assert "how often the variant's first choice of the next token is the original's" in text
    assert "**Same top token**" not in root(None, record())


def test_what_few_ask_for_is_folded_away() -> None:
    text = root(None, record("int8", metrics=METRICS))
    shown = re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
    assert len(tables(shown)) == 1
    assert "tokens a second" not in shown
    more = text.partition("<summary>More numbers</summary>")[2]
    assert tables(more)[0][0] == [
        "Variant", "Type", "Tensors quantized / kept", "Perplexity", "Mean KL",
    ]  # fmt: skip
    assert tables(more)[0][1][2:] == ["3 / 1", "12.000 → 12.346", "0.0123"]
    assert tables(more)[1] == [
        ["Variant", "Peak memory"],
        ["[int8](int8/README.md)", "900 MB → 700 MB"],
    ]
    assert (
        "- **int8** generates 40.0 tokens a second (the original: 20.0) and reads a prompt at "
        "500.0 tokens a second (the original: 300.0)."
    ) in more


@pytest.mark.parametrize(
    ("spread", "said"),
    [
        (
            (1.4, 1.6),
            "(the original: 20.0), 1.50 times its speed (half of the rounds: 1.40 to 1.60)",
        ),
        ((0.9, 1.6), "(the original: 20.0), no difference measured"),
        (None, "(the original: 20.0) and"),
    ],
)
def test_a_speed_is_told_with_what_the_rounds_show(
    spread: tuple[float, float] | None, said: str
) -> None:
    metrics = replace(METRICS, speed_ratio=1.5, speed_ratio_spread=spread)
    assert said in speed_words(metrics)


def test_blocks_of_a_folded_part_are_set_apart_so_that_they_are_read_as_markdown() -> None:
    lines = root(None, record("int8", metrics=METRICS), record("int4")).split("\n")
    for before, line in pairwise(lines):
        if line.startswith(("<details", "</details>", "```sh", "###")):
            assert before == ""
        if before.startswith("<details"):
            assert line == ""
        if line.startswith("|"):
            assert before == "" or before.startswith("|")


LOST_NOTHING = Metrics(perplexity_increase_percent=0.1, mean_kl=0.004, top1_agreement=0.99)
LOST_MUCH = Metrics(perplexity_increase_percent=30.7, mean_kl=0.29, top1_agreement=0.72)


def test_which_one_to_choose_follows_from_what_was_measured() -> None:
    text = root(
        None,
        record("int8", metrics=LOST_NOTHING),
        record("int4", metrics=LOST_MUCH),
        record("float8"),
    )
    told = advice(text)
    assert "It lost next to nothing (perplexity +0.1%, same top token 99.0%)." in told["int8"]
    assert f"Choose it for {BY_VARIANT['int8'].best_for}." in told["int8"]
    assert "It lost much (perplexity +30.7%, same top token 72.0%)." in told["int4"]
    assert "Choose it" not in told["int4"]
    assert "do not rely on it before" in told["int4"]
    assert "It was not measured, so how much it lost is not known." in told["float8"]
    rows = main_table(text)
    assert rows["int4"]["Best for"] == f"**lost much**; {BY_VARIANT['int4'].best_for}"
    assert rows["int8"]["Best for"] == BY_VARIANT["int8"].best_for


def test_where_nothing_was_measured_a_card_says_so_once() -> None:
    text = root(None, record("int8"), record("int4"))
    assert text.count("not measured") == 1
    assert not any("It lost" in told for told in advice(text).values())


def test_the_smallest_and_the_closest_are_named() -> None:
    small = {"files": {"model.safetensors": FileRecord("d" * 64, 300_000)}}
    text = root(
        None, record("int8", metrics=LOST_NOTHING), record("int4", metrics=LOST_MUCH, **small)
    )
    assert "**int4** is the smallest, and **int8** the closest to the original.\n" in text
    both = root(
        None, record("int8", metrics=LOST_MUCH), record("int4", metrics=LOST_NOTHING, **small)
    )
    assert "**int4** is both the smallest and the closest to the original.\n" in both
    third = record("float8")
    some = root(
        None,
        record("int8", metrics=LOST_NOTHING),
        record("int4", metrics=LOST_MUCH, **small),
        third,
    )
    assert "**int8** the closest to the original of those that were measured." in some
    assert "closest" not in root(None, record("int8", metrics=LOST_NOTHING))
    other = replace(LOST_MUCH, text="another", tokens=5)
    unlike = root(
        None, record("int8", metrics=LOST_NOTHING), record("int4", metrics=other, **small)
    )
    assert "closest" not in unlike
    assert "**int4** is the smallest." in unlike


def test_the_picture_of_all_variants_stands_on_the_root_card_if_there_is_one() -> None:
    assert f"]({OVERVIEW})\n" in root(None, record())
    assert OVERVIEW not in root(None, record(), has_picture=False)


def test_a_new_card_is_titled_by_the_models_name() -> None:
    text = root(None, record(), location="./quantized", name="My_Model")
    assert "\n# My\\_Model\n" in text
    of_variant = variant_card(
        record(metrics=METRICS), location="./quantized", base_model=None, terms={}, name="My_Model"
    )
    assert "\n# My\\_Model, int8\n" in of_variant
    assert front(of_variant)["model-index"][0]["name"] == "My_Model, int8"


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
    row = main_table(root(None, record(metrics=close)))["int8"]
    assert (row["Perplexity change"], row["Same top token"]) == ("+0.0034%", "99.96%")
    rows = {row[0]: row[1] for row in table_rows(card(record(metrics=close)))}
    assert rows["Mean KL"] == "0.0000123"
    assert rows["Same top token"] == "99.96%"


def pair(int4: Metrics, **changes: Any) -> str:
    """The root card of int8 with METRICS and int4 with its own."""
    return root(None, record("int8", metrics=METRICS), record("int4", metrics=int4), **changes)


def test_a_card_says_once_what_all_its_numbers_were_measured_on() -> None:
    text = pair(replace(METRICS, perplexity=13.5, tokens_per_second=50.0))
    assert "\n- **Measured on** 4,088 tokens of A Manual, six languages.\n" in text
    assert text.count("AMD EPYC, 2 cores.") == 1


@pytest.mark.parametrize(
    ("on", "said"),
    [
        (
            {"text": "notes.txt", "text_sha256": "f" * 64, "tokens": 2000},
            "4,088 tokens of A Manual, six languages (int8) and 2,000 tokens of notes.txt (int4).",
        ),
        (
            {"tokens": 2044},
            "4,088 tokens of A Manual, six languages (int8) "
            "and 2,044 tokens of A Manual, six languages (int4).",
        ),
        (
            {"text_sha256": "f" * 64},
            "4,088 tokens of A Manual, six languages, sha256 eeeeeeee (int8) "
            "and 4,088 tokens of A Manual, six languages, sha256 ffffffff (int4).",
        ),
    ],
    ids=["another text", "less of it", "another text of that name"],
)
def test_several_texts_are_told_with_their_variants(on: dict[str, Any], said: str) -> None:
    text = pair(replace(METRICS, **on, top1_agreement=0.9))
    assert f"\n- **Measured on** {said}\n" in text
    assert "closest" not in text, "unlike things are not compared"


def test_several_machines_are_told_with_their_variants() -> None:
    text = pair(replace(METRICS, machine="ARM, 4 cores"))
    assert "differ: AMD EPYC, 2 cores (int8) and ARM, 4 cores (int4).\n" in text


def test_a_variant_alone_is_shown_where_the_original_did_not_run() -> None:
    text = root(None, record(metrics=replace(METRICS, source_tokens_per_second=None)))
    assert "generates 40.0 tokens a second and reads a prompt" in text


def test_of_a_machine_nothing_is_said_where_only_quality_was_measured() -> None:
    text = root(
        None, record(metrics=replace(Metrics(mean_kl=0.1), text="a", tokens=9, machine="m"))
    )
    assert "\n- **Measured on** 9 tokens of a.\n" in text
    assert "machine" not in text.partition("More numbers")[2]


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
    assert all(len({len(row) for row in table}) == 1 for table in tables(text))
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
    assert rows[start + 1 : start + 6] == [
        ["Perplexity", "12.346", "12.000"],
        ["Perplexity change", "+2.88%", ""],
        ["Mean KL", "0.0123", ""],
        ["Same top token", "95.0%", ""],
        ["Peak memory", "700 MB", "900 MB"],
    ]
    assert "There the variant generates 40.0 tokens a second (the original: 20.0) and" in text
    for title in ("Perplexity", "Perplexity change", "Mean KL", "Same top token", "Peak memory"):
        assert f"\n- **{title}**: " in text


def test_a_variants_card_says_how_much_it_lost() -> None:
    assert "it lost much of the original's quality" in card(record(metrics=LOST_MUCH))
    assert "it lost next to nothing of the original's" in card(record(metrics=LOST_NOTHING))
    assert "How much it lost was not measured." in card(record())


def test_a_variants_card_says_what_was_measured_on_what() -> None:
    text = " ".join(card(record(metrics=METRICS)).split())
    on_text = "on the same 4,088 tokens of `A Manual, six languages`."
    on_machine = (
        "Speed and memory are those of one machine, and other machines differ: `AMD EPYC, 2 cores`."
    )
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
    first, second = snippets(text)
    smolquant, stock = (first, second) if variant == "int4" else (second, first)
    assert f'smolquant.load("alice/tiny", variant="{variant}")' in smolquant
    assert stock.startswith("import smolquant.torchao\n") == (variant == "int4")


@pytest.mark.fault(
    "text",
    "A folder's name holds quotes or backslashes",
    "The snippets on the card hold it as a correct string.",
)
def test_a_folders_name_is_a_correct_string_in_the_snippets() -> None:
    folder = 'C:\\odd "folder"'
    for snippet in snippets(card(record(), location=folder)):
        constants = [
            node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)
        ]
        assert folder in constants


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
    assert (
        "How to load\n\nIt needs a rare GPU.\n\n**transformers**\n\n```sh\npip install torch"
        in text
    )
    whole = root(None, record("int8"), record("toy"))
    assert "</summary>\n\nIt needs a rare GPU.\n" in whole
    assert "- **toy** has toy weights." in whole
    assert 'variant = "toy"\n' in whole


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
        assert "from_pretrained" not in text.partition("main model with")[0]
    assert BY_VARIANT["int8"].loading in card(record())
