"""An owner's README of any size and shape: kept to the letter or refused, and in seconds."""

import time

import pytest

from smolquant.checkpoint.files import pictures_shown
from smolquant.errors import InputError
from smolquant.publish.cards import root_card, same_owner_text, variant_card
from smolquant.publish.front_matter import Readme, check_kinds, declared_license, readme_text
from smolquant.publish.section import BEGIN, END
from smolquant.record import FileRecord, SourceRecord, TensorRecord, VariantRecord

REPO = "alice/tiny"
RECORD = VariantRecord(
    variant="int8",
    quant_type="int8_weight_only",
    source=SourceRecord("sha256:" + "a" * 64, 1_000_000, REPO, "c" * 40),
    options={"dtype": "auto", "skip": []},
    dtype="bfloat16",
    versions={"torch": "2.13.0"},
    tensors={"model.layers.0.mlp.up_proj.weight": TensorRecord(True, 300_000, 150_000)},
    files={"model.safetensors": FileRecord("d" * 64, 550_000)},
)


def root(existing: str) -> str:
    return root_card(
        existing,
        {"int8": RECORD},
        location=REPO,
        has_main_model=True,
        source_identity=RECORD.source.identity,
    )


def card(front: str) -> str:
    return f"---\n{front}\n---\nText\n"


def handled(readme: str) -> str:
    """The root card made from ``readme``, with all that a run does to one on the way."""
    text = readme_text(readme.encode(), "here")
    pictures_shown(text)
    check_kinds(text, "here")
    variant_card(RECORD, location=REPO, base_model=REPO, terms=declared_license(text))
    made = root(text)
    assert same_owner_text(text, made)
    assert root(made) == made
    return made


@pytest.mark.fault(
    "text",
    "The README is a megabyte of images, tags, markers, fences, rules or comments",
    "The card is made in seconds; the owner's text stays.",
)
@pytest.mark.parametrize(
    "readme",
    [
        "![" * 500_000,
        "<img " * 200_000,
        "![a](" * 200_000,
        BEGIN + "x\n" * 500_000,
        f"{BEGIN}\n" * 50_000,
        f"{BEGIN}{END}\n" * 30_000,
        "```\n" * 300_000,
        "---\n" * 300_000,
        " " * 1_000_000,
        card("license: mit\n" + "# c\n" * 100_000),
        card("license: mit\nlist: [" + "a," * 50_000 + "]"),
    ],
    ids=[
        "images", "tags", "targets", "no end", "begins", "parts", "fences", "rules", "spaces",
        "comments", "list",
    ],
)  # fmt: skip
def test_a_readme_of_any_shape_takes_seconds(readme: str) -> None:
    started = time.process_time()
    handled(readme)
    assert time.process_time() - started < 5


def laughs(item: str) -> str:
    lines = [f"a{i}: &a{i} {item.format(','.join([f'*a{i - 1}'] * 10))}" for i in range(1, 30)]
    return "\n".join(["a0: &a0 {x: 1}", *lines])


@pytest.mark.fault(
    "text",
    "The front matter grows by aliases, holds itself, nests without end, is huge, or has invalid values",
    "Exit 2 within two seconds.",
)
@pytest.mark.parametrize(
    "front",
    [
        laughs("[{}]"),
        laughs("{{<<: [{}]}}"),
        "a: &a [*a]",
        "a: " + "[" * 100_000,
        "- " * 100_000 + "a",
        "a: " + ":".join(["59"] * 50_000),
        "a: 1" + "0" * 50_000,
        "a: " + "b" * 600_000,
        'license: "\\ud800"',
        "a: !!int x",
        "a: !!timestamp x",
        "a: !!bool x",
    ],
    ids=[
        "lists", "merges", "itself", "deep", "deep block", "base 60", "long", "large", "surrogate",
        "int", "date", "bool",
    ],
)  # fmt: skip
def test_front_matter_that_stands_for_too_much_or_nothing_is_refused(front: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError, match="front matter of README"):
        readme_text(card(front).encode(), "here")
    assert time.process_time() - started < 2


