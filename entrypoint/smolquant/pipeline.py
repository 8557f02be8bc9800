"""The story of a run: settings -> source -> plan -> quantize -> evaluate -> publish -> report.

Each room knows what it is handed. Nothing outside the output folder changes before the one commit at
the end, but for blobs that no branch refers to, in a repository that may be new and empty, where the
disk is to be spared; what is told of the run is collected in a :class:`Story` as it becomes known.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.checkpoint.files import is_code
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.repository import HubSource
from smolquant.checkpoint.source import Source
from smolquant.errors import CannotMeasure, InputError, MachineError
from smolquant.evaluate import Measurement, make_measurement
from smolquant.evaluate.gate import check_plausible, judge, verdict
from smolquant.evaluate.text import load_tokenizer
from smolquant.hub import Hub
from smolquant.machine import (
    DiskUse,
    OutputBytes,
    choose_disk_use,
    require_memory,
    require_room_for,
)
from smolquant.memory import peak_bytes
from smolquant.publish.commit import (
    Publication,
    create_repo,
    is_intact,
    local_records,
    publish,
    tag_commit,
    write_local,
)
from smolquant.publish.main_model import (
    MainModel,
    MainModelChange,
    check_same_weights,
    main_model_change,
)
from smolquant.publish.preupload import PreuploadedShards
from smolquant.publish.target import (
    Target,
    check_folder_is_ours,
    check_tag,
    check_write_access,
    inspect_target,
)
from smolquant.quantize.workfolder import WorkFolder, work_folder
from smolquant.record import FILE_NAME, Metrics, SourceRecord, TensorRecord, VariantRecord
from smolquant.report.console import Console
from smolquant.report.run_report import VariantResult
from smolquant.schemes import SCHEMES
from smolquant.schemes.int4_weight_only import Int4WeightOnly
from smolquant.settings import Settings
from smolquant.story import Story
from smolquant.text import human_size

if TYPE_CHECKING:
    import torch

    from smolquant.checkpoint.reader import Checkpoint
    from smolquant.model.architecture import Architecture
    from smolquant.quantize.calibrate import CalibratedWeights
    from smolquant.quantize.plan import VariantPlan


def quantize(settings: Settings, console: Console, story: Story) -> None:
    """Quantize and publish as asked, telling ``story`` each fact as it becomes known.

    Raises:
        SmolquantError: one per exit code; the Hub is then as it was before.
    """
    run = _Run(settings, console, story)
    with console.group("Source"):
        source = run.open_source()
        target = run.inspect_target()
        wanted = run.wanted(source, target)
        run.check_conflicts(source, target, wanted)
    if settings.dry_run:
        run.show_plan(source, wanted)
        return
    records = run.made_before(source, target, wanted)
    run.judge()  # what is there already, too: limits may have become tighter
    if records:
        source.require_unchanged()
    to_make = [quant_type for quant_type in wanted if SCHEMES[quant_type].variant not in records]
    if to_make:
        records |= run.make(source, target, to_make)
    with console.group("Save" if settings.save_only else "Publish"):
        if target is None:
            run.save(source, records)
        else:
            run.publish(source, target, records)


@dataclass(frozen=True)
class Preview:
    """A planned variant as a dry run shows it."""

    quant_type: str
    tensors: Mapping[str, TensorRecord]
    predicted_bytes: int


@dataclass
class _Run:
    """The steps of the story."""

    settings: Settings
    console: Console
    story: Story
    ahead: PreuploadedShards | None = None
    """Where the disk is to be spared: what is on the Hub already, and no longer here."""
    found: dict[str, VariantRecord] = field(default_factory=dict)
    """Variants of an earlier run, in the output folder."""

    @cached_property
    def hub(self) -> Hub:
        return Hub(self.settings.token)

    @cached_property
    def measurement(self) -> Measurement:
        return make_measurement(
            self.settings.eval_text, self.settings.eval_tokens, self.settings.trust_remote_code
        )

    def open_source(self) -> Source:
        settings = self.settings
        if settings.device == "cuda":
            _require_cuda()
        source: Source
        if settings.model_is_folder:
            source = FolderSource(Path(settings.model), with_code=settings.trust_remote_code)
        else:
            source = HubSource(
                self.hub,
                settings.model,
                settings.revision,
                with_code=settings.trust_remote_code,
                notify=self.console.info,
            )
        return source

    def inspect_target(self) -> Target | None:
        """What stands in the target; a run that will publish makes sure that it may."""
        if self.settings.save_only or self.settings.repo is None:
            return None
        target = inspect_target(self.hub, self.settings.repo)
        for variant in target.unreadable:
            self.console.warning(
                f"{variant}/ is left out of the card",
                f"Its {FILE_NAME} cannot be read by this version, or files that it names are missing.",
            )
        if self.settings.publishes:
            check_write_access(self.hub, target)
        return target

    def wanted(self, source: Source, target: Target | None) -> tuple[str, ...]:
        """The quantization types that have to be made; the others are up to date."""
        settings = self.settings
        there = local_records(settings.output_dir) if target is None else target.records
        wanted = []
        for quant_type in settings.quant_types:
            variant = SCHEMES[quant_type].variant
            record = there.get(variant)
            if (
                record is None
                or settings.force
                or not self._is_current(record, source, quant_type)
                or self._lacks_numbers(record)
            ):
                wanted.append(quant_type)
                continue
            self.console.info(f"{variant} is up to date")
            self.story.tracker.up_to_date(variant)
            url = None if target is None else self.hub.url(target.repo_id, variant)
            self.story.variants[variant] = VariantResult(record, None, None, url, up_to_date=True)
            self.story.source = record.source
        return tuple(wanted)

    def _lacks_numbers(self, record: VariantRecord) -> bool:
        """Whether numbers are demanded of a variant, and it has none, or those of another text."""
        demanded = self.settings.evaluate == "always" or self.settings.gate.covers(record.variant)
        if not demanded or self.measurement.is_that_of(record.metrics):
            return False
        self.console.info(
            f"{record.variant} is up to date, but not measured as asked for now: it is made again"
        )
        return True

    def check_conflicts(self, source: Source, target: Target | None, wanted: Sequence[str]) -> None:
        """Refuse, before the work, what could not be published after it."""
        if target is None:
            return
        for quant_type in () if self.settings.force else wanted:
            check_folder_is_ours(target, SCHEMES[quant_type].variant)
        if source.repo == target.repo_id:
            check_same_weights(source.weight_digests, target.root_files)
        changes = self._main_model_changes(source, target)
        if self.settings.tag is not None:
            # A run with nothing to do tags the head, and may find an earlier try's tag there.
            expected = None if wanted or changes else target.head
            check_tag(self.hub, target, self.settings.tag, expected)

    def show_plan(self, source: Source, wanted: Sequence[str]) -> None:
        if not wanted:
            return
        self.story.planned = {
            variant: Preview(
                plan.scheme.quant_type,
                {tensor.source.name: tensor.record() for tensor in plan.tensors},
                plan.size_bytes,
            )
            for variant, plan in self._plan(source, self._architecture(source), wanted).items()
        }

    def made_before(
        self, source: Source, target: Target | None, wanted: Sequence[str]
    ) -> dict[str, VariantRecord]:
        """Wanted variants that an earlier run has finished, and did not come to publish."""
        if target is None or self.settings.force:
            return {}
        there = local_records(self.settings.output_dir)
        for quant_type in wanted:
            record = there.get(SCHEMES[quant_type].variant)
            if record is not None and self._is_reusable(record, source, quant_type):
                self._found_made(record, source)
        return dict(self.found)

    def _is_reusable(self, record: VariantRecord, source: Source, quant_type: str) -> bool:
        """Whether a variant in the output folder is what this run would make, and measured as asked."""
        from smolquant.quantize.variant import stack_versions

        return (
            (self.settings.evaluate == "never" or self.measurement.is_that_of(record.metrics))
            and record.versions == stack_versions()
            and self._is_current(record, source, quant_type)
            and is_intact(self.settings.output_dir / record.variant, record)
        )

    def _found_made(self, record: VariantRecord, source: Source) -> None:
        variant, story = record.variant, self.story
        place = self.settings.output_dir / variant
        self.console.info(f"{variant}: {place} has what an earlier run made of this source")
        story.tracker.started(
            variant,
            options=record.options,
            device="cpu",
            repo=source.repo,
            revision=source.revision,
        )
        story.tracker.completed(record, seconds={}, peak_memory_bytes=None)
        story.variants[variant] = VariantResult(record, None, None, None, up_to_date=False)
        story.source, story.versions = record.source, dict(record.versions)
        self.found[variant] = record

    def _is_current(self, record: VariantRecord, source: Source, quant_type: str) -> bool:
        """Whether ``record`` is of this source and these options; a folder is waited for if it may be."""
        options = self.settings.options_of(quant_type)
        return (
            record.is_made_by(quant_type=quant_type, options=options)
            and record.source.identity == source.identity
        )

    def make(
        self, source: Source, target: Target | None, wanted: Sequence[str]
    ) -> dict[str, VariantRecord]:
        """Quantize and measure; each variant is complete in the output folder, or not there."""
        from smolquant.quantize.variant import stack_versions, write_record

        self.story.versions = stack_versions()
        architecture = self._architecture(source)
        plans = self._plan(source, architecture, wanted)
        windows = self._windows(source, architecture, plans)
        output_dir = self.settings.output_dir
        output_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as cleanup:
            works = {
                variant: cleanup.enter_context(self._work_folder(source, plan))
                for variant, plan in plans.items()
            }
            use = self._disk_use(source, target, self._output_bytes(plans, works))
            require_memory()
            folders = {variant: work.folder for variant, work in works.items()}
            checkpoint = cleanup.enter_context(source.checkpoint(streamed=use.stream_source))
            with self.console.group("Quantize"):
                if use.send_shards:
                    self.ahead = self._sending_ahead(target)
                records = self._quantize(source, architecture, checkpoint, plans, works)
            records = self._measured(
                source, architecture, checkpoint, records, folders=folders, windows=windows
            )
            source.require_unchanged()  # it was read for finishing and measuring, too
            self.judge()
            for variant, record in records.items():
                write_record(folders[variant], record)
                _put_in_place(folders[variant], self._place(variant))
        return records

    def _place(self, variant: str) -> Path:
        """Where a finished variant is; out of the way where its shards are on the Hub only."""
        sent = self.ahead is not None and variant not in self.found
        return self.settings.output_dir / (f".sent-{variant}" if sent else variant)

    def _output_bytes(
        self, plans: "Mapping[str, VariantPlan]", works: Mapping[str, WorkFolder]
    ) -> OutputBytes:
        to_calibrate = self._to_calibrate(plans, works)
        found = to_calibrate.size_bytes if to_calibrate else 0  # on disk until it is stored
        unfinished = sum(plan.size_bytes for plan in plans.values())
        unfinished -= sum(work.finished_bytes for work in works.values())
        shards = (max(shard.size_bytes for shard in plan.shards) for plan in plans.values())
        return OutputBytes(found + unfinished, found + sum(shards))

    def _disk_use(self, source: Source, target: Target | None, output: OutputBytes) -> DiskUse:
        """How the disk is spared, as it was asked for or has to be."""
        settings, download = self.settings, source.to_fetch()
        use = choose_disk_use(
            settings.low_disk,
            settings.output_dir,
            output,
            download,
            DiskUse(
                stream_source=source.can_stream and download.size > 0,
                # Whatever may still be refused after measuring, or is measured, stays until then.
                send_shards=target is not None and settings.evaluate == "never",
            ),
        )
        if use.send_shards:
            self.console.info("Each shard is sent and deleted as soon as it is finished")
        elif use == DiskUse() and settings.low_disk == "always":
            self.console.notice(
                "The disk is not spared",
                "The source is here already, or cannot be streamed; and variants that are measured or "
                "saved stay.",
            )
        return use

    def _sending_ahead(self, target: Target | None) -> PreuploadedShards:
        """Ready to send shards, to a repository that is created with the first if it is not there."""
        assert target is not None
        settings, hub, repo_id = self.settings, self.hub, target.repo_id
        create = partial(create_repo, hub, repo_id, private=settings.private)
        return PreuploadedShards(
            hub,
            repo_id,
            create_pr=settings.create_pr,
            create=None if target.exists else create,
        )

    @contextmanager
    def _work_folder(self, source: Source, plan: "VariantPlan") -> Iterator[WorkFolder]:
        """Where a variant is made, with what a run that was killed has finished of it."""
        from smolquant.quantize.variant import work_key

        variant = plan.scheme.variant
        _check_place(self.settings.output_dir / variant)
        options = self.settings.options_of(plan.scheme.quant_type)
        if device := self._device_that_decides(variant):
            options["device"] = device
        key = work_key(plan, source.state, options)
        root = None
        try:
            with work_folder(self.settings.output_dir, variant, key) as work:
                root = work.root
                if work.finished_bytes:
                    size = human_size(work.finished_bytes)
                    self.console.info(
                        f"{variant}: going on from {size} that an earlier run finished"
                    )
                yield work
        except BaseException:
            if root is not None and root.is_dir() and not self.ahead:
                self.console.info(f"{variant}: {root} keeps what is finished for the same command")
            raise

    def _quantize(
        self,
        source: Source,
        architecture: "Architecture",
        checkpoint: "Checkpoint",
        plans: "Mapping[str, VariantPlan]",
        works: Mapping[str, WorkFolder],
    ) -> dict[str, VariantRecord]:
        from smolquant.quantize.engine import quantize_checkpoint
        from smolquant.quantize.variant import finish_variant

        story, tracker = self.story, self.story.tracker
        size = checkpoint.layout.size_bytes
        if source.revision is not None:  # a folder's identity may take as long as the work
            story.source = SourceRecord(source.identity, size, source.repo, source.revision)
        options = {
            variant: self.settings.options_of(plan.scheme.quant_type)
            for variant, plan in plans.items()
        }
        for variant in plans:
            tracker.started(
                variant,
                options=options[variant],
                device="cpu",
                repo=source.repo,
                revision=source.revision,
            )
        started = time.monotonic()
        with (
            self._calibrated(source, architecture, checkpoint, plans, works) as calibrated,
            self.console.progress(", ".join(plans), size) as progress,
        ):

            def advance(n_bytes: int) -> None:
                progress.advance(n_bytes)
                tracker.advance(n_bytes)

            written = quantize_checkpoint(
                checkpoint,
                plans,
                {variant: work.folder for variant, work in works.items()},
                advance=advance,
                journals={variant: work.journal for variant, work in works.items()},
                calibrated=calibrated,
                send=self.ahead.send if self.ahead else None,
            )
        seconds = time.monotonic() - started
        checkpoint.verify()
        source.require_unchanged()
        self.console.info(f"{self.settings.model}: {source.identity}")
        records = {}
        for variant, plan in plans.items():
            record = records[variant] = finish_variant(
                works[variant].folder,
                plan,
                written[variant],
                source=source,
                config=architecture.config_dict,
                options=options[variant],
                source_bytes=size,
                device=self._device_that_decides(variant),
            )
            story.source = record.source
            story.variants[variant] = VariantResult(
                record, seconds, peak_bytes(), None, up_to_date=False
            )
        return records

    @contextmanager
    def _calibrated(
        self,
        source: Source,
        architecture: "Architecture",
        checkpoint: "Checkpoint",
        plans: "Mapping[str, VariantPlan]",
        works: Mapping[str, WorkFolder],
    ) -> "Iterator[Mapping[str, CalibratedWeights]]":
        """The weights of a variant as a text wants them, for as long as they are being stored."""
        plan, text = self._to_calibrate(plans, works), self.settings.calibration
        if plan is None or text is None:
            yield {}
            return
        from smolquant.quantize.calibrate import (
            Calibration,
            calibrated_weights,
            calibration_windows,
        )

        variant = plan.scheme.variant
        tokenizer = load_tokenizer(source.folder, trust_remote_code=self.settings.trust_remote_code)
        calibration = Calibration(
            architecture,
            checkpoint,
            plan,
            calibration_windows(text, tokenizer, architecture),
            device=_evaluation_device(self.settings.device),
        )
        calibration.require_memory()
        with ExitStack() as stack:
            size = calibration.work_bytes
            with self.console.progress(f"calibrating {variant}", size) as progress:
                folder = works[variant].root / "calibrated"
                found = calibrated_weights(calibration, folder, progress.advance)
                weights = stack.enter_context(found)
            yield {variant: weights}

    def _device_that_decides(self, variant: str) -> str | None:
        """Where a variant's bytes are found, if they depend on it."""
        if self.settings.calibration is None or variant != Int4WeightOnly.variant:
            return None
        return _evaluation_device(self.settings.device)

    def _to_calibrate(
        self, plans: "Mapping[str, VariantPlan]", works: Mapping[str, WorkFolder]
    ) -> "VariantPlan | None":
        """The plan whose weights have to be found from a text, unless they are stored already."""
        variant = Int4WeightOnly.variant
        if self.settings.calibration is None or variant not in plans:
            return None
        finished = works[variant].finished_bytes == plans[variant].size_bytes
        return None if finished else plans[variant]

    def _windows(
        self, source: Source, architecture: "Architecture", variants: Collection[str]
    ) -> "torch.Tensor | None":
        """What is measured on, cut before the work is done; None where nothing is measured."""
        if self.settings.evaluate != "never":
            with self._where_possible(variants):
                return self.measurement.windows(architecture, source.folder)
        return None

    @contextmanager
    def _where_possible(self, variants: Collection[str]) -> Iterator[None]:
        """Goes on without measuring ``variants`` where that cannot be done, unless it was demanded."""
        try:
            yield
        except (MachineError, CannotMeasure) as reason:
            if self.settings.evaluate == "always":
                raise
            names = ", ".join(variants)
            self.story.unmeasured = f"{names}. {reason}"
            refusal = judge(dict.fromkeys(variants), self.settings.gate, reason)
            if refusal is not None:
                raise refusal from reason
            self.console.notice(f"Not measured: {names}", str(reason))

    def _measured(
        self,
        source: Source,
        architecture: "Architecture",
        checkpoint: "Checkpoint",
        records: dict[str, VariantRecord],
        *,
        folders: Mapping[str, Path],
        windows: "torch.Tensor | None",
    ) -> dict[str, VariantRecord]:
        """The records with what was measured, as far as it was asked for and possible here."""
        story = self.story
        started = time.monotonic()
        metrics: Mapping[str, Metrics] = {}
        if windows is not None:
            with self.console.group("Evaluate"), self._where_possible(records):
                metrics = self.measurement.run(
                    windows,
                    architecture,
                    checkpoint,
                    source.folder,
                    variants=folders,
                    progress=partial(_advancing, self.console, "measuring"),
                    device=_evaluation_device(self.settings.device),
                )
        seconds = time.monotonic() - started
        for variant, record in records.items():
            records[variant] = replace(record, metrics=metrics.get(variant))
            made = replace(story.variants[variant], record=records[variant])
            story.variants[variant] = made
            story.tracker.completed(
                records[variant],
                seconds={"quantize": made.seconds or 0.0, "evaluate": seconds},
                peak_memory_bytes=made.peak_memory_bytes,
            )
        return records

    def judge(self) -> None:
        """Let nothing out that its owner does not allow, or that no rounding explains."""
        for variant, made in self.story.variants.items():
            if made.record.metrics is not None and not made.up_to_date:
                check_plausible(variant, made.record.metrics)
        release = {variant: made.record.metrics for variant, made in self.story.variants.items()}
        refusal = judge(release, self.settings.gate)
        if refusal is not None:
            raise refusal
        self.story.verdict = verdict(release, self.settings.gate)

    def save(self, source: Source, records: Mapping[str, VariantRecord]) -> None:
        for name in filter(is_code, source.auxiliary_files):
            # transformers looks for a model's own code at the root, never in a subfolder.
            shutil.copyfile(source.folder / name, self.settings.output_dir / name)
        write_local(self.settings.output_dir, self._publication(source, records))
        self.story.changed = bool(records)

    def publish(self, source: Source, target: Target, records: Mapping[str, VariantRecord]) -> None:
        if records or self._main_model_changes(source, target):
            published = publish(
                self.hub,
                target,
                self._publication(source, records),
                notify=self.console.info,
            )
            self.console.info(f"Published {published.commit_url}")
            self.story.repo_url = published.repo_url
            self.story.changed = published.commit_sha != target.head
            self.story.commit_sha = published.commit_sha
            self.story.pull_request_url = published.pull_request_url
            self.story.tracker.pushed(published.variant_urls, published.commit_sha)
            for variant, url in published.variant_urls.items():
                self.story.variants[variant] = replace(self.story.variants[variant], url=url)
                if self.ahead and variant not in self.found:
                    shutil.rmtree(self._place(variant), ignore_errors=True)
        else:
            self.console.info("Nothing to publish")
            self.story.repo_url = self.hub.url(target.repo_id)
            self.story.commit_sha = target.head
        if self.settings.tag is not None and self.story.commit_sha is not None:
            tag_commit(self.hub, target.repo_id, self.settings.tag, self.story.commit_sha)

    def _architecture(self, source: Source) -> "Architecture":
        from smolquant.model.architecture import Architecture

        return Architecture(source.folder, trust_remote_code=self.settings.trust_remote_code)

    def _plan(
        self, source: Source, architecture: "Architecture", wanted: Sequence[str]
    ) -> "dict[str, VariantPlan]":
        from smolquant.quantize.plan import make_plan

        if not source.can_stream:  # a pickle has to be here before it tells what it holds
            require_room_for(source.to_fetch())
        return make_plan(
            source.layout(),
            architecture,
            [self.settings.scheme(quant_type) for quant_type in wanted],
            group_size=self.settings.group_size,
            dtype=self.settings.dtype,
            max_shard_size=self.settings.max_shard_size,
            skip=self.settings.skip,
            embeddings=self.settings.embeddings,
        )

    def _main_model(self, source: Source) -> MainModel | None:
        """The local checkpoint that belongs at the repository's root; a Hub source never does."""
        if not isinstance(source, FolderSource):
            return None
        return MainModel(source.files, replace=self.settings.replace_main)

    def _main_model_changes(self, source: Source, target: Target) -> bool:
        main = self._main_model(source)
        return main is not None and main_model_change(main, target.root_files) != MainModelChange()

    def _publication(self, source: Source, records: Mapping[str, VariantRecord]) -> Publication:
        return Publication(
            variants={variant: self._place(variant) for variant in records},
            records=records,
            source_identity=source.identity,
            base_model=source.repo,
            source_weights=source.weight_digests,
            main_model=self._main_model(source),
            terms=source.license if source.repo != self.settings.repo else None,
            tracking_urls={variant: self.story.tracker.run_url(variant) for variant in records},
            sent=self.ahead.operations if self.ahead else {},
            private=self.settings.private,
            create_pr=self.settings.create_pr,
        )


@contextmanager
def _advancing(console: Console, label: str, size: int) -> Iterator[Callable[[int], None]]:
    """The progress of work on ``size`` bytes, as the function that is told the bytes done."""
    with console.progress(label, size) as progress:
        yield progress.advance


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "--device cuda was asked for, and torch sees no CUDA device here.",
            hint="Use --device auto or cpu, or a machine with a GPU and torch's CUDA build.",
        )


def _check_place(place: Path) -> None:
    """What lies in the variant's place must be ours to replace."""
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


def _evaluation_device(asked: str) -> str:
    import torch

    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
