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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from smolquant import __version__, gpu, tracking
from smolquant.errors import (
    Cancelled,
    CheckpointError,
    InputError,
    MachineError,
    SmolquantError,
)
from smolquant.report.console import Console
from smolquant.report.failure import Failure
from smolquant.schemes import DEFAULT_INT4_METHOD, INT4_METHODS, SCHEMES
from smolquant.settings import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_OUTPUT_DIR,
    DEFAULT_QUANT_TYPE,
    DEFAULT_SHARD_SIZE,
    Settings,
    make_settings,
    shard_size,
)
from smolquant.story import Story
from smolquant.supervise import run_in_child
from smolquant.text import plain


def input_variable(name: str) -> str:
    """The environment variable in which a Docker action finds its input ``name``."""
    return f"INPUT_{name.replace(' ', '_').upper()}"


def _option(name: str, *, env: tuple[str, ...] = (), **attributes: Any) -> Callable[..., Any]:
    """An option that an action's input of the same name sets too, unless ``env`` names others."""
    return click.option(
        f"--{name}", envvar=env or input_variable(name), show_default=True, **attributes
    )


def _switch(name: str, help_text: str) -> Callable[..., Any]:
    """An option that is off unless it is named; as an input, ``true`` or ``false``."""
    return click.option(
        f"--{name}", is_flag=True, default=False, envvar=input_variable(name), help=help_text
    )


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
    default=DEFAULT_QUANT_TYPE,
    metavar="TYPES",
    help="int8_weight_only, int4_weight_only, int8_dynamic, both (the first two), or a list a,b.",
)
@_option(
    "device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where searching, calibrating and evaluating run.",
)
@_option(
    "group-size",
    type=int,
    default=DEFAULT_GROUP_SIZE,
    help="int4: columns that share a scale; 32, 64, 128 or 256.",
)
@_option(
    "int4-method",
    type=click.Choice(INT4_METHODS),
    default=DEFAULT_INT4_METHOD,
    help="int4: search each group's grid for the least error, find levels that suit a text "
    "(calibrated: better and slow), or round to nearest (rtn).",
)
@_option(
    "calibration-text",
    metavar="FILE",
    help="Text for --int4-method calibrated instead of the bundled one.",
)
@_option(
    "embeddings",
    type=click.Choice(["source", "int8"]),
    default="source",
    help="int8 makes them and the output head half as large; stock transformers then dequantizes the "
    "whole table for every token.",
)
@_option(
    "token",
    env=(input_variable("hf-token"), "HF_TOKEN"),
    help="Hugging Face token. Prefer the environment: HF_TOKEN.",
)
@_switch("private", "Create the repository private.")
@_option("revision", help="Source revision on the Hub: a branch, tag or sha.")
@_option("tag", metavar="NAME", help="Also tag the published commit on the Hub.")
@_switch("replace-main", "Let a local checkpoint replace different main weights in the repository.")
@_option(
    "dtype",
    type=click.Choice(["auto", "bfloat16", "float16"]),
    default="auto",
    help="Of what stays unquantized; auto: float32 becomes bfloat16.",
)
@_option("max-shard-size", default=DEFAULT_SHARD_SIZE, metavar="SIZE", help="Of output shards.")
@_switch("create-pr", "Publish to a pull request on the Hub instead of the main branch.")
@_switch("save-only", "Write the variants locally and do not publish.")
@_option(
    "output-dir",
    default=DEFAULT_OUTPUT_DIR,
    metavar="DIR",
    help="Where the variants are written.",
)
@_option(
    "low-disk",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Stream the source from the Hub, and without evaluation send each shard when it is finished, "
    "instead of storing them; auto: when the disk would not hold them.",
)
@_option(
    "evaluate",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Measure quality and speed; auto: where it can be done, in the memory there is.",
)
@_option("eval-text", metavar="FILE", help="Text to measure on instead of the bundled one.")
@_option("eval-tokens", type=int, metavar="N", help="How many tokens of it.")
@_option(
    "max-perplexity-increase",
    metavar="LIMIT",
    help="In percent, `5` or `int8=1,int4=12`; above it, fail and publish nothing.",
)
@_option(
    "max-kl",
    metavar="LIMIT",
    help="The same for the mean KL divergence from the source, in nats.",
)
@_option(
    "skip",
    multiple=True,
    type=_Patterns(),
    help="Keep modules whose name matches this regular expression; repeatable.",
)
@_option("cuda-image", metavar="IMAGE", help="The image that a GPU sibling container runs.")
@_option("trackio-url", metavar="URL", help="Trackio Space or server that records the run.")
@_option("experiment-name", metavar="NAME", help="Name of the Trackio run.")
@_option("dataset-repo", metavar="REPO", help="Where Trackio keeps its data on the Hub.")
@_switch("trust-remote-code", "Run model code that the repository brings along.")
@_switch("force", "Make a variant again although it is up to date.")
@_switch("dry-run", "Print the plan and the sizes, write nothing.")
@click.pass_context
def quantize(context: click.Context, /, **options: Any) -> int:
    """Quantize MODEL_PATH (a checkpoint folder or a Hub id) and publish into REPO_NAME.

    One argument that is a Hub id is both. A folder alone needs --save-only.
    """
    console: Console = context.obj
    story = Story(
        model=options["model_path"] or options["repo_name"] or "",
        output_dir=Path(options["output_dir"]),
        dry_run=options["dry_run"],
        save_only=options["save_only"],
    )
    with story.told(console, os.environ):
        if options["token"]:
            console.mask(options["token"])
        _refuse_token_in_argv(context)
        settings = make_settings(
            **options, trackio_write_token=os.environ.get("TRACKIO_WRITE_TOKEN")
        )
        story.repo_id = settings.repo
        story.command = reproduce(settings)

        from smolquant import pipeline  # brings torch's users in; a refusal above answers at once

        story.passed_on = gpu.run_in_sibling(settings, sys.argv[1:], console, os.environ)
        if story.passed_on is not None:
            return story.passed_on
        if not settings.dry_run:
            story.tracker = tracking.start(
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
        pipeline.quantize(settings, console, story)
    return story.exit_code


@cli.command()
@click.argument("repo_or_folder")
@click.option("--revision", help="Branch, tag or sha on the Hub.")
@click.option("--token", envvar="HF_TOKEN", help="Hugging Face token, for a private repository.")
@click.pass_context
def check(
    context: click.Context, /, repo_or_folder: str, revision: str | None, token: str | None
) -> int:
    """Load the published variants with the installed libraries and say whether they still work."""
    from smolquant import check as room
    from smolquant.hub import Hub

    console: Console = context.obj
    if token:
        console.mask(token)
    broken = []
    for found in room.check(repo_or_folder, Hub(token), revision):
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


def reproduce(settings: Settings) -> str:
    """The shell command that makes this run again; the token stays in the environment."""
    words = ["smolquant", "quantize", settings.model]
    if settings.repo is not None and settings.repo != settings.model:
        words.append(settings.repo)
    given: dict[str, tuple[object, object]] = {
        "--quant-type": (",".join(settings.quant_types), DEFAULT_QUANT_TYPE),
        "--device": (settings.device, "auto"),
        "--group-size": (settings.group_size, DEFAULT_GROUP_SIZE),
        "--int4-method": (settings.int4_method, DEFAULT_INT4_METHOD),
        "--calibration-text": (settings.calibration_text, None),
        "--embeddings": (settings.embeddings, "source"),
        "--revision": (settings.revision, None),
        "--tag": (settings.tag, None),
        "--dtype": (settings.dtype, "auto"),
        "--max-shard-size": (settings.max_shard_size, shard_size(DEFAULT_SHARD_SIZE)),
        "--output-dir": (settings.output_dir, Path(DEFAULT_OUTPUT_DIR)),
        "--low-disk": (settings.low_disk, "auto"),
        "--evaluate": (settings.evaluate, "auto"),
        "--eval-text": (settings.eval_text, None),
        "--eval-tokens": (settings.eval_tokens, None),
        "--max-perplexity-increase": (_limits(settings.gate.perplexity_increase), ""),
        "--max-kl": (_limits(settings.gate.kl), ""),
        "--cuda-image": (settings.cuda_image, None),
        "--trackio-url": (settings.trackio and settings.trackio.address, None),
        "--experiment-name": (settings.experiment_name, None),
        "--dataset-repo": (settings.trackio and settings.trackio.bucket, None),
    }
    for name, (value, default) in given.items():
        if value != default:
            words += [name, str(value)]
    for pattern in settings.skip:
        words += ["--skip", pattern]
    switches = ("private", "replace_main", "create_pr", "save_only", "trust_remote_code", "force")
    words += [f"--{name.replace('_', '-')}" for name in switches if getattr(settings, name)]
    return shlex.join(words)


def _limits(limits: Mapping[str, float]) -> str:
    return ",".join(f"{variant}={plain(limit)}" for variant, limit in limits.items())


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
    """Tell of a failure outside of a run's own story; its exit code."""
    if not console.in_actions:
        console.error(error)
        return error.exit_code
    output_dir = os.environ.get(input_variable("output-dir")) or DEFAULT_OUTPUT_DIR
    story = Story(model="", output_dir=Path(output_dir))
    with story.told(console, os.environ):
        raise error
    return story.exit_code


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