@pytest.mark.fault(
    "text",
    "The README is not UTF-8",
    "Exit 2 where the card is made from it; otherwise it counts as none.",
)
@pytest.mark.parametrize(
    "content",
    ["# Größe".encode("utf-16"), "# Größe".encode("latin-1"), b"# \xed\xa0\x80"],
    ids=["utf-16", "latin-1", "surrogate"],
)
def test_a_readme_in_another_encoding_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match=r"README\.md of here is not UTF-8 text"):
        readme_text(content, "here")


@pytest.mark.fault(
    "text",
    "The front matter holds comments",
    "They stay beside what they are about.",
)
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "tags:\n# first\n- a  # why\n# second\n- b  # end\n# after\nlicense: mit",
            "tags:\n# first\n- a  # why\n# second\n- b  # end\n- torchao\n- smolquant\n# after\n"
            "license: mit",
        ),
        ("tags: # note\n- a", "tags: # note\n- a\n- torchao\n- smolquant"),
        ("tags: [a, # why\n  b]", "tags: [a, # why\n  b, torchao, smolquant]"),
        ("tags: a  # one", "tags:\n- a  # one\n- torchao\n- smolquant"),
        ("tags:  # none yet", "tags:  # none yet\n- torchao\n- smolquant"),
        ("tags: ~ # none yet", "tags: # none yet\n- torchao\n- smolquant"),
        ("tags: [] # none", "tags: [torchao, smolquant] # none"),
        ("tags:\n  - ä # é\n  - b\nx: 1", "tags:\n  - ä # é\n  - b\n  - torchao\n  - smolquant\nx: 1"),
    ],
)  # fmt: skip
def test_comments_survive_the_tags_that_are_added(written: str, expected: str) -> None:
    assert handled(card(written)).startswith(card(expected))


@pytest.mark.fault(
    "text",
    "The front matter holds comments",
    "They stay beside what they are about.",
)
def test_comments_survive_a_value_that_is_replaced() -> None:
    front = Readme("base_model:\n- a/b  # the old one\n- c/d\nlicense: mit  # ours", "")
    updated = front.with_value("base_model", "e/f").with_value("license", "apache-2.0")
    assert updated.front == ("base_model: e/f\n# the old one\nlicense: apache-2.0  # ours")


@pytest.mark.fault(
    "text",
    "Our markers stand in a block of code of the README, or in its front matter",
    "They are the owner's, and stay.",
)
@pytest.mark.parametrize("fence", ["```", "~~~~", "   ```"])
@pytest.mark.parametrize("inside", [f"{BEGIN}\nyours\n{END}", BEGIN, END, f"{END}\n{BEGIN}"])
def test_markers_in_a_block_of_code_are_the_owners(fence: str, inside: str) -> None:
    example = f"# Mine\n\n{fence}markdown\n{inside}\n{fence}\n"
    for readme in (example, f"{example}\n{root('# x')}", f"{root('# x')}\n{example}"):
        made = handled(readme)
        assert made.count(f"{fence}markdown\n{inside}\n{fence}\n") == 1
        assert made.count("## Quantized variants") == 1


@pytest.mark.fault(
    "text",
    "A block of code in the README is never closed",
    "Our part stands there all the same, once.",
)
def test_a_block_of_code_that_nothing_ends_does_not_hide_our_part() -> None:
    made = handled("# Mine\n\n```\nforgotten\n")
    assert made.count("## Quantized variants") == 1


@pytest.mark.fault(
    "text",
    "Our markers stand in a block of code of the README, or in its front matter",
    "They are the owner's, and stay.",
)
def test_markers_in_front_matter_are_the_owners() -> None:
    front = f"license: mit # {BEGIN}\nnote: '{END}'"
    assert handled(card(front)).startswith(f"---\n{front}\ntags:")
