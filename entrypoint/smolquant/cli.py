"""The command line, and the only reader of argv and the environment.

An action's inputs arrive as ``INPUT_<NAME>`` with the hyphens kept; an empty one means unset. Torch is
imported when work starts, so that help and refusals answer at once.
"""

import gc
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from smolquant import __version__, gpu, tracking
from smolquant.ending import Ending
from smolquant.errors import (
    Cancelled,
    CheckpointError,
    InputError,
    MachineError,
    SmolquantError,
)
from smolquant.report.console import Console
from smolquant.report.failure import Failure
from smolquant.report.run_report import RunReport
from smolquant.schemes import BOTH, INT4_METHODS, SCHEMES, TABLE_SCHEMES
from smolquant.schemes.base import GROUP_SIZES
from smolquant.settings import default_of, make_settings
from smolquant.supervise import run_in_child


def input_variable(name: str) -> str:
    """The environment variable in which a Docker action finds its input ``name``."""
    return f"INPUT_{name.replace(' ', '_').upper()}"


class _Option(click.Option):
    """An option whose default is the settings', and which knows how a command says it again."""

    def __init__(
        self, *arguments: Any, repeated: Callable[[Any], str | None] = str, **attributes: Any
    ) -> None:
        """Take ``repeated``: a value as the command that reproduces the run gives it, if it may."""
        super().__init__(*arguments, **attributes)
        self._repeated = repeated

    def words(self, value: Any) -> list[str]:
        """What gives ``value`` on a command line; nothing for the default."""
        if value in (self.default, ()):
            return []
        values = value if self.multiple else (value,)
        shown = [text for one in values if (text := self._repeated(one)) is not None]
        if self.is_flag:
            return [self.opts[0]] * len(shown)
        return [word for text in shown for word in (self.opts[0], text)]


def _option(name: str, *, env: tuple[str, ...] = (), **attributes: Any) -> Callable[..., Any]:
    """An option that an action's input of the same name sets too, unless ``env`` names others."""
    return click.option(
        f"--{name}",
        cls=_Option,
        envvar=env or input_variable(name),
        default=default_of(name.replace("-", "_")),
        show_default=True,
        **attributes,
    )


def _switch(name: str, help_text: str, **attributes: Any) -> Callable[..., Any]:
    """An option that is off unless it is named; as an input, ``true`` or ``false``."""
    return _option(name, is_flag=True, help=help_text, **attributes)


def _never_repeated(_: object) -> None:
    """A secret, or what is no part of the run itself."""


def _without_query(address: str) -> str:
    """An address without what may hold a token."""
    return address.partition("?")[0]


class _Patterns(click.ParamType[str]):
    """A repeatable option; as an input, one pattern a line (a pattern may hold spaces)."""

    name = "pattern"

    def split_envvar_value(self, rv: str) -> list[str]:
        return [line.strip() for line in rv.splitlines() if line.strip()]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="smolquant")
def cli() -> None:
    """Quantize Hugging Face language models and publish the variants, with the numbers to prove it."""


