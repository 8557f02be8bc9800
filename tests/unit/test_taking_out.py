"""Our part of a card is taken out again, or rendered again for a branch, and the owner's stays."""

from typing import Any

import pytest

from smolquant.errors import InputError
from smolquant.publish.cards import card_again, root_card, variant_card, without_our_part
from smolquant.publish.front_matter import Readme
from smolquant.publish.section import BEGIN, identity_told
from smolquant.report.closing import render_closing
from smolquant.report.summary import render_summary
from unit.report_samples import run_result, variant_record

RECORDS = {name: variant_record(name) for name in ("int8", "int4")}
IDENTITY = RECORDS["int8"].source.identity


def root(existing: str | None, **changes: Any) -> str:
    values = {"location": "you/tiny", "has_main_model": True, "source_identity": IDENTITY}
    return root_card(existing, RECORDS, **{**values, **changes})


@pytest.mark.parametrize(
    "owners",
    [
        "# Mine\n\nText.\n",
        "---\nlicense: mit  # as agreed\n---\n# Mine\n",
        "---\ntags:\n- mine  # a comment\n- yours\nlicense: mit\n---\n\n# Mine\n",
        "---\nlicense: mit\ntags:\n  - mine\n---\n# Mine\n",
        "---\r\nlicense: mit\r\n---\r\n# Mine\r\n\r\nText.\r\n",
        "",
    ],
)
def test_without_variants_the_owners_readme_is_what_it_was(owners: str) -> None:
    with_ours = root(owners or None)
    assert BEGIN in with_ours and "torchao" in with_ours
    left = without_our_part(with_ours, has_main_model=True)
    assert left == (owners or "\n# tiny\n")
    assert without_our_part(left, has_main_model=True) == left


@pytest.mark.parametrize("tags", ["tags: [mine]", "tags: mine", 'tags: ["mine", torchao]'])
def test_tags_in_other_styles_keep_their_values(tags: str) -> None:
    left = without_our_part(root(f"---\n{tags}\nlicense: mit\n---\nText\n"), has_main_model=True)
    assert Readme.split(left).values() == {"tags": ["mine"], "license": "mit"}


def test_text_around_our_part_stays_in_its_order() -> None:
    card = root("# Mine\n\nAbove.\n") + "\nBelow.\n"
    assert without_our_part(card, has_main_model=True) == "# Mine\n\nAbove.\n\nBelow.\n"


def test_what_the_variants_were_made_from_is_said_no_more_where_nothing_is_left() -> None:
    card = root("---\nlicense: mit\n---\nText\n", location="me/copy", has_main_model=False)
    assert Readme.split(card).values()["base_model"] == "them/tiny"
    left = without_our_part(card, has_main_model=False)
    assert left == "---\nlicense: mit\n---\nText\n"
    owners = "---\nbase_model: them/base\nbase_model_relation: finetune\n---\nText\n"
    assert without_our_part(root(owners), has_main_model=True) == owners


def test_entries_that_cannot_be_cut_out_stay() -> None:
    flow = Readme("{tags: [torchao], license: mit}", "Text\n")
    assert flow.without("tags") is flow
    assert flow.without("absent") is flow
    with pytest.raises(InputError):
        without_our_part("---\n- a list\n---\nText\n", has_main_model=True)


def test_the_source_of_now_is_told_by_the_marks_of_the_card() -> None:
    card = root(None)
    assert identity_told(card, RECORDS) == IDENTITY
    older = root(None, source_identity="sha256:" + "0" * 64)
    assert identity_told(older, RECORDS) == ""
    assert root(older, source_identity="") == older
    assert identity_told(card, {}) is None


# What is said of branches


def test_the_cards_name_the_branches_that_are_there() -> None:
    assert "--revision" not in root(None)
    one = root(None, branches=["int8"])
    assert "The branch `int8` has the variant of that name at the root" in one
    assert "vllm serve you/tiny --revision int8" in one
    both = root(None, branches=["int4", "int8"])
    assert "The branches `int8` and `int4` have" in both


@pytest.mark.parametrize(
    "url", [None, "https://me-trackio.hf.space/run?project=p&selected_run_id=1"]
)
@pytest.mark.parametrize("base_model", [None, "them/tiny"])
def test_a_card_that_is_rendered_again_keeps_what_only_it_tells(
    url: str | None, base_model: str | None
) -> None:
    told: dict[str, Any] = {
        "location": "you/tiny",
        "base_model": base_model,
        "terms": {"license": "other", "license_name": "a: name"},
        "tracking_url": url,
    }
    plain = variant_card(RECORDS["int8"], **told)
    assert card_again(plain, RECORDS["int8"], location="you/tiny", has_branch=False) == plain
    again = card_again(plain, RECORDS["int8"], location="you/tiny", has_branch=True)
    assert again == variant_card(RECORDS["int8"], **told, has_branch=True)
    assert "vllm serve you/tiny --revision int8" in again


def test_summary_and_log_name_the_branches() -> None:
    tree = "https://huggingface.co/you/tiny/tree/"
    result = run_result("int8", "int4", branches={"int8": f"{tree}int8", "int4": f"{tree}int4"})
    summary = render_summary(result)
    assert f"The branches [`int8`]({tree}int8) and [`int4`]({tree}int4) have" in summary
    assert "Everything is in one commit, " in summary
    assert "branches   int8, int4" in render_closing(result)
    assert result.to_json()["branches"] == {"int8": f"{tree}int8", "int4": f"{tree}int4"}
    assert "branch" not in render_summary(run_result("int8"))


def test_a_run_that_only_made_branches_says_that() -> None:
    result = run_result(branches={"int8": "https://huggingface.co/you/tiny/tree/int8"})
    summary = render_summary(result)
    assert "Published branches to" in summary
    assert "Main is at commit [" in summary
