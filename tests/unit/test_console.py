import io
import os
import pty
import re
import termios
import threading
import time

import pytest

from smolquant.errors import CheckpointError, HubError
from smolquant.pace import Part
from smolquant.report.console import WATCH, Console
from smolquant.report.progress import BYTES, TOKENS, Progress, drawn
from smolquant.secrecy import redact

ACTIONS = {"GITHUB_ACTIONS": "true"}
RUNNER_COMMAND = re.compile(r"^\s*::|##\[")
"""What actions/runner takes for a command."""


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def actions() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(ACTIONS, stream), stream


def plain() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console({}, stream), stream


def test_actions_mode_needs_exactly_true() -> None:
    assert Console(ACTIONS, io.StringIO()).in_actions
    assert not Console({"GITHUB_ACTIONS": "1"}, io.StringIO()).in_actions


@pytest.mark.fault(
    "secret",
    "A token is given in a workflow",
    "The runner is told to mask it first; whatever holds it is printed with *** in its place.",
)
def test_a_masked_secret_is_given_to_the_runner_and_to_nobody_else() -> None:
    console, stream = actions()
    console.mask("hf_s%cret\n")
    console.info("token hf_s%cret.")
    console.notice("hf_s%cret", "hf_s%cret")
    console.error(HubError("bad hf_s%cret", hint="drop hf_s%cret"))
    with console.group("hf_s%cret"):
        pass
    first, *rest = stream.getvalue().splitlines()
    assert first == "::add-mask::hf_s%25cret"
    assert rest[0] == "token ***."
    assert not any("cret" in line for line in rest)


@pytest.mark.fault(
    "secret",
    "A message holds a token",
    "The log shows *** in its place.",
)
def test_secrets_are_redacted_outside_actions_without_being_written() -> None:
    console, stream = plain()
    console.mask("hf_secret")
    assert stream.getvalue() == ""
    console.info("a hf_secret b")
    try:
        raise ValueError("hf_secret in a bug")
    except ValueError as error:
        console.error(error)
    assert "a *** b" in stream.getvalue()
    assert "hf_secret" not in stream.getvalue()


@pytest.mark.fault(
    "secret",
    "A token is hidden by invisible characters that cleaning takes out",
    "It is taken out as well.",
)
def test_a_secret_put_together_by_cleaning_is_redacted_too() -> None:
    console, stream = plain()
    console.mask("hf_secret")
    console.info("hf_\u200bsec\x1b[0mret")
    assert stream.getvalue() == "***\n"


@pytest.mark.fault(
    "secret",
    "A token begins like another token",
    "The longer one is taken out first.",
)
def test_an_empty_secret_masks_nothing_and_the_longer_secret_wins() -> None:
    console, stream = actions()
    console.mask("")
    console.mask(" \n")
    assert stream.getvalue() == ""
    console.mask("abc")
    console.mask("abcdef")
    assert redact("abcdef abc x") == "*** *** x"


@pytest.mark.fault(
    "text",
    "A text begins as a workflow command of the runner",
    "It is printed and not obeyed.",
)
@pytest.mark.parametrize(
    "text",
    [
        "::error::boo",
        "  \t::set-output name=a::b",
        "\u00a0::add-mask::a",
        "x\n::stop-commands::t",
        "x\r::debug::t",
        "x\u2028::debug::t",
        "\ufeff::error::boo",
        "\ufe0f::error::boo",
        ":\u200b:error::boo",
        "\x1b[0m::error::boo",
        "text ##[group]x",
        "#\x00#[error]x",
        ":::error::x",
    ],
)
@pytest.mark.parametrize("environ", [ACTIONS, {}])
def test_no_text_becomes_a_workflow_command(text: str, environ: dict[str, str]) -> None:
    stream = io.StringIO()
    Console(environ, stream).info(text)
    lines = stream.getvalue().split("\n")
    assert not any(RUNNER_COMMAND.search(line) for line in lines)
    assert any(
        word in stream.getvalue()
        for word in ("error", "mask", "set-output", "stop", "debug", "group")
    )


@pytest.mark.fault(
    "text",
    "A text holds what would end an annotation",
    "It stays inside.",
)
def test_titles_and_labels_cannot_break_out_of_their_command() -> None:
    console, stream = actions()
    console.warning("a,b=c:d\n::error::x", "100%\n::error::y")
    assert stream.getvalue() == (
        "::warning title=a%2Cb=c%3Ad %3A%3Aerror%3A%3Ax::100%25%0A::error::y\n"
    )


def test_text_keeps_its_lines_and_indentation() -> None:
    console, stream = plain()
    console.info("a\n  b\n\nc")
    assert stream.getvalue() == "a\n  b\n\nc\n"


@pytest.mark.fault(
    "machine",
    "The terminal takes no Unicode",
    "The text comes out in what it takes.",
)
def test_a_stream_without_unicode_still_gets_the_text() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console({}, stream).info("a → b")
    assert raw.getvalue() == b"a ? b\n"


