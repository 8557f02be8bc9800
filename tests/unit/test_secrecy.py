"""A secret that this process was given is found in every spelling, and common words are left alone."""

import base64
import hashlib
import io
import json
import textwrap
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from smolquant.ending import Ending
from smolquant.errors import HubError, InputError
from smolquant.report.console import Console
from smolquant.report.run_report import RunReport
from smolquant.secrecy import (
    holds_secret,
    redact,
    refuse_secret,
    remember,
    remember_environment,
)
from smolquant.text import error_words, escape_markdown, one_line, quoted
from smolquant.tracking.recorder import Recorder

TOKEN = "hf_AbCd-EfGh.iJ~kLmNoPqRs_4tUvWxYz0123"
HALVES = (TOKEN[:17], TOKEN[17:])


def percent(text: str) -> str:
    """Every character encoded, which a client need not do."""
    return "".join(f"%{ord(character):02x}" for character in text)


SPELLINGS = {
    "raw": TOKEN,
    "percent-encoded": percent(TOKEN),
    "percent-encoded in capitals": percent(TOKEN).upper().replace("%5F", "_"),
    "percent-encoded twice": quote(percent(TOKEN)),
    "percent-encoded three times": quote(quote(percent(TOKEN))),
    "base64": base64.b64encode(TOKEN.encode()).decode(),
    "base64 after one byte": base64.b64encode(b":" + TOKEN.encode()).decode(),
    "base64 after a name": base64.b64encode(f"{'user'}:{TOKEN}".encode()).decode(),
    "base64 for addresses": base64.urlsafe_b64encode(f"u:{TOKEN}\n".encode()).decode(),
    "base64, percent-encoded": quote(quote(base64.b64encode(TOKEN.encode()).decode(), safe="")),
    "base64 in lines": base64.encodebytes(f"{'x' * 50}{TOKEN}{'x' * 9}".encode()).decode(),
    "lines": "\r\n    ".join(HALVES),
    "folded lines": one_line("\n".join(HALVES)),
    "a character a line": "\n".join(TOKEN),
    "repr": repr({"token": TOKEN}),
    "repr of lines": repr("\n".join(HALVES)),
    "repr of a repr": repr(repr("\n".join(HALVES))),
    "pprint": f"('{HALVES[0]}'\n '{HALVES[1]}')",
    "JSON": json.dumps({"lines": list(HALVES), "token": TOKEN}),
    "markdown": escape_markdown(TOKEN),
    "an address": f"https://u:{TOKEN}@host/?write_token={quote(TOKEN)}",
}


@pytest.mark.fault(
    "secret",
    "A token is percent-encoded, in base64, quoted, escaped or broken into lines",
    "It is found, and *** stands in its place.",
)
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_secret_is_found_in_every_spelling(spelling: str) -> None:
    remember(TOKEN)
    told = redact(f"The Hub said {spelling}, and more.")
    assert "***" in told
    assert told.startswith("The Hub said ")
    assert told.endswith(", and more.")
    assert not any(part in told for part in (*HALVES, TOKEN[5:15], percent(TOKEN)[6:30]))
    assert holds_secret(f"The Hub said {spelling}, and more.".encode())


def test_nothing_is_a_secret_before_it_is_known() -> None:
    assert redact(SPELLINGS["an address"]) == SPELLINGS["an address"]
    assert not holds_secret(TOKEN.encode())


@pytest.mark.fault(
    "secret",
    "A text holds a Hub token that is not the run's own",
    "*** stands in its place.",
)
def test_what_has_the_shape_of_a_hub_token_is_never_told() -> None:
    assert redact("Bearer hf_abcdefghijklmnopqrstuvwxyzABCDEFGH is old") == "Bearer *** is old"
    assert redact("Bearer hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29-_x.y") == "Bearer ***"
    usual = "hf_home hf_raise_for_status hf_hub_download hf_transfer"
    assert redact(usual) == usual


@pytest.mark.fault(
    "secret",
    "A token is a common word",
    "It is taken out where it stands alone; other words stay, and no file is refused.",
)
def test_a_short_secret_is_told_of_nowhere_by_itself_and_refuses_no_file() -> None:
    remember("model")
    assert redact("model, a 'model' of models remodelled: model") == (
        "***, a '***' of models remodelled: ***"
    )
    assert redact("m odel bW9kZWw=") == "m odel bW9kZWw="
    refuse_secret("README.md", b"model")


@pytest.mark.fault(
    "secret",
    "A token stands inside a word",
    "It is taken out of it.",
)
@pytest.mark.fault(
    "secret",
    "A token begins like another token",
    "The longer one is taken out first.",
)
def test_a_long_secret_is_found_inside_a_word_and_the_longer_one_first() -> None:
    remember("secretsecret")
    remember("secretsecret_and_more")
    assert redact("xsecretsecrety secretsecret_and_more") == "x***y ***"


