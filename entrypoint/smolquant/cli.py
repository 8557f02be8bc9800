"""The command line: what each command takes, and what it calls.

Torch is imported when work starts, so that help and refusals answer at once.
"""

import gc
import os
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from smolquant import __version__, cancellation, gpu, tracking
from smolquant.beginning import tell_beginning
from smolquant.bench import bench
from smolquant.chat.command import chat
from smolquant.ending import Ending, explained
from smolquant.errors import (
    Cancelled,
    CheckpointError,
    InputError,
    MachineError,
    SmolquantError,
)
from smolquant.parameters import (
    InputArgument,
    Patterns,
    hub_token,
    input_variable,
    never_written,
    of_published,
    option,
    reproduce,
    switch,
    without_query,
)
from smolquant.remarks import quiet_libraries
from smolquant.remove import remove
from smolquant.report.console import Console
from smolquant.report.failure import Failure
from smolquant.report.files import write_summary
from smolquant.report.run_report import RunReport
from smolquant.schemes import BOTH, INT4_METHODS, SCHEMES, TABLE_SCHEMES
from smolquant.schemes.base import GROUP_SIZES
from smolquant.secrecy import remember_environment
from smolquant.settings import default_of, make_settings
from smolquant.supervise import run_in_child
from smolquant.tokens import masked_token


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="smolquant")
def cli() -> None:
    """Quantize Hugging Face language models and publish the variants, with the numbers to prove it."""


