"""``smolquant bench``: how fast each variant of a model is on this machine, beside its source."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolquant.checkpoint.download import fetch_some
from smolquant.errors import CheckpointError, InputError, MachineError
from smolquant.evaluate import machine
from smolquant.hub import Hub
from smolquant.machine import computing_device, require_cuda
from smolquant.parameters import computing_on, of_published
from smolquant.record import FILE_NAME, InvalidRecord, VariantRecord, shows_no_difference
from smolquant.report.console import Console
from smolquant.runtime.contents import (
    missing_variant,
    require_place,
    require_variants,
    variants_in,
)
from smolquant.schemes import BY_VARIANT
from smolquant.text import human_size
from smolquant.tokens import masked_token

if TYPE_CHECKING:
    from smolquant.evaluate.rounds import Ratio
    from smolquant.evaluate.speed import Speed, Speeds

_OF_A_MODEL = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
"""What files of a source end in that loading it may take."""


@click.command(short_help="Time each variant beside its source.")
@click.argument("repo_or_folder")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(list(BY_VARIANT)),
    help="Variant to measure instead of all that are there. May be repeated.",
)
@click.option(
    "--source",
    metavar="MODEL",
    help="Folder or Hub id of the model that they were made from, where it is not beside them.",
)
@computing_on("Device to measure on.")
@of_published
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Write one object of JSON to stdout, and everything else to stderr.",
)
@click.pass_context
def bench(
    context: click.Context,
    /,
    repo_or_folder: str,
    variants: Sequence[str],
    source: str | None,
    device: str,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> int:
    """Measure how fast each variant is on this machine, beside its source, in about a minute.

    REPO_OR_FOLDER is a Hub id, or a folder with variants in it (FOLDER/int8/) and their source at its root.
    """
    from smolquant.evaluate.speed import measure_speeds

    console: Console = context.obj
    token = masked_token(token, console.mask)
    if device == "cuda":
        require_cuda()
    device = computing_device(device)
    hub = Hub(token, notify=console.info)
    folder = _folder_of(repo_or_folder, hub, revision, trust_remote_code)
    there = variants_in(folder)
    require_variants(repo_or_folder, there)
    if missing := [variant for variant in variants if variant not in there]:
        raise missing_variant(repo_or_folder, missing[0], there)
    found = [variant for variant in there if not variants or variant in variants]
    beside = folder if source is None else _folder_of(source, hub, None, trust_remote_code)
    has_source = any(beside.glob("*.safetensors")) or any(beside.glob("*.bin"))
    if source is not None and not has_source:
        raise InputError(
            f"--source {source} has no weights in it.",
            hint="Name the folder or the Hub id of the model that the variants were made from.",
        )
    if not has_source:
        console.info(_without_source(repo_or_folder, folder / found[0]))
    with console.doing("measuring") as heard:
        speeds = measure_speeds(
            beside if has_source else None,
            {variant: folder / variant for variant in found},
            device=device,
            code=beside if trust_remote_code else None,
            heard=heard,
        )
    _tell(console, speeds, device, as_json=as_json)
    _require_all(speeds, repo_or_folder)
    return 0


def _folder_of(repo_or_folder: str, hub: Hub, revision: str | None, with_code: bool) -> Path:
    """The folder itself, or what was fetched of the repository: its variants and its main model."""
    require_place(repo_or_folder)
    if Path(repo_or_folder).is_dir():
        return Path(repo_or_folder)

    def wanted(path: str) -> bool:
        top, in_folder, _ = path.partition("/")
        if path.endswith(".py"):
            return with_code
        return top in BY_VARIANT if in_folder else path.endswith(_OF_A_MODEL)

    return fetch_some(hub, repo_or_folder, revision, wanted, doing="downloading the model")


def _without_source(name: str, variant: Path) -> str:
    """What is said where there is no model to compare with."""
    try:
        record = VariantRecord.from_json((variant / FILE_NAME).read_bytes())
        of = record.source.repo
    except (OSError, InvalidRecord):
        of = None
    return (
        f"{name} holds no source beside its variants, so that no ratio is told: name it with "
        f"--source {of or 'MODEL'}."
    )


def _require_all(speeds: "Speeds", name: str) -> None:
    """Fail where something was not measured.

    Raises:
        CheckpointError: a model does not run.
        MachineError: nothing could be timed.
    """
    models = {"the source": speeds.source, **speeds.variants}
    if faults := {of: speed.fault for of, speed in models.items() if speed.fault}:
        raise CheckpointError(
            f"Of {name}, "
            + "; ".join(f"{of} does not run: {fault}" for of, fault in faults.items())
            + ".",
            hint="`smolquant check` compares its files with what was made.",
        )
    if not any(speed.decode_tokens_per_second for speed in models.values()):
        raise MachineError(
            f"Nothing of {name} could be timed: the models do not fit in this machine's memory, have no "
            "kernels here, or take too long for a token.",
            hint="Measure one --variant alone, or use a machine with more memory.",
        )


def _tell(console: Console, speeds: "Speeds", device: str, *, as_json: bool) -> None:
    on_machine = machine(device, speeds.threads, speeds.load_average)
    if as_json:
        told = {"device": device, "machine": on_machine, **asdict(speeds)}
        Console(os.environ, sys.stdout).info(json.dumps(told, sort_keys=True))
        return
    capability = f", {speeds.capability}" if device == "cpu" and speeds.capability else ""
    console.info(f"On {on_machine}{capability}, one sequence at a time:")
    for line in _table(speeds):
        console.info(line)


def _table(speeds: "Speeds") -> list[str]:
    """Lines in columns; a cell is empty where there is no number."""
    prompt = f" of {speeds.prompt}" if speeds.prompt else ""
    rows: list[tuple[str, ...]] = [
        (
            "model",
            "weights read a token",
            "decoding",
            "of source",
            f"prompt{prompt}",
            "of source",
            "peak memory",
            "kernels",
        )
    ]
    rows += [
        _row(name, speed)
        for name, speed in {"source": speeds.source, **speeds.variants}.items()
        if name != "source" or speed.peak_memory_bytes is not None
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(name: str, speed: "Speed") -> tuple[str, ...]:
    decode, prefill = speed.decode_tokens_per_second, speed.prefill_tokens_per_second
    return (
        name,
        human_size(speed.bytes_read) if speed.bytes_read else "",
        f"{1000 / decode:.1f} ms/token" if decode else "",
        _ratio(speed.decode_ratio),
        f"{prefill:.0f} tokens/s" if prefill else "",
        _ratio(speed.prefill_ratio),
        human_size(speed.peak_memory_bytes) if speed.peak_memory_bytes else "",
        ", ".join(f"{kernel} ({count})" for kernel, count in speed.kernels.items()),
    )


def _ratio(ratio: "Ratio | None") -> str:
    """``1.52 x (1.48 to 1.55)``, or that there is no difference."""
    if ratio is None:
        return ""
    spread = f"({ratio.low:.2f} to {ratio.high:.2f})"
    same = shows_no_difference((ratio.low, ratio.high))
    return f"no difference {spread}" if same else f"{ratio.median:.2f} x {spread}"