@pytest.mark.fault(
    "machine",
    "stdout lies on a full disk",
    "One warning; the log goes on in stderr.",
)
def test_a_log_that_cannot_be_written_goes_on_in_stderr_and_fails_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    console = Console({}, Full())
    console.info("a line")
    console.warning("Slow", "no GPU")
    assert capsys.readouterr().err == (
        "warning: stdout cannot be written to: No space left on device.\n"
        "a line\nwarning: Slow: no GPU\n"
    )


@pytest.mark.fault(
    "machine",
    "stdout or stderr is closed",
    "That is no failure.",
)
def test_without_any_stream_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    console = Console({}, closed)
    console.info("a line")
    console.error(HubError("The Hub is away."))


def test_groups_fold_in_actions_and_do_not_nest() -> None:
    console, stream = actions()
    with pytest.raises(RuntimeError), console.group("outer"):
        with console.group("inner"):
            console.info("text")
        raise RuntimeError
    assert stream.getvalue() == "::group::outer\n== inner\ntext\n::endgroup::\n"


def test_groups_are_headings_elsewhere() -> None:
    console, stream = plain()
    with console.group("quantize"):
        console.info("text")
    assert stream.getvalue() == "== quantize\ntext\n"


def test_notices_and_warnings_are_plain_lines_elsewhere() -> None:
    console, stream = plain()
    console.notice("Up to date", "int8")
    console.warning("Slow", "no GPU")
    assert stream.getvalue() == "Up to date: int8\nwarning: Slow: no GPU\n"


def test_an_error_is_one_annotation_with_title_message_and_hint() -> None:
    console, stream = actions()
    console.error(CheckpointError("It is truncated.", hint="Copy it again."))
    assert stream.getvalue() == (
        "::error title=Unusable checkpoint::It is truncated.%0ACopy it again.\n"
    )


def test_an_error_says_what_to_do_elsewhere() -> None:
    console, stream = plain()
    console.error(CheckpointError("It is truncated.", hint="Copy it again."))
    console.error(CheckpointError("No hint."))
    assert stream.getvalue() == (
        "error: It is truncated.\nwhat to do: Copy it again.\nerror: No hint.\n"
    )


@pytest.mark.fault(
    "text",
    "An error is longer than an annotation may be",
    "It is cut to what GitHub keeps.",
)
def test_a_long_annotation_is_cut_to_what_github_keeps() -> None:
    console, stream = actions()
    console.error(CheckpointError("%" * 5000))
    message = stream.getvalue().rstrip("\n").split("::", 2)[2].replace("%25", "%")
    assert len(message) == 4096
    assert message.endswith("%…")


@pytest.mark.fault(
    "text",
    "A text begins as a workflow command of the runner",
    "It is printed and not obeyed.",
)
def test_a_bug_is_called_one_and_its_traceback_is_in_a_group() -> None:
    console, stream = actions()
    try:
        raise KeyError("::error::lm_head")
    except KeyError as error:
        console.error(error)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "::group::Traceback"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2] == "::endgroup::"
    assert lines[-1].startswith("::error title=Unexpected error::This is a bug in smolquant.")
    assert "KeyError" in lines[-1]
    assert not any(RUNNER_COMMAND.search(line) for line in lines[1:-2])


def test_nothing_that_lasts_is_silent_in_a_log() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console({}, stream, clock=clock)
    with console.group("Publish"), console.doing("waiting for\x1b[31m the Hub"):
        for _ in range(50):  # 25 s
            clock.now += 0.5
            console.look()
    assert stream.getvalue().splitlines() == [
        "== Publish",
        "waiting for the Hub: 9 s so far",
        "waiting for the Hub: 18 s so far",
    ]


def test_a_line_of_somebody_elses_breaks_the_silence() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console({}, stream, clock=clock)
    with console.doing("planning"):
        clock.now += 6
        console.info("a line")
        clock.now += 6
        console.look()
        assert stream.getvalue() == "a line\n"
        clock.now += 6
        console.look()
    console.look()  # nothing goes on any more
    assert stream.getvalue() == "a line\nplanning: 18 s so far\n"


def test_a_thread_of_the_consoles_own_looks_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolquant.report.console.SECONDS_OF_SILENCE", 0.0)
    monkeypatch.setattr("smolquant.report.console._SECONDS_BETWEEN_LOOKS", 0.01)

    def watching() -> int:
        return sum(thread.name == WATCH for thread in threading.enumerate())

    deadline = time.monotonic() + 10
    while watching() and time.monotonic() < deadline:  # for another test's console
        time.sleep(0.01)
    console, stream = plain()
    with console.doing("outer"), console.doing("inner"):
        assert watching() == 1
        while "inner: " not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "inner: " in stream.getvalue()
    while watching() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not watching()


def test_progress_in_a_log_is_a_line_now_and_then_and_a_last_one() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console({}, stream, clock=clock)
    with console.progress("int8", 4_000_000_000) as progress:
        for _ in range(8):
            clock.now += 10
            progress.advance(500_000_000)
            if progress.share in (0.25, 0.75):
                console.look()
    assert stream.getvalue().splitlines() == [
        "int8: 1.00 GB of 4.00 GB (25.0%), 50.0 MB/s, about 1 min left",
        "int8: 3.00 GB of 4.00 GB (75.0%), 50.0 MB/s, about 20 s left",
        "int8: 4.00 GB in 1 min 20 s, 50.0 MB/s",
    ]