@cli.command(short_help="Quantize a model, measure and publish its variants.")
@click.argument(
    "model_path", cls=InputArgument, required=False, envvar=input_variable("model-path")
)
@click.argument("repo_name", cls=InputArgument, required=False, envvar=input_variable("repo"))
@option(
    "quant-type",
    metavar="TYPES",
    help=f"Quantization types: {', '.join(SCHEMES)}, both ({' and '.join(BOTH)}), or several with "
    "commas between them.",
)
@option(
    "device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Device that computes while weights are calibrated and variants are measured.",
)
@option(
    "group-size",
    type=int,
    help="Number of columns that share a scale in int4: "
    f"{', '.join(map(str, GROUP_SIZES[:-1]))} or {GROUP_SIZES[-1]}.",
)
@option(
    "int4-method",
    type=click.Choice(INT4_METHODS),
    help="Method that finds int4 weights: search looks for each group's grid with the least error; "
    "calibrated, which is better and slow, finds levels that suit a text; rtn rounds to nearest.",
)
@option(
    "calibration-text",
    metavar="FILE",
    help="Text file that --int4-method calibrated uses instead of the bundled text.",
)
@option(
    "embeddings",
    type=click.Choice(["source", *TABLE_SCHEMES]),
    help="Precision of the embeddings and the output head: source keeps them; int8 halves their size, "
    "and stock transformers then dequantizes the whole table for every token.",
)
@option(
    "token",
    env=(input_variable("hf-token"), "HF_TOKEN"),
    written=never_written,
    help="Hugging Face token. Prefer the environment variable HF_TOKEN.",
)
@option(
    "hub-timeout",
    type=click.IntRange(min=1),
    metavar="SECONDS",
    help="Longest time that a request to the Hub may take, with the waiting for a busy Hub, before the run "
    "gives up; a file's content has as long for each megabyte.",
)
@switch("private", "Create the repository as a private one.")
@option("revision", help="Revision of the source on the Hub: a branch, tag or commit sha.")
@option("tag", metavar="NAME", help="Tag that the published commit gets on the Hub.")
@switch("replace-main", "Let a local checkpoint replace different main weights in the repository.")
@option(
    "dtype",
    type=click.Choice(["auto", "bfloat16", "float16"]),
    help="Data type of the weights that stay unquantized; auto stores float32 as bfloat16.",
)
@option("max-shard-size", metavar="SIZE", help="Maximum size of an output shard.")
@switch("create-pr", "Publish to a pull request on the Hub instead of the main branch.")
@switch(
    "branches",
    "Also put each published variant at the root of a branch of its own name, for "
    "servers that know no subfolders; every run with it puts the branches in step with main.",
)
@switch("save-only", "Write the variants locally and do not publish them.")
@option(
    "output-dir", metavar="DIR", help="Folder that the variants and report.json are written to."
)
@option(
    "low-disk",
    type=click.Choice(["auto", "always", "never"]),
    help="Save disk space: stream the source from the Hub and, without evaluation, upload and delete "
    "each shard when it is finished; auto does so when the disk would not hold everything.",
)
@option(
    "evaluate",
    type=click.Choice(["auto", "always", "never"]),
    help="Measure quality and speed; auto does so where the machine and the model allow it.",
)
@option("eval-text", metavar="FILE", help="Text file to measure on instead of the bundled text.")
@option(
    "eval-tokens",
    type=int,
    metavar="N",
    help="Number of evaluation tokens. The default depends on the model's size.",
)
@option(
    "max-perplexity-increase",
    metavar="LIMIT",
    help="Highest allowed increase of the perplexity in percent, such as `5` or `int8=1,int4=12`; "
    "above it the run fails and publishes nothing.",
)
@option(
    "max-kl",
    metavar="LIMIT",
    help="Highest allowed mean KL divergence from the source in nats, such as `0.05` or "
    "`int8=0.01,int4=0.1`; above it the run fails and publishes nothing.",
)
@switch(
    "allow-partial",
    "Publish the variants that keep their limits without those that do not; the run still fails, and "
    "sets no tag.",
)
@option(
    "skip",
    multiple=True,
    type=Patterns(),
    help="Regular expression; modules whose name matches it stay unquantized. May be repeated.",
)
@option("cuda-image", metavar="IMAGE", help="Image that runs in the container that has the GPU.")
@option(
    "trackio-url",
    metavar="URL",
    written=without_query,
    help="Trackio Space or server that records the run; `local` keeps a project in the output folder.",
)
@option("experiment-name", metavar="NAME", help="Name of the Trackio run.")
@option(
    "dataset-repo",
    metavar="REPO",
    help="Bucket on the Hub in which a Trackio Space keeps its data.",
)
@switch("trust-remote-code", "Run model code that the repository contains.")
@switch("force", "Make every variant again, even one that is up to date.")
@switch("dry-run", "Print the plan and the sizes, and write nothing.", written=never_written)
@click.option("--quiet", is_flag=True, help="Write errors only.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Write the content of report.json to stdout, and everything else to stderr.",
)
@click.pass_context
def quantize(context: click.Context, /, *, quiet: bool, as_json: bool, **options: Any) -> int:
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
    console.quiet = quiet
    with (
        Ending(report, console, os.environ, json_stream=sys.stdout if as_json else None) as ending,
        console.doing("Preparing"),
    ):
        if options["token"]:
            console.mask(options["token"])
        _refuse_token_in_argv(context)
        settings = make_settings(
            **options, trackio_write_token=os.environ.get("TRACKIO_WRITE_TOKEN")
        )
        report.repo_id = settings.repo
        tell_beginning(settings, console)

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
                local=settings.keeps_local_project,
            )
        pipeline.quantize(settings, console, report, ending.tracker)
    return ending.exit_code


@cli.command(short_help="Say whether published variants still work.")
@click.argument("repo_or_folder")
@of_published
@click.pass_context
def check(
    context: click.Context,
    /,
    repo_or_folder: str,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
) -> int:
    """Load the published variants with the installed libraries and say whether they still work.

    Their files, and what they predict on a short text, are compared with what was recorded when they were
    made. In a workflow, the job summary has the result.
    """
    from smolquant import check as checking
    from smolquant.hub import Hub

    console: Console = context.obj
    token = masked_token(token, console.mask)
    results = []
    for found in checking.check(
        repo_or_folder,
        Hub(token, notify=console.info),
        revision,
        trust_remote_code=trust_remote_code,
    ):
        console.info(
            f"{found.variant}: {found.verdict} (made with {checking.told(found.made_with)})"
        )
        results.append(found)
    write_summary(checking.summary(repo_or_folder, results), os.environ)
    if broken := [found for found in results if found.problem]:
        reasons = "; ".join(f"{found.variant}: {found.problem.rstrip('.')}" for found in broken)
        raise CheckpointError(
            f"Of {repo_or_folder}, {', '.join(found.variant for found in broken)} "
            f"{'does' if len(broken) == 1 else 'do'} not work as when made. {reasons}.",
            hint="Make them again with `smolquant quantize --force`, or install those they were "
            "made with.",
        )
    return 0


