"""Making variants: the folders that they grow in, the disk's use, calibrating, quantizing, measuring.

What it returns says what was made, where it lies, and what that took; the run's report is the pipeline's.
"""

import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from smolquant.checkpoint.files import README, has_size
from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.source import Source
from smolquant.errors import InputError, MachineError
from smolquant.evaluate.bounded import bounded
from smolquant.evaluate.documents import EvalText
from smolquant.evaluate.text import load_tokenizer
from smolquant.machine import (
    DiskUse,
    OutputBytes,
    choose_disk_use,
    computing_device,
    require_memory,
)
from smolquant.memory import give_back_garbage, peak_bytes
from smolquant.model.task import runs_own_code
from smolquant.pace import Part
from smolquant.quantize.calibrate import (
    CalibratedWeights,
    Calibration,
    calibrated_weights,
    calibration_windows,
)
from smolquant.quantize.engine import quantize_checkpoint
from smolquant.quantize.forecast import forecast
from smolquant.quantize.planned import VariantPlan
from smolquant.quantize.planning import Plans
from smolquant.quantize.variant import finish_variant, work_key, write_record
from smolquant.quantize.workfolder import WorkFolder, work_folder
from smolquant.record import FILE_NAME, Behaviour, SourceRecord, VariantRecord
from smolquant.report.console import Console
from smolquant.report.progress import TOKENS
from smolquant.report.run_report import VariantResult
from smolquant.settings import Settings
from smolquant.text import human_size
from smolquant.threads import use_allowed_threads


@dataclass(frozen=True)
class Work:
    """Variants about to be made: their plans, the folders that they grow in, and the open source."""

    settings: Settings
    source: Source
    plans: Plans
    checkpoint: Checkpoint
    folders: Mapping[str, WorkFolder]
    send: Callable[[str, Path], None] | None
    """What takes each finished shard of a variant away; None where all of it stays here."""

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return self.checkpoint.layout.size_bytes

    @property
    def known_source(self) -> SourceRecord | None:
        """The source as it is known before the work; a folder's identity may take as long as that."""
        source = self.source
        if source.revision is None:
            return None
        return SourceRecord(source.identity, self.source_bytes, source.repo, source.revision)


def device_of(plan: VariantPlan, settings: Settings, *, measured: bool) -> str:
    """The device that computes for a variant: ``cpu``, or ``cuda`` where anything runs there."""
    if measured:
        return computing_device(settings.device)
    return _deciding_device(plan, settings) or "cpu"


@contextmanager
def open_work(
    plans: Plans,
    source: Source,
    settings: Settings,
    windows: torch.Tensor | None,
    console: Console,
    *,
    send: Callable[[str, Path], None] | None,
) -> Iterator[Work]:
    """Tell what lies ahead, claim the folders, choose how the disk is used, and open the source.

    What is finished stays for the same command when this is left by a failure that another try may not
    meet; on success the work folders are gone, and what was made has to be in its place by then.

    Args:
        windows: (windows, length) token ids of the text that will be measured on; None for no measuring.
        send: what could take each finished shard of a variant away; None where nothing is published.

    Raises:
        InputError: something else lies where a variant will be.
        MachineError: the disk or the memory does not suffice; with the numbers.
    """
    use_allowed_threads()
    console.info(forecast(plans, source, settings, 0 if windows is None else windows.numel()))
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        folders = {
            variant: cleanup.enter_context(_claimed_folder(source, plan, settings, console))
            for variant, plan in plans.variants.items()
        }
        use = _choose_disk_use(plans, folders, source, settings, may_send=send is not None)
        if use.send_shards:
            console.info("Each shard is sent and deleted as soon as it is finished")
        elif use == DiskUse() and settings.low_disk == "always":
            console.notice(
                "The disk is not spared",
                "The source is here already, or cannot be streamed; and variants that are measured or "
                "saved stay.",
            )
        require_memory()
        checkpoint = cleanup.enter_context(source.checkpoint(streamed=use.stream_source))
        yield Work(settings, source, plans, checkpoint, folders, send if use.send_shards else None)