def test_measuring_is_counted_in_tokens() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console({}, stream, clock=clock)
    with console.progress("measuring quality", 12_288, TOKENS) as progress:
        clock.now += 100
        progress.advance(4_096)
        console.look()
        progress.advance(8_192)
        clock.now += 200
    assert stream.getvalue().splitlines() == [
        "measuring quality: 4,096 of 12,288 tokens (33.3%), 41 tokens/s, about 3 min 30 s left",
        "measuring quality: 12,288 tokens in 5 min 00 s, 41 tokens/s",
    ]


def test_slow_work_names_no_speed_of_nothing() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console({}, stream, clock=clock)
    with console.progress("a", 100) as progress:
        clock.now += 20
        console.look()
        progress.advance(5)
        clock.now += 20
        console.look()
    assert stream.getvalue().splitlines() == [
        "a: 20 s so far",
        "a: 5 B of 100 B (5.0%), about 6 min left",
        "a: 5 B in 40.0 s",
    ]


def test_progress_beyond_the_total_and_of_nothing_does_not_fail() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console({}, stream, clock=clock)
    with console.progress("a", 0) as progress:
        progress.advance(0)
        clock.now += 10
        console.look()
        progress.advance(50)
        clock.now += 10
        console.look()
    assert stream.getvalue().splitlines() == [
        "a: 10 s so far",
        "a: 20 s so far, 50 B",
        "a: 50 B in 20.0 s, 2 B/s",
    ]


def test_work_that_failed_is_not_reported_as_done() -> None:
    console, stream = plain()
    with pytest.raises(RuntimeError), console.progress("int8", 10) as progress:
        progress.advance(5)
        raise RuntimeError
    assert stream.getvalue() == ""


def test_progress_counts_every_threads_bytes() -> None:
    console, stream = plain()
    with console.progress("int8", 80_000) as progress:

        def work() -> None:
            for _ in range(10_000):
                progress.advance(1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stream.getvalue().startswith("int8: 80.0 kB in ")


def test_a_terminal_shows_what_goes_on_in_place_and_whole_lines_beside_it() -> None:
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 100))
    with os.fdopen(writing, "w", encoding="utf-8") as terminal:
        console = Console({}, terminal)
        with console.progress("int8\x1b[31m", 2_000_000) as progress:
            progress.advance(1_000_000)
            console.look()
            console.info("a line")
        shown = ""
        while "MB in " not in shown:  # a terminal hands over what it has, not all there is
            shown += os.read(reading, 65536).decode()
    os.close(reading)
    bar, erased, line = shown.partition("\r\x1b[Ka line\r\n")
    assert erased, shown
    assert bar.startswith("\r\x1b[K━━━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌  int8: 1.00 MB of 2.00 MB (50.0%), ")
    assert "\x1b[31m" not in shown
    assert "int8: 1.00 MB in " in line


def test_a_narrow_terminal_gets_no_line_that_wraps() -> None:
    clock = Clock()
    progress = Progress("a name that is long", [Part(2_000_000)], BYTES, clock)
    clock.now += 1
    progress.advance(1_000_000)
    assert len(drawn(progress, 40, "utf-8")) == 39
    assert drawn(progress, 120, "ascii").startswith(
        "############------------  a name that is long: "
    )


def test_a_terminal_that_cannot_redraw_gets_lines() -> None:
    reading, writing = pty.openpty()
    with os.fdopen(writing, "w") as terminal:
        clock = Clock()
        console = Console({"TERM": "dumb"}, terminal, clock=clock)
        with console.doing("planning"):
            clock.now += 10
            console.look()
        shown = os.read(reading, 65536).decode()
    os.close(reading)
    assert shown == "planning: 10 s so far\r\n"


def test_a_quiet_console_writes_errors_only() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console({}, stream, quiet=True, clock=clock)
    with console.group("Source"), console.progress("int8", 10) as progress:
        progress.advance(10)
        clock.now += 20
        console.look()
        console.info("a line")
        console.notice("Up to date", "int8")
        console.warning("Slow", "no GPU")
    assert stream.getvalue() == ""
    console.error(CheckpointError("It is truncated."))
    console.error(KeyError("lm_head"))
    assert stream.getvalue().startswith("error: It is truncated.\n")
    assert "KeyError: 'lm_head'\nerror: This is a bug in smolquant." in stream.getvalue()


def test_actions_never_gets_a_bar_even_on_a_terminal() -> None:
    reading, writing = pty.openpty()
    with os.fdopen(writing, "w") as terminal:
        with Console(ACTIONS, terminal).progress("int8", 10) as progress:
            progress.advance(10)
        shown = os.read(reading, 65536).decode()
    os.close(reading)
    assert shown.startswith("int8: 10 B in ")