cli.add_command(chat)
cli.add_command(bench)
cli.add_command(remove)


@cli.command("sync-trackio", short_help="Send later what Trackio could not take.")
@click.argument("report_dir", type=click.Path(path_type=Path))
@click.option(
    "--trackio-url",
    metavar="URL",
    help="Trackio Space or server. It has to be named: tokens go to no address out of a file.",
)
@hub_token("Hugging Face token, for a Space.")
@click.pass_context
def sync_trackio(
    context: click.Context, /, report_dir: Path, trackio_url: str | None, token: str | None
) -> int:
    """Send the events in REPORT_DIR that Trackio could not take while the run went on."""
    console: Console = context.obj
    token = masked_token(token, console.mask)
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


def run(arguments: list[str], console: Console) -> int:
    """Run one command and return its exit code; every failure is told once, through ``console``."""
    read_by_someone = sys.stdout
    try:
        cancellation.deliver()
        outcome = cli.main(arguments, prog_name="smolquant", standalone_mode=False, obj=console)
    except click.ClickException as refusal:
        return _refuse(refusal, console)
    except BaseException as error:
        cancellation.begin_to_tell()
        if isinstance(error, SystemExit) and sys.stdout is not read_by_someone:
            return 1  # click has replaced it, since nobody reads its help any more
        told = cancellation.received() or explained(error)
        console.error(told)
        return Failure.of(told).exit_code
    return int(outcome or 0)


def _refuse(refusal: click.ClickException, console: Console) -> int:
    """Tell a refusal by click as our own are told, and return the exit code."""
    context = getattr(refusal, "ctx", None)  # only a usage error has one
    command = context.command_path if context else "smolquant"
    hint = f"`{command} --help` lists what is possible."
    if isinstance(refusal, click.exceptions.NoSuchCommand):
        hint += " In `docker run`, the word smolquant is left out: `IMAGE quantize MODEL REPO`."
    return _fail(InputError(refusal.format_message(), hint=hint), console)


def _tell_killed(cancelled_by: int | None) -> int:
    """Tell the end of a run that was killed before it could, and return the exit code."""
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
    """Tell a failure outside of a run, and return the exit code."""
    if not console.in_actions:
        console.error(error)
        return error.exit_code
    given = os.environ.get(input_variable("output-dir"), "").strip()
    output_dir = given or default_of("output_dir")
    with Ending(RunReport(model="", output_dir=Path(output_dir)), console, os.environ) as ending:
        raise error
    return ending.exit_code


def main() -> None:
    """Entry point of the command, the image and ``python -m smolquant``."""
    _hold_standard_streams()
    is_container = os.getpid() == 1
    if is_container:
        run_in_child(_tell_killed)
    # A refusal of the command line itself must not stand where a script reads JSON, either.
    console = Console(os.environ, sys.stderr if "--json" in sys.argv else sys.stdout)
    cancellation.listen(None if is_container else lambda cancelled: _fail(cancelled, console))
    quiet_libraries()
    remember_environment(os.environ)
    # Libraries make a million objects that stay; looking for garbage among them takes a second.
    gc.set_threshold(100_000)
    arguments = sys.argv[1:]
    if not arguments and os.environ.get("GITHUB_ACTIONS") == "true":
        arguments = ["quantize"]  # an action passes its inputs in the environment and no argument
    threading.excepthook = partial(_tell_thread, console)
    _leave(run(arguments or ["--help"], console))


def _hold_standard_streams() -> None:
    """Open those of the standard streams that were closed, so that no other file gets their numbers.

    A library that writes to them would write into that file: a shard, or the report.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _tell_thread(console: Console, failed: threading.ExceptHookArgs) -> None:
    """Tell, without secrets, what ended a thread; whoever waits for its work tells the rest."""
    if failed.exc_value is not None:
        console.info("".join(traceback.format_exception(failed.exc_value)))


def _leave(exit_code: int) -> NoReturn:
    """End here and now: taking apart what the libraries have built takes the interpreter a second."""
    cancellation.begin_to_tell()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or nobody can write to it
            stream.flush()
    os._exit(exit_code)
