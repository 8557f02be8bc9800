"""The command line and an action's inputs come to the same settings, and nothing imports torch early."""

import json
import subprocess
import sys
import threading
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from smolquant import cli, pipeline
from smolquant.report.console import Console
from smolquant.report.run_report import RunReport
from smolquant.secrecy import remember
from smolquant.settings import Settings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command up to the point where work would begin, and returns its settings."""
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[Settings, RunReport]] = []
    monkeypatch.setattr(
        pipeline,
        "quantize",
        lambda settings, console, report, tracker: seen.append((settings, report)),
    )

    def run(*arguments: str, command: bool = False, **environ: str) -> Settings | str:
        for name, value in environ.items():
            monkeypatch.setenv(f"INPUT_{name.replace('_', '-')}", value)
        code = cli.run(["quantize", *arguments], Console({}, StringIO()))
        assert code == 0
        settings, report = seen[-1]
        return report.command if command else settings

    return run


def test_inputs_of_an_action_keep_their_hyphens(asked: Any) -> None:
    settings = asked(
        REPO="user/model",
        QUANT_TYPE="both",
        GROUP_SIZE="64",
        SAVE_ONLY="true",
        PRIVATE="false",
        SKIP="lm_head\n  layers\\.0 \n\n",
        HF_TOKEN="hf_input",
    )
    assert settings.quant_types == ("int8_weight_only", "int4_weight_only")
    assert settings.group_size == 64
    assert (settings.save_only, settings.private) == (True, False)
    assert settings.skip == ("lm_head", "layers\\.0"), "one pattern a line; a comma may be in one"
    assert settings.token == "hf_input"


def test_an_empty_input_means_unset(asked: Any) -> None:
    settings = asked(REPO="user/model", QUANT_TYPE="", GROUP_SIZE="", SAVE_ONLY="", SKIP="", TAG="")
    assert settings.quant_types == ("int8_weight_only",)
    assert (settings.group_size, settings.save_only, settings.tag) == (128, False, None)


def test_what_the_environment_gives_counts_without_the_white_space_around_it(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environment\n")
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", " trackio_writes\r\n")
    settings = asked(
        REPO=" user/model\n", GROUP_SIZE="64 ", TRACKIO_URL="http://tracks:7860\n", HF_TOKEN=" \n"
    )
    assert (settings.repo, settings.group_size) == ("user/model", 64)
    assert settings.token == "hf_environment", "a blank input is as good as none"
    assert settings.trackio.write_token == "trackio_writes"


@pytest.mark.fault(
    "secret",
    "The token holds characters that no header carries",
    "Exit 2; it is not shown.",
)
@pytest.mark.parametrize("command", ["quantize", "check", "sync-trackio"])
@pytest.mark.parametrize("token", ["hf_one hf_two", '"hf_quoted"', "hf_caf\u00e9", "hf_a\nhf_b"])
def test_what_cannot_be_a_token_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, command: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    log = StringIO()
    options = ["--output-dir", str(tmp_path)] if command == "quantize" else []
    assert cli.run([command, "user/model", *options], Console({}, log)) == 2
    assert "HF_TOKEN, hf-token or --token) holds white space, a quotation mark" in log.getvalue()
    assert "hf_" not in log.getvalue()


def test_an_argument_beats_an_input_and_an_input_beats_hf_token(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert asked("user/model").token == "hf_environment"
    settings = asked("user/model", "--group-size", "32", GROUP_SIZE="64", HF_TOKEN="hf_input")
    assert (settings.group_size, settings.token) == (32, "hf_input")


def test_the_reproducing_command_comes_to_the_same_settings(asked: Any) -> None:
    import shlex

    given = (
        "user/model",
        "user/other",
        *("--quant-type", "both", "--group-size", "32", "--revision", "v 1", "--device", "cpu"),
        *("--int4-method", "rtn", "--low-disk", "never", "--embeddings", "int8"),
        *(
            "--skip",
            "a b",
            "--max-shard-size",
            "500MB",
            "--private",
            "--force",
            "--dtype",
            "float16",
        ),
        *("--evaluate", "always", "--eval-tokens", "99", "--max-kl", "int4=0.5,int8=0.00005"),
        *("--max-perplexity-increase", "12.3456789", "--create-pr"),
        *("--trackio-url", "https://trackio.example", "--experiment-name", "an experiment"),
        *("--token", "hf_secret"),
    )
    command = asked(*given, command=True)
    assert "hf_secret" not in command
    assert asked(*shlex.split(command)[2:], "--token", "hf_secret") == asked(*given)


@pytest.mark.fault(
    "secret",
    "The report tells the command that reproduces the run",
    "It holds no token.",
)
def test_the_reproducing_command_holds_no_write_token(asked: Any) -> None:
    address = "https://trackio.example/?write_token=t0p-secret"
    command = asked("user/model", "--trackio-url", address, command=True)
    assert "--trackio-url https://trackio.example/" in command
    assert "t0p-secret" not in command


def test_the_shortest_command_is_reproduced_as_such(asked: Any) -> None:
    assert asked("user/model", command=True) == "smolquant quantize user/model"
    assert asked(REPO="user/model", command=True) == "smolquant quantize user/model"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["quantize", "--help"], 0),
        (["quantize", "nowhere"], 2),
        (["frobnicate"], 2),
    ],
)
def test_help_and_refusals_import_no_torch(arguments: list[str], code: int, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom smolquant import cli\nfrom smolquant.report.console import Console\n"
        f"code = cli.run({arguments!r}, Console({{}}, sys.stdout))\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'trackio'} & set(sys.modules)\n"
        f"assert not heavy, heavy\nassert code == {code}, code\n"
    )
    path = Path(cli.__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["check"], "smolquant check"), (["quantize", "--nothing"], "smolquant quantize")],
)
def test_a_refusal_names_the_help_of_its_own_command(arguments: list[str], command: str) -> None:
    log = StringIO()
    assert cli.run(arguments, Console({}, log)) == 2
    assert f"`{command} --help` lists what is possible." in log.getvalue()


def test_help_has_a_whole_sentence_for_each_command() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "smolquant", "--help"], capture_output=True, text=True, check=True
    ).stdout
    lines = out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == sorted(cli.cli.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_without_arguments_help_is_shown_outside_actions() -> None:
    environment = {"PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    command = [sys.executable, "-m", "smolquant"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Usage: smolquant" in ran.stdout


@pytest.mark.fault(
    "machine",
    "stdout or stderr is closed",
    "That is no failure.",
)
@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_are_no_failure(closed: int) -> None:
    environment = {"PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    command = f"exec {closed}>&-; exec {sys.executable} -m smolquant --version"
    assert subprocess.run(["sh", "-c", command], env=environment, check=False).returncode == 0


@pytest.mark.fault(
    "secret",
    "A thread ends by an error that holds a token",
    "The log shows *** in its place.",
)
def test_what_ends_a_thread_is_told_without_secrets() -> None:
    remember("hf_of_this_run")
    log = StringIO()

    def fail() -> None:
        raise ValueError("sent hf%5Fof%5Fthis%5Frun")

    before, threading.excepthook = threading.excepthook, partial(cli._tell_thread, Console({}, log))
    try:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    finally:
        threading.excepthook = before
    assert "ValueError: sent ***" in log.getvalue()


@pytest.mark.fault(
    "machine",
    "Nobody reads the help to its end",
    "No traceback.",
)
def test_help_that_nobody_reads_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Left())
    log = StringIO()
    assert cli.run(["--help"], Console({}, log)) == 1
    assert log.getvalue() == ""


@pytest.mark.fault(
    "checkpoint",
    "The model's code ends the process as if all were well",
    "Exit 1 with what ended it.",
)
def test_a_models_code_that_ends_the_process_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object, **__: object) -> None:
        sys.exit(0)

    monkeypatch.setattr("smolquant.check.check", leave)
    log = StringIO()
    assert cli.run(["check", "user/model"], Console({}, log)) == 1
    assert "SystemExit" in log.getvalue()


def test_nothing_but_json_stands_where_a_script_reads_it(tmp_path: Path) -> None:
    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "smolquant", "quantize", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    refused = ran("nothing here", "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["error"]["exit_code"] == 2
    assert "error: " in refused.stderr
    misspelt = ran("user/model", "--json", "--quant-typ", "both")
    assert (misspelt.returncode, misspelt.stdout) == (2, "")
    quiet = ran("nothing here", "--quiet")
    assert quiet.stdout.startswith("error: ")


def test_a_program_is_spared_the_libraries_remarks_on_their_import() -> None:
    script = (
        "import logging, smolquant\n"
        "smolquant.load\n"
        "logging.getLogger('torchao').warning('Failed to load /x/_C_mxfp8.so: it is missing')\n"
        "logging.getLogger('torch.utils._pytree').warning('<enum X> is an Enum subclass and is now "
        "natively supported by torch.compile')\n"
        "logging.getLogger('torchao').warning('a remark that matters')\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stderr
    assert told.strip() == "a remark that matters"
