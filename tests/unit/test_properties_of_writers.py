"""What holds for any text in what is written: cards, summaries, step outputs."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from smolquant.errors import CheckpointError, InputError
from smolquant.publish.cards import root_card, variant_card
from smolquant.publish.front_matter import Readme
from smolquant.publish.section import BEGIN, END
from smolquant.record import Metrics, SourceRecord, TensorRecord, VariantRecord
from smolquant.report.files import step_outputs, write_outputs
from smolquant.report.run_report import PlannedVariant, RunReport
from smolquant.report.summary import render_summary
from smolquant.text import one_line
from unit.report_samples import REPO_URL, run_result, variant_record

REPO = "alice/tiny"

fewer = settings(max_examples=settings().max_examples // 3)
"""For what takes long: the Hub's client and PyYAML make a card in 20 ms."""

HOSTILE = st.lists(
    st.sampled_from(
        [
            "\n", "\r", "\r\n", "\n\n", "|", "`", "```", "~~~", "<script>", "</details>", "<details>", "# ",
            "\n# ", "---", "\n---\n", "[a](http://b)", "![a](b)", "<!-- ", " -->", BEGIN, END, "\\", "*",
            "_", "&lt;", "$x$", "- ", "1. ", "> ", "{{ x }}", "{% x %}", "\x1b[31m", "\u202e", "\u2028",
            "\x85", "\x00", "\ud800", "\t", ": ", "::error::", "é", "a",
        ]
    )
    | st.text(max_size=5),
    max_size=8,
).map("".join)  # fmt: skip
"""Texts out of what means something in markdown, HTML, YAML, Jinja or a terminal."""


# The root card