@pytest.mark.fault(
    "secret",
    "A token is up to 2,000 characters long",
    "It is taken out whole.",
)
@pytest.mark.parametrize("length", [65, 100, 2000])
def test_a_token_with_claims_is_taken_out_whole(length: int) -> None:
    token = "".join(hashlib.sha256(bytes([i % 256])).hexdigest() for i in range(99))[:length]
    remember(token)
    assert redact(f"({token})") == "(***"
    assert redact(f'"{token}" {token} x') == '"***" *** x'
    broken = redact("\n".join(textwrap.wrap(token, 40)))
    assert token[:64] not in broken.replace("\n", "")
    assert token[-64:] not in broken.replace("\n", "")
    assert holds_secret(base64.b64encode(token.encode()))


@pytest.mark.fault(
    "secret",
    "A file to publish holds a token",
    "Exit 2 with the file; the token is not shown.",
)
def test_a_file_with_a_secret_is_refused_by_name_without_telling_it() -> None:
    remember(TOKEN)
    with pytest.raises(InputError) as caught:
        refuse_secret("int8/tokenizer_config.json", json.dumps({"auth": TOKEN}).encode())
    assert "int8/tokenizer_config.json holds a token" in str(caught.value)
    assert TOKEN not in str(caught.value)
    refuse_secret("README.md", b"\xff\xfe nothing \x00")


@pytest.mark.fault(
    "secret",
    "A text with a token is cut short",
    "It holds no beginning of it.",
)
def test_what_is_cut_short_holds_no_beginning_of_a_secret() -> None:
    remember(TOKEN)
    for text in (quoted("x" * 290 + TOKEN), error_words(ValueError("x" * 280 + TOKEN))):
        assert "hf_" not in text
        assert "***" in text


@pytest.mark.fault(
    "secret",
    "The environment holds the runner's token or a proxy's password",
    "They are taken out, too.",
)
def test_tokens_and_passwords_of_the_environment_are_known() -> None:
    remember_environment(
        {
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "runners-own-token",
            "https_proxy": "http://me:proxy-password@proxy:3128",
            "HTTP_PROXY": "http://[broken",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    assert redact("runners-own-token http://me:proxy-password@proxy false") == (
        "*** http://me:***@proxy false"
    )


@pytest.mark.fault(
    "secret",
    "A refused token is no ASCII, or no text",
    "It is kept secret like any other.",
)
def test_a_token_that_is_refused_is_kept_secret_too() -> None:
    remember("hf_caf\u00e9_is_no_token")
    remember("hf_\udce9_is_no_text")
    assert redact("hf_caf\u00e9_is_no_token and hf_\udce9_is_no_text") == "*** and ***"


@pytest.mark.fault(
    "secret",
    "A file is made to take long to be searched for tokens",
    "It takes less than two seconds for 1.2 MB.",
)
def test_looking_at_a_file_takes_less_than_a_second_a_megabyte() -> None:
    for secret in (TOKEN, "trackio-write-token", "another-token-of-the-runner"):
        remember(secret)
    content = (b'{"h\\u0120": 1, "th": 2, "ab%68": "' + bytes(range(256)) + b'"}') * 2_000
    started = time.process_time()
    assert not holds_secret(content)
    assert not holds_secret(b"h" + b"\\" * 200_000 + b"h" * 200_000 + b"h " * 100_000)
    assert time.process_time() - started < 2, "seconds for 1.2 MB, most of them for the last"


@pytest.mark.fault(
    "secret",
    "The Hub's answer repeats the token in any spelling",
    "It is in neither the log nor any file: report, outputs, summary, events, details of an error.",
)
@pytest.mark.parametrize("known", [True, False], ids=["expected", "unexpected"])
def test_no_spelling_that_the_hub_answers_with_reaches_anything_that_is_told(
    tmp_path: Path, known: bool
) -> None:
    remember(TOKEN)
    log = io.StringIO()
    console = Console({"GITHUB_ACTIONS": "true"}, log)
    environ = {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    recorder = Recorder(
        tmp_path,
        console,
        destination=None,
        project="p",
        title=None,
        revision=None,
        quant_types={"int8": "int8_weight_only"},
    )
    answers = "\n".join(f"{number}: {one}" for number, one in enumerate(SPELLINGS.values()))
    report = RunReport(model="alice/model", output_dir=tmp_path)
    with Ending(report, console, environ, recorder):
        raise HubError(answers, hint=answers) if known else ValueError(answers)
    told = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert {"report.json", "events.jsonl", "GITHUB_STEP_SUMMARY"} <= told.keys()
    assert ("error-details.txt" in told) is not known
    for name, text in {**told, "the log": log.getvalue()}.items():
        assert not holds_secret(text.encode()), name
        assert not any(one in text for one in SPELLINGS.values()), name