def quantize_variants(
    work: Work, console: Console, *, watch: Callable[[int], None]
) -> dict[str, VariantResult]:
    """Quantize every variant in its work folder, all in one pass over the source.

    Args:
        watch: is told the bytes of the source that are done, from any thread.

    Raises:
        CheckpointError: the source cannot be read, holds unusable values, or has changed meanwhile.
        GateError: a weight is further from its source than its scheme can put it.
        OSError: the disk is full.
    """
    plans = work.plans.variants
    started = time.monotonic()
    with (
        _calibrated(work, console) as calibrated,
        console.progress(", ".join(plans), work.source_bytes) as progress,
    ):

        def advance(n_bytes: int) -> None:
            progress.advance(n_bytes)
            watch(n_bytes)

        written = quantize_checkpoint(
            work.checkpoint,
            plans,
            {variant: folder.folder for variant, folder in work.folders.items()},
            advance=advance,
            journals={variant: folder.journal for variant, folder in work.folders.items()},
            calibrated=calibrated,
            send=work.send,
        )
    seconds = time.monotonic() - started
    work.checkpoint.verify()
    work.source.require_unchanged()
    console.info(f"{work.settings.model}: {work.source.identity}")
    results = {}
    for variant, plan in plans.items():
        folder = work.folders[variant].folder
        record = finish_variant(
            folder,
            plan,
            written[variant],
            source=work.source,
            config=work.plans.architecture.config_dict,
            options=work.settings.options_of(plan.scheme.quant_type),
            source_bytes=work.source_bytes,
            license_files=_license_files(work),
            device=_deciding_device(plan, work.settings),
            task=work.plans.architecture.task,
            runs_own_code=runs_own_code(work.plans.architecture.model),
        )
        results[variant] = VariantResult(
            record, folder, seconds=seconds, peak_memory_bytes=peak_bytes()
        )
    return results


def measure_variants(
    work: Work, results: Mapping[str, VariantResult], windows: torch.Tensor, console: Console
) -> dict[str, VariantResult]:
    """Measure what was made, on the files that will be published.

    Args:
        windows: (windows, length) token ids, as the measurement has cut them.

    Raises:
        CannotMeasure: the model does not run layer by layer, or a variant not on this device.
        CheckpointError: the source's own predictions are not finite.
        GateError: a variant's predictions are not finite, or it does not load back.
        MachineError: it does not fit in memory.
    """

    @contextmanager
    def progress(tokens: Sequence[Part]) -> Iterator[Callable[[int], None]]:
        with console.progress("measuring quality", tokens, TOKENS) as shown:
            yield shown.advance

    give_back_garbage()  # the blocks that quantizing has kept for itself
    started = time.monotonic()
    behaviours: dict[str, Behaviour] = {}
    metrics = work.settings.measurement.run(
        windows,
        work.plans.architecture,
        work.checkpoint,
        work.source.folder,
        variants={variant: work.folders[variant].folder for variant in results},
        progress=progress,
        timing=partial(console.doing, "measuring speed"),
        observed=behaviours.__setitem__,
        device=computing_device(work.settings.device),
    )
    seconds = time.monotonic() - started
    return {
        variant: replace(
            one,
            record=replace(
                one.record, metrics=metrics.get(variant), behaviour=behaviours.get(variant)
            ),
            evaluation_seconds=seconds,
        )
        for variant, one in results.items()
    }


def keep_variants(
    work: Work, results: Mapping[str, VariantResult], *, refused: Container[str] = ()
) -> dict[str, VariantResult]:
    """Write the records and move each variant to its place in the output folder, whole.

    What is left of a variant whose shards were taken away waits beside its place until it is published.

    Args:
        refused: variants that may not go out. They are kept like the others, so that another try finds
            them; but where an earlier run has saved the variant, that one stays, and has no folder here.

    Raises:
        MachineError: files that were written are gone, or were cut short.
    """
    kept = {}
    for variant, one in results.items():
        folder = work.folders[variant].folder
        write_record(folder, one.record)
        if not work.send:
            _require_complete(folder, one.record)
        place = work.settings.output_dir / (f".sent-{variant}" if work.send else variant)
        if variant in refused and work.settings.save_only and (place / README).is_file():
            kept[variant] = replace(one, folder=None)
            continue
        _put_in_place(folder, place)
        kept[variant] = replace(one, folder=place)
    return kept


def _require_complete(folder: Path, record: VariantRecord) -> None:
    missing = [name for name, file in record.files.items() if not has_size(folder / name, file)]
    if missing:
        raise MachineError(
            f"{folder / missing[0]} was deleted or changed while the run went on.",
            hint="Run again when nothing else works in --output-dir.",
        )


def _license_files(work: Work) -> Sequence[str]:
    """The licenses that each variant takes along: those that do not lie at the root beside it."""
    return work.source.license_files if work.settings.variants_stand_alone else ()