@cli.command()
@click.argument("model_path", required=False, envvar=input_variable("model-path"))
@click.argument("repo_name", required=False, envvar=input_variable("repo"))
@_option(
    "quant-type",
    metavar="TYPES",
    help=f"Quantization types: {', '.join(SCHEMES)}, both ({' and '.join(BOTH)}), or several with "
    "commas between them.",
)
@_option(
    "device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Device that computes while weights are calibrated and variants are measured.",
)
@_option(
    "group-size",
    type=int,
    help="Number of columns that share a scale in int4: "
    f"{', '.join(map(str, GROUP_SIZES[:-1]))} or {GROUP_SIZES[-1]}.",
)
@_option(
    "int4-method",
    type=click.Choice(INT4_METHODS),
    help="Method that finds int4 weights: search looks for each group's grid with the least error; "
    "calibrated, which is better and slow, finds levels that suit a text; rtn rounds to nearest.",
)
@_option(
    "calibration-text",
    metavar="FILE",
    help="Text file that --int4-method calibrated uses instead of the bundled text.",
)
@_option(
    "embeddings",
    type=click.Choice(["source", *TABLE_SCHEMES]),
    help="Precision of the embeddings and the output head: source keeps them; int8 halves their size, "
    "and stock transformers then dequantizes the whole table for every token.",
)
@_option(
    "token",
    env=(input_variable("hf-token"), "HF_TOKEN"),
    repeated=_never_repeated,
    help="Hugging Face token. Prefer the environment variable HF_TOKEN.",
)
@_switch("private", "Create the repository as a private one.")
@_option("revision", help="Revision of the source on the Hub: a branch, tag or commit sha.")
@_option("tag", metavar="NAME", help="Tag that the published commit gets on the Hub.")
@_switch("replace-main", "Let a local checkpoint replace different main weights in the repository.")
@_option(
    "dtype",
    type=click.Choice(["auto", "bfloat16", "float16"]),
    help="Data type of the weights that stay unquantized; auto stores float32 as bfloat16.",
)
@_option("max-shard-size", metavar="SIZE", help="Maximum size of an output shard.")
@_switch("create-pr", "Publish to a pull request on the Hub instead of the main branch.")
@_switch("save-only", "Write the variants locally and do not publish them.")
@_option(
    "output-dir", metavar="DIR", help="Folder that the variants and report.json are written to."
)
@_option(
    "low-disk",
    type=click.Choice(["auto", "always", "never"]),
    help="Save disk space: stream the source from the Hub and, without evaluation, upload and delete "
    "each shard when it is finished; auto does so when the disk would not hold everything.",
)
@_option(
    "evaluate",
    type=click.Choice(["auto", "always", "never"]),
    help="Measure quality and speed; auto does so where the machine's memory allows it.",
)
@_option("eval-text", metavar="FILE", help="Text file to measure on instead of the bundled text.")
@_option(
    "eval-tokens",
    type=int,
    metavar="N",
    help="Number of evaluation tokens. The default depends on the model's size.",
)
@_option(
    "max-perplexity-increase",
    metavar="LIMIT",
    help="Highest allowed increase of the perplexity in percent, such as `5` or `int8=1,int4=12`; "
    "above it the run fails and publishes nothing.",
)
@_option(
    "max-kl",
    metavar="LIMIT",
    help="Highest allowed mean KL divergence from the source in nats, such as `0.05` or "
    "`int8=0.01,int4=0.1`; above it the run fails and publishes nothing.",
)
@_option(
    "skip",
    multiple=True,
    type=_Patterns(),
    help="Regular expression; modules whose name matches it stay unquantized. May be repeated.",
)
@_option("cuda-image", metavar="IMAGE", help="Image that runs in the container that has the GPU.")
@_option(
    "trackio-url",
    metavar="URL",
    repeated=_without_query,
    help="Trackio Space or server that records the run.",
)
@_option("experiment-name", metavar="NAME", help="Name of the Trackio run.")
@_option(
    "dataset-repo",
    metavar="REPO",
    help="Bucket on the Hub in which a Trackio Space keeps its data.",
)
@_switch("trust-remote-code", "Run model code that the repository contains.")
@_switch("force", "Make every variant again, even one that is up to date.")
@_switch("dry-run", "Print the plan and the sizes, and write nothing.", repeated=_never_repeated)
@click.pass_context
def quantize(context: click.Context, /, **options: Any) -> int:
    """Quantize MODEL_PATH (a checkpoint folder or a Hub id) and publish into REPO_NAME.

    One argument that is a Hub id is both. A folder alone needs --save-only.
    """
    report = RunReport(
        model=options["model_path"] or options["repo_name"] or "",
        output_dir=Path(options["output_dir"]),
        command=reproduce(context),
        dry_run=options["dry_run"],
        save_only=options["save_only"],
    )
    console: Console = context.obj
    with Ending(report, console, os.environ) as ending:
        if options["token"]:
            console.mask(options["token"])
        _refuse_token_in_argv(context)
        settings = make_settings(
            **options, trackio_write_token=os.environ.get("TRACKIO_WRITE_TOKEN")
        )

        from smolquant import pipeline  # brings torch's users in; a refusal above answers at once

        ending.passed_on = gpu.run_in_sibling(settings, sys.argv[1:], console, os.environ)
        if ending.passed_on is not None:
            return ending.exit_code
        if not settings.dry_run:
            ending.tracker = tracking.start(
                settings.trackio,
                output_dir=settings.output_dir,
                console=console,
                environ=os.environ,
                repo=settings.repo or settings.model,
                revision=settings.revision,
                quant_types={SCHEMES[name].variant: name for name in settings.quant_types},
                experiment_name=settings.experiment_name,
                hub_token=settings.token,
                private=settings.private,
            )
        pipeline.quantize(settings, console, report, ending.tracker)
    return ending.exit_code


@cli.command()
@click.argument("repo_or_folder")
@click.option("--revision", help="Branch, tag or sha on the Hub.")
@click.option("--token", envvar="HF_TOKEN", help="Hugging Face token, for a private repository.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the code that the repository brings along for its model; read it first.",
)
@click.pass_context
def check(
    context: click.Context,
    /,
    repo_or_folder: str,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
) -> int:
    """Load the published variants with the installed libraries and say whether they still work."""
    from smolquant import check as checking
    from smolquant.hub import Hub

    console: Console = context.obj
    if token:
        console.mask(token)
    broken = []
    results = checking.check(
        repo_or_folder, Hub(token), revision, trust_remote_code=trust_remote_code
    )
    for found in results:
        made_with = ", ".join(f"{name} {made}" for name, made in sorted(found.made_with.items()))
        console.info(f"{found.variant}: {found.problem or 'works'} (made with {made_with})")
        broken += [found.variant] if found.problem else []
    if broken:
        raise CheckpointError(
            f"{', '.join(broken)} of {repo_or_folder} do not work with the installed libraries.",
            hint="Make them again with `smolquant quantize --force`, or install those they were "
            "made with.",
        )
    return 0


