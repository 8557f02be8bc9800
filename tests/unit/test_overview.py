"""The picture of all variants: what it shows of the records, and that it is a sound SVG."""

import re
from dataclasses import replace
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest

from smolquant.record import FileRecord, Metrics, SourceRecord, VariantRecord
from smolquant.report.overview import is_ours, overview
from smolquant.report.svg import SERIES, WIDTH
from unit.report_samples import SOURCE, variant_record

SVG = "{http://www.w3.org/2000/svg}"


def record(
    variant: str, size: int, agreement: float | None = None, **changes: Any
) -> VariantRecord:
    made = variant_record("int8", None if agreement is None else Metrics(top1_agreement=agreement))
    files = {"model.safetensors": FileRecord("0" * 64, size)}
    return replace(made, variant=variant, files=files, **changes)


def text_of(*records: VariantRecord) -> str:
    text = overview({one.variant: one for one in records}, SOURCE.identity)
    assert text is not None
    return text


def drawn(*records: VariantRecord) -> Element:
    return fromstring(text_of(*records))


def texts(svg: Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def bars(svg: Element) -> list[float]:
    return [float(rect.get("width", "")) for rect in svg.iter(f"{SVG}rect")][1:]


def dots(svg: Element) -> list[float]:
    return [float(circle.get("cx", "")) for circle in svg.iter(f"{SVG}circle")]


INT8, INT4 = record("int8", 1_200_000, 0.97), record("int4", 500_000, 0.7)


def test_sizes_are_bars_beside_the_originals() -> None:
    svg = drawn(INT4, INT8)
    original, int8, int4 = bars(svg)
    assert int8 / original == pytest.approx(0.6, abs=0.01)
    assert int4 / original == pytest.approx(0.25, abs=0.01)
    shown = texts(svg)
    for text in ("original", "2.00 MB", "int8", "1.20 MB (60.0%)", "int4", "500 kB (25.0%)"):
        assert text in shown


def test_quality_is_a_distance_from_the_original() -> None:
    original, int8, int4 = dots(drawn(INT8, INT4))
    assert (original - int4) / (original - int8) == pytest.approx(10, rel=0.05)
    assert {"Same top token", "100%", "97.0%", "70.0%"} <= set(texts(drawn(INT8, INT4)))


def test_what_was_not_measured_says_so_and_has_no_dot() -> None:
    svg = drawn(INT8, record("int4", 500_000))
    assert len(dots(svg)) == 2
    assert "not measured" in texts(svg)


def test_where_nothing_was_measured_it_shows_sizes_alone() -> None:
    svg = drawn(record("int8", 1_200_000), record("int4", 500_000))
    assert dots(svg) == []
    assert "Size beside the original" in texts(svg)
    assert not {"Same top token", "not measured"} & set(texts(svg))


def test_it_tells_those_who_do_not_see_it() -> None:
    described = drawn(INT8, INT4).findtext(f"{SVG}desc")
    assert described == (
        "original: 2.00 MB, same top token 100%; int8: 1.20 MB (60.0%), same top token 97.0%; "
        "int4: 500 kB (25.0%), same top token 70.0%."
    )


def test_a_variant_of_an_older_source_is_marked() -> None:
    old = replace(INT4, source=SourceRecord("sha256:" + "0" * 64, 9_000_000))
    svg = drawn(INT8, old)
    assert "int4 †" in texts(svg)
    assert texts(svg)[-1] == "† made from another source"
    assert "2.00 MB" in texts(svg), "the original is the one of now"
    assert not any("†" in text for text in texts(drawn(INT8, INT4)))


def test_the_same_records_give_the_same_bytes_in_whatever_order() -> None:
    assert text_of(INT8, INT4) == text_of(INT4, INT8)


def test_more_variants_than_fit_are_counted() -> None:
    many = [record(f"later{number:02}", 10**6, 0.9) for number in range(30)]
    svg = drawn(*many)
    assert len(bars(svg)) == 25
    assert "and 6 more variants" in texts(svg)


def test_it_is_as_wide_as_a_card_and_dark_where_the_page_is() -> None:
    svg = drawn(INT8)
    assert svg.get("width") == str(WIDTH) == "760"
    style = svg.findtext(f"{SVG}style") or ""
    assert style.startswith("@media (prefers-color-scheme:dark){")
    coloured = {element.get("class") for element in svg.iter() if element.get("class")}
    for name in coloured:
        assert f".{name}{{" in style, "each colour has one for dark pages"
    assert len({dark for _, dark in SERIES}) == len(SERIES)


def test_nothing_without_a_size_is_drawn() -> None:
    assert overview({}, None) is None
    assert overview({"int8": replace(INT8, files={})}, None) is None
    alone = replace(INT8, source=replace(SOURCE, size_bytes=0))
    assert "original" not in texts(drawn(alone))


def test_only_what_smolquant_drew_is_taken_for_its_own() -> None:
    assert is_ours(text_of(INT8).encode())
    assert not is_ours(b'<svg xmlns="http://www.w3.org/2000/svg"><title>mine</title></svg>')


@pytest.mark.fault(
    "text",
    "Names from a model hold markup",
    "In the picture they are text.",
)
def test_names_and_numbers_from_a_record_are_text_and_nothing_else() -> None:
    evil = '</text><script>alert(1)</script>&"\x00\x1b[31m\ud800'
    odd = Metrics(top1_agreement=7.0)
    text = text_of(record(evil, 10**6, metrics=odd), record("int8", 5, float("nan")))
    assert "<script" not in text
    assert not re.search("[\x00-\x09\x0b-\x1f\ud800]", text)
    svg = fromstring(text)
    assert {element.tag.removeprefix(SVG) for element in svg.iter()} <= {
        "svg", "title", "desc", "style", "metadata", "rect", "text", "circle", "line",
    }  # fmt: skip
    assert all(0 <= place <= WIDTH for place in dots(svg))