def _deciding_device(plan: VariantPlan, settings: Settings) -> str | None:
    """The device that finds a variant's bytes, if they depend on it."""
    if plan.scheme.calibration_sha256 is None:
        return None
    return computing_device(settings.device)


@contextmanager
def _claimed_folder(
    source: Source, plan: VariantPlan, settings: Settings, console: Console
) -> Iterator[WorkFolder]:
    """The folder in which a variant is made, with what a run that was killed has finished of it."""
    variant = plan.scheme.variant
    _check_place(settings.output_dir / variant)
    options = dict(settings.options_of(plan.scheme.quant_type))
    if device := _deciding_device(plan, settings):
        options["device"] = device
    key = work_key(plan, source.state, options)
    work = None
    try:
        with work_folder(settings.output_dir, variant, key) as work:
            if work.finished_bytes:
                size = human_size(work.finished_bytes)
                console.info(f"{variant}: going on from {size} that an earlier run finished")
            yield work
    except BaseException:
        if work is not None and work.keeps_shards:
            console.info(f"{variant}: {work.root} keeps what is finished for the same command")
        raise


def _choose_disk_use(
    plans: Plans,
    folders: Mapping[str, WorkFolder],
    source: Source,
    settings: Settings,
    *,
    may_send: bool,
) -> DiskUse:
    """Choose how to spare the disk, as was asked for or is necessary."""
    variants, download = plans.variants, source.to_fetch()
    # What calibration finds is on the disk until it is stored.
    found = sum(variants[variant].size_bytes for variant in _to_calibrate(plans, folders))
    unfinished = sum(plan.size_bytes for plan in variants.values())
    unfinished -= sum(folder.finished_bytes for folder in folders.values())
    shards = (max(shard.size_bytes for shard in plan.shards) for plan in variants.values())
    return choose_disk_use(
        settings.low_disk,
        settings.output_dir,
        OutputBytes(found + unfinished, found + sum(shards)),
        download,
        DiskUse(
            stream_source=source.can_stream and download.size > 0,
            # Whatever may still be refused after measuring, or is measured, stays until then.
            send_shards=may_send and settings.evaluate == "never",
        ),
    )


def _to_calibrate(plans: Plans, folders: Mapping[str, WorkFolder]) -> list[str]:
    """The variants whose weights have to be found from a text, unless they are stored already."""
    return [
        variant
        for variant, plan in plans.variants.items()
        if plan.scheme.calibration_sha256 is not None
        and folders[variant].finished_bytes != plan.size_bytes
    ]


@contextmanager
def _calibrated(work: Work, console: Console) -> Iterator[Mapping[str, CalibratedWeights]]:
    """The weights of variants as a text wants them, for as long as they are being stored."""
    text, architecture = work.settings.calibration, work.plans.architecture
    with ExitStack() as stack:
        found = {}
        for variant in _to_calibrate(work.plans, work.folders):
            assert text is not None, "a scheme that is calibrated has the text's digest"
            windows = bounded(partial(_calibration_windows, text, work))
            calibration = Calibration(
                architecture,
                work.checkpoint,
                work.plans.variants[variant],
                windows,
                device=computing_device(work.settings.device),
            )
            calibration.require_memory()
            with console.progress(f"calibrating {variant}", calibration.work_bytes) as progress:
                folder = work.folders[variant].root / "calibrated"
                weights = calibrated_weights(calibration, folder, progress.advance)
                found[variant] = stack.enter_context(weights)
            if calibration.searched_experts:
                console.info(
                    f"{variant}: {calibration.searched_experts} experts are searched for by themselves, "
                    "since the text reaches them too seldom"
                )
        yield found


def _calibration_windows(text: EvalText, work: Work) -> torch.Tensor:
    tokenizer = load_tokenizer(
        work.source.folder, trust_remote_code=work.settings.trust_remote_code
    )
    return calibration_windows(text, tokenizer, work.plans.architecture)


def _check_place(place: Path) -> None:
    """Refuse a place in which something other than a variant lies."""
    ours = not place.is_symlink() and (place / FILE_NAME).is_file()
    if place.is_symlink() or (place.exists() and not ours and not _is_empty_folder(place)):
        raise InputError(
            f"{place} exists and is something other than a variant.",
            hint="Move it away, or choose another --output-dir.",
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _put_in_place(folder: Path, place: Path) -> None:
    """Rename ``folder`` to ``place``; whatever moment this is killed at, a whole variant is left."""
    old = folder.with_name(f"{folder.name}.old")
    if place.exists():
        place.rename(old)
    folder.rename(place)
    shutil.rmtree(old, ignore_errors=True)