LINES = st.lists(
    st.sampled_from(
        [
            "# Mine", "", "  indented", "| a | b |", "```", "---", "tags:", "- x", BEGIN, END,
            f"x {BEGIN} y", "é", "\t",
        ]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    max_size=10,
)  # fmt: skip
OWNERS = st.tuples(LINES, st.sampled_from(["\n", "\r\n"])).map(
    lambda drawn: drawn[1].join(drawn[0])
)


def root(existing: str | None, **changes: Any) -> str:
    records = {name: variant_record(name) for name in ("int8", "int4")}
    values: dict[str, Any] = {
        "records": records,
        "location": REPO,
        "has_main_model": True,
        "source_identity": records["int8"].source.identity,
    }
    try:
        return root_card(existing, **(values | changes))
    except InputError:  # front matter that cannot be read; test_properties_of_readers.py
        reject()


def outside_of_ours(card: str) -> str:
    before, _, rest = card.partition(BEGIN)
    return before + rest.partition(END)[2]


@pytest.mark.fault(
    "text",
    "The owner's README is any text at all",
    "It survives, outside of our two markers.",
)
@fewer
@given(OWNERS.filter(lambda text: text and BEGIN not in text and END not in text))
@example(" ")
@example("no end of line")
@example("\r\n\r\n")
def test_the_owners_text_survives_whatever_it_is(owner: str) -> None:
    readme, card = Readme.split(owner), Readme.split(root(owner))
    before, begun, rest = card.body.partition(BEGIN)
    assert begun
    assert before.rstrip() == readme.body.rstrip()
    assert rest.partition(END)[1:] == (END, card.newline)


@pytest.mark.fault(
    "text",
    "One of our markers in the README lacks its partner, or stands there twice",
    "The owner loses no text.",
)
@fewer
@given(OWNERS)
@example(f"above\n{BEGIN}\nbetween\n{END}\nbelow\n{BEGIN}\nopen")
@example(f"{END}{BEGIN}{END}{BEGIN}")
def test_of_damaged_markers_one_part_is_left_and_the_second_time_changes_nothing(
    owner: str,
) -> None:
    card = root(owner)
    assert (card.count(BEGIN), card.count(END)) == (1, 1)
    assert root(card) == card
    other = root(card, has_main_model=False)
    assert outside_of_ours(Readme.split(other).body) == outside_of_ours(Readme.split(card).body)


# Texts of a record in the cards


def hostile_record(text: str) -> VariantRecord:
    made = variant_record("int8")
    return replace(
        made,
        quant_type=f"q{text}",
        source=SourceRecord(f"i{text}", 1000, f"r{text}"),
        tensors={f"n{text}": TensorRecord(False, 9, 9, reason=f"w{text}", kind=f"k{text}")},
        metrics=Metrics(
            perplexity=9.0,
            source_perplexity=8.0,
            tokens_per_second=3.0,
            text=f"t{text}",
            text_sha256=f"s{text}",
            machine=f"m{text}",
        ),
    )


def skeleton(markdown: str) -> list[tuple[str, int]]:
    """What a line is, by what it begins with, and how many cells it has; blank lines as well."""
    return [
        (re.match(r"(?:[#>|~-]|<(?!code>))*", line)[0], len(re.findall(r"(?<!\\)\|", line)))  # type: ignore[index]
        for line in markdown.split("\n")
    ]


@pytest.mark.fault(
    "text",
    "A published record holds any text at all",
    "The cards have the lines, headings and cells that they have without it.",
)
@fewer
@given(HOSTILE)
def test_no_text_of_a_record_changes_what_a_root_card_is_made_of(text: str) -> None:
    """Neither lines, headings, cells nor markers."""
    card = root("# Mine\n", records={"int8": hostile_record(text)}, has_main_model=False)
    plain = root("# Mine\n", records={"int8": hostile_record("")}, has_main_model=False)
    assert skeleton(Readme.split(card).body) == skeleton(Readme.split(plain).body)
    assert (card.count(BEGIN), card.count(END)) == (1, 1)
    assert not re.search(r"(?<!\\)<(?!!-- smolquant|/?(?:br|code|details|summary))", card)
    card.encode()


@pytest.mark.fault(
    "text",
    "A published record holds any text at all",
    "The cards have the lines, headings and cells that they have without it.",
)
@fewer
@given(HOSTILE, HOSTILE)
def test_no_text_of_a_record_changes_what_a_variants_card_is_made_of(text: str, terms: str) -> None:
    def card(text: str, terms: str) -> str:
        return variant_card(
            hostile_record(text), location=REPO, base_model=None, terms={"license": f"l{terms}"}
        )

    made, plain = Readme.split(card(text, terms)), Readme.split(card("", ""))
    assert skeleton(made.body) == skeleton(plain.body)
    assert made.values().keys() == plain.values().keys()
    assert made.values()["license"] == one_line(f"l{terms}")
    made.join().encode()


# The job summary


def summary_of(text: str) -> str:
    plan = PlannedVariant(
        "int8_weight_only", {f"n{text}": TensorRecord(False, 9, 9, reason=f"r{text}")}, 9
    )
    return render_summary(
        run_result(
            planned={"int8": plan},
            variants={},
            model=f"m{text}",
            versions={f"k{text}": f"v{text}"},
            error=CheckpointError(f"e{text}", hint=f"h{text}"),
            unmeasured=f"u{text}",
        )
    )


@pytest.mark.fault(
    "text",
    "A model, its weights or an error hold any text at all",
    "The job summary has the lines, headings and cells that it has without it.",
)
@given(HOSTILE)
def test_no_text_changes_what_a_summary_is_made_of(text: str) -> None:
    summary = summary_of(text)
    assert skeleton(summary) == skeleton(summary_of(""))
    summary.encode()


# Step outputs

VALUES = HOSTILE | st.text(max_size=20)


def as_the_runner_reads(content: str) -> dict[str, str]:
    """The outputs of a step, as ``FileCommandManager`` of actions/runner parses them."""
    outputs, lines = {}, iter(content.split("\n"))
    for line in lines:
        name, heredoc, delimiter = line.partition("<<")
        if "=" in name or not heredoc:
            name, assigned, value = line.partition("=")
            assert assigned or not line, line
            if assigned:
                outputs[name] = value
            continue
        inside: list[str] = []
        while (part := next(lines)) != delimiter:
            inside.append(part)
        outputs[name] = "\n".join(inside)
    return outputs


@pytest.mark.fault(
    "text",
    "A value holds what looks like another step output",
    "It stays one value.",
)
@given(
    st.sampled_from(["", "mine=1", "mine=1\n", "mine<<E\n1\nE\n", "é=1"]), VALUES, VALUES, VALUES
)
def test_any_value_of_an_output_can_be_read_back_and_joins_no_other(
    earlier: str, repo: str, commit: str, tracking: str
) -> None:
    result: RunReport = run_result("int8", repo_url=repo, commit_sha=commit, trackio_url=tracking)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "output"
        file.write_text(earlier, encoding="utf-8")
        write_outputs(result, {"GITHUB_OUTPUT": str(file)})
        read = as_the_runner_reads(file.read_bytes().decode())
    expected = as_the_runner_reads(earlier) | step_outputs(result, {})
    assert read == expected
    assert read["int8-url"] == f"{REPO_URL}/tree/main/int8"
