import pytest

from smolquant.text import (
    code_block,
    code_span,
    escape_markdown,
    fold_names,
    human_duration,
    human_size,
    link,
    one_line,
    percent,
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


def test_percent_takes_a_share() -> None:
    assert percent(0.5124) == "51.2%"


def test_names_fold_where_their_numbers_vary_and_only_there() -> None:
    names = [
        "lm_head.weight",
        *(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(30)),
        *(f"model.layers.3.mlp.experts.{expert}.up_proj.weight" for expert in range(8)),
        "model.layers.7.only.weight",
    ]
    assert fold_names(names) == [
        ("lm_head.weight", 1),
        ("model.layers.*.mlp.down_proj.weight", 30),
        ("model.layers.3.mlp.experts.*.up_proj.weight", 8),
        ("model.layers.7.only.weight", 1),
    ]


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


def test_a_code_block_cannot_be_closed_from_inside() -> None:
    assert code_block("a\n```\n<b>\x1b[31m", "sh") == "````sh\na\n```\n<b>\n````"


def test_links_escape_their_text_and_take_web_addresses_only() -> None:
    assert (
        link("a]b", "https://x.example/a(b) c|d") == r"[a\]b](https://x.example/a%28b%29%20c%7Cd)"
    )
    assert link("a", "javascript:alert(1)") == "a"
    assert link("a", None) == "a"
    assert link(code_span("a_b"), "https://x.example") == "[`a_b`](https://x.example)"
