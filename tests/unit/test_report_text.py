import pytest

from smolquant.text import (
    Markdown,
    code_block,
    code_span,
    escape_markdown,
    human_duration,
    human_size,
    link,
    listed,
    one_line,
    percent,
    significant,
    visible,
)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994_999, "9.99 MB"),
        (9_996_000, "10.0 MB"),
        (269_060_552, "269 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_are_decimal_with_three_digits(n_bytes: int, text: str) -> None:
    assert human_size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.5124, "51.2%"),
        (0.0, "0.0%"),
        (0.0004, "0.04%"),
        (0.9994, "99.9%"),
        (0.9996, "99.96%"),
        (0.999996, "99.9996%"),
        (1.0, "100%"),
        (1.0003, "100.03%"),
        (1.5, "150.0%"),
    ],
)
def test_only_all_of_it_is_100_percent_and_only_nothing_none(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.00000001234, "0.0000000123"),
        (0.0000123, "0.0000123"),
        (0.004926, "0.00493"),
        (0.29, "0.29"),
        (0.9996, "1"),
        (-0.004926, "-0.00493"),
        (31.76, "31.8"),
        (12345.0, "12300"),
        (1e300, "1" + "0" * 300),
    ],
)
def test_a_number_has_three_digits_and_no_exponent_and_is_zero_only_where_it_is(
    value: float, text: str
) -> None:
    assert significant(value) == text


def test_a_signed_number_has_its_sign() -> None:
    assert [significant(value, signed=True) for value in (2.881, -0.0034, 0.0)] == [
        "+2.88", "-0.0034", "+0",
    ]  # fmt: skip


def test_a_list_is_joined_as_people_do() -> None:
    names = [Markdown(name) for name in "abc"]
    assert [listed(names[:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]


@pytest.mark.fault(
    "text",
    "A text holds terminal escapes, invisible or right-to-left characters",
    "They are taken out wherever it is shown.",
)
def test_visible_drops_terminal_escapes_and_characters_that_deceive() -> None:
    assert (
        visible("\x1b[31mred\x1b[0m \x1b]0;title\x07\u202eabc\u200b\ufe0f\x00\x1b(") == "red abc("
    )
    assert visible("naïve 模型 नमस्ते") == "naïve 模型 नमस्ते"


def test_one_line_folds_every_kind_of_line_end() -> None:
    assert one_line("a\r\nb\u2028c\x0bd\t e") == "a b c d e"


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a|b", r"a\|b"),
        ("<img src=x>", r"\<img src=x\>"),
        ("[x](y)", r"\[x\](y)"),
        ("`_*~", r"\`\_\*\~"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("1.5 times", "1.5 times"),
        ("# no\nheading", r"\# no heading"),
        ("https://evil.example", r"https\://evil.example"),
        ("www.evil.example", r"www\.evil.example"),
        ("&lt;", r"\&lt;"),
        ("model.layers.0", "model.layers.0"),
    ],
)
def test_markdown_is_escaped(text: str, markdown: str) -> None:
    assert escape_markdown(text) == markdown


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a.b", "`a.b`"),
        ("a`b", "``a`b``"),
        ("``a", "``` ``a ```"),
        ("a|b", r"<code>a\|b</code>"),
        ("a|<b>", r"<code>a\|\<b\></code>"),
        ("a\nb", "`a b`"),
        ("", ""),
    ],
)
def test_code_spans_hold_any_name(text: str, markdown: str) -> None:
    assert code_span(text) == markdown


@pytest.mark.fault(
    "text",
    "A text holds the fence of a code block",
    "It cannot close the block.",
)
def test_a_code_block_cannot_be_closed_from_inside() -> None:
    assert code_block("a\n```\n<b>\x1b[31m", "sh") == "````sh\na\n```\n<b>\n````"


@pytest.mark.fault(
    "text",
    "An address is no web address (`javascript:`)",
    "It is shown as text and not linked.",
)
def test_links_escape_their_text_and_take_web_addresses_only() -> None:
    assert (
        link("a]b", "https://x.example/a(b) c|d") == r"[a\]b](https://x.example/a%28b%29%20c%7Cd)"
    )
    assert link("a", "javascript:alert(1)") == "a"
    assert link("a", None) == "a"
    assert link(code_span("a_b"), "https://x.example") == "[`a_b`](https://x.example)"