@cli.command("sync-trackio")
@click.argument("report_dir", type=click.Path(path_type=Path))
@click.option("--trackio-url", metavar="URL", help="Default: where the run was to be recorded.")
@click.option("--token", envvar="HF_TOKEN", help="Hugging Face token, for a Space.")
@click.pass_context
def sync_trackio(
    context: click.Context, /, report_dir: Path, trackio_url: str | None, token: str | None
) -> int:
    """Send the events in REPORT_DIR that Trackio could not take while the run went on."""
    console: Console = context.obj
    if token:
        console.mask(token)
    write_token = os.environ.get("TRACKIO_WRITE_TOKEN")
    url = tracking.sync(
        report_dir,
        tracking.make_destination(trackio_url, write_token=write_token),
        console=console,
        environ=os.environ,
        hub_token=token,
    )
    console.info(f"Sent: {url}" if url else "There was no run to send.")
    return 0


def _refuse_token_in_argv(context: click.Context) -> None:
    on_command_line = (
        context.get_parameter_source("token") is click.core.ParameterSource.COMMANDLINE
    )
    if on_command_line and os.environ.get("GITHUB_ACTIONS") == "true":
        raise InputError(
            "--token stands on the command line, where a workflow's log shows it.",
            hint="Pass it as the input hf-token, or in the environment as HF_TOKEN.",
        )


def reproduce(context: click.Context) -> str:
    """The shell command that makes this run again; a token stays in the environment."""
    words = ["smolquant", "quantize"]
    named = (context.params["model_path"], context.params["repo_name"])
    words += dict.fromkeys(name for name in named if name)  # one name is enough for both
    for parameter in context.command.params:
        if isinstance(parameter, _Option):
            words += parameter.words(context.params[str(parameter.name)])
    return shlex.join(words)


def run(arguments: list[str], console: Console) -> int:
    """Run one command and return its exit code; every failure is told once, through ``console``."""
    try:
        outcome = cli.main(arguments, prog_name="smolquant", standalone_mode=False, obj=console)
    except click.ClickException as refusal:
        return _refuse(refusal, console)
    except BaseException as error:
        console.error(error)
        return Failure.of(error).exit_code
    return int(outcome or 0)


def _refuse(refusal: click.ClickException, console: Console) -> int:
    """click's own refusals, told like ours."""
    return _fail(
        InputError(
            refusal.format_message(), hint="`smolquant quantize --help` lists what is possible."
        ),
        console,
    )


def _tell_killed(cancelled_by: int | None) -> int:
    """The end of a run that could not tell it itself; its exit code."""
    error: SmolquantError | Cancelled
    if cancelled_by is not None:
        error = Cancelled(cancelled_by)
    else:
        error = MachineError(
            "The run was killed (SIGKILL, 137): it took more memory than the container or the machine "
            "has.",
            hint="Use a runner with more memory, raise the container's limit, or set --evaluate never.",
        )
    return _fail(error, Console(os.environ, sys.stdout))


def _fail(error: SmolquantError | Cancelled, console: Console) -> int:
    """Tell a failure outside of a run; its exit code."""
    if not console.in_actions:
        console.error(error)
        return error.exit_code
    output_dir = os.environ.get(input_variable("output-dir")) or default_of("output_dir")
    with Ending(RunReport(model="", output_dir=Path(output_dir)), console, os.environ) as ending:
        raise error
    return ending.exit_code


def main() -> None:
    """Entry point of the command, the image and ``python -m smolquant``."""
    if os.getpid() == 1:
        run_in_child(_tell_killed)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _cancel)
    _quiet_libraries()
    # Libraries make a million objects that stay; looking for garbage among them takes a second.
    gc.set_threshold(100_000)
    arguments = sys.argv[1:]
    if not arguments and os.environ.get("GITHUB_ACTIONS") == "true":
        arguments = ["quantize"]  # an action passes its inputs in the environment and no argument
    _leave(run(arguments or ["--help"], Console(os.environ, sys.stdout)))


def _leave(exit_code: int) -> NoReturn:
    """End here and now: taking apart what the libraries have built takes the interpreter a second."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start
        with suppress(OSError, ValueError):  # nobody reads it any more, or nobody can write to it
            stream.flush()
    os._exit(exit_code)


def _quiet_libraries() -> None:
    """Keep the libraries' remarks, which users cannot act on, out of the log.

    They would also carry text of a model's repository past the console, which takes workflow commands
    out of it.
    """
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _cancel(number: int, _frame: object) -> None:
    raise Cancelled(number)
