"""The story of a run: settings -> source -> plan -> quantize -> publish -> report.

Each room knows what it is handed. Nothing outside the output folder changes before the one commit at
the end; what is told of the run is collected in a :class:`Story` as it becomes known.
"""

import resource
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.checkpoint.source import FolderSource, HubSource, Source
from smolquant.errors import InputError, MachineError
from smolquant.hub import Hub
from smolquant.publish.commit import (
    Publication,
    local_records,
    publish,
    tag_commit,
    write_local,
)
from smolquant.publish.main_model import MainModel, MainModelChange, main_model_change
from smolquant.publish.target import Target, check_tag, check_write_access, inspect_target
from smolquant.record import FILE_NAME, SourceRecord, TensorRecord, VariantRecord
from smolquant.report.console import Console
from smolquant.report.result import VariantResult
from smolquant.schemes import SCHEMES
from smolquant.settings import Settings
from smolquant.story import Story
from smolquant.text import human_size

if TYPE_CHECKING:
    from smolquant.architecture import Architecture
    from smolquant.plan import VariantPlan


def quantize(settings: Settings, console: Console, story: Story) -> None:
    """Quantize and publish as asked, telling ``story`` each fact as it becomes known.

    Raises:
        SmolquantError: one per exit code; the Hub is then as it was before.
    """
    hub = Hub(settings.token)
    with console.group("Source"):
        source = _open_source(settings, hub, console)
        target = _inspect_target(settings, hub)
        console.info(f"{settings.model}: {source.identity}")
    wanted = _wanted(settings, source, target, story)
    if target is not None:
        _check_conflicts(settings, hub, source, target, work=bool(wanted))
    if settings.dry_run:
        _dry_run(settings, source, wanted, console, story)
        return
    records: dict[str, VariantRecord] = {}
    if wanted:
        with console.group("Quantize"):
            records = _quantize(settings, source, wanted, console, story)
    else:
        console.info("Every variant is up to date; nothing to make.")
    with console.group("Save" if settings.save_only else "Publish"):
        if target is None:
            write_local(settings.output_dir, _publication(settings, source, records))
            story.changed = bool(records)
        else:
            _publish(settings, hub, source, target, records, console, story)


def _open_source(settings: Settings, hub: Hub, console: Console) -> Source:
    if settings.device == "cuda":
        _require_cuda()
    if settings.model_is_folder:
        return FolderSource(Path(settings.model), with_code=settings.trust_remote_code)
    return HubSource(
        hub,
        settings.model,
        settings.revision,
        with_code=settings.trust_remote_code,
        notify=console.info,
    )


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "--device cuda was asked for, and torch sees no CUDA device here.",
            hint="Use --device auto or cpu, or a machine with a GPU and torch's CUDA build.",
        )


def _inspect_target(settings: Settings, hub: Hub) -> Target | None:
    """What stands in the target, after every check that can be made before the work."""
    if settings.save_only or settings.repo is None:
        return None
    target = inspect_target(hub, settings.repo)
    if settings.publishes:
        check_write_access(hub, target)
    return target


def _wanted(
    settings: Settings, source: Source, target: Target | None, story: Story
) -> tuple[str, ...]:
    """The quantization types that have to be made; what is up to date is told to ``story``."""
    published = local_records(settings.output_dir) if target is None else target.records
    wanted = []
    for quant_type in settings.quant_types:
        variant = SCHEMES[quant_type].variant
        record = published.get(variant)
        current = record is not None and record.is_current(
            identity=source.identity,
            quant_type=quant_type,
            options=settings.options_of(quant_type),
        )
        if record is not None and current and not settings.force:
            story.variants[variant] = VariantResult(record, None, None, None, up_to_date=True)
            story.source = story.source or record.source
        else:
            wanted.append(quant_type)
    return tuple(wanted)


def _main_model(settings: Settings, source: Source) -> MainModel | None:
    """The local checkpoint that belongs at the repository's root; a Hub source never does."""
    if not isinstance(source, FolderSource):
        return None
    return MainModel(source.files, replace=settings.replace_main)


def _check_conflicts(
    settings: Settings, hub: Hub, source: Source, target: Target, *, work: bool
) -> None:
    """Refuse, before the work, what could not be published after it: other weights, a taken tag."""
    main_changes = _main_model_changes(settings, source, target)
    if settings.tag is not None:
        # A run with nothing to do tags the head, and finds a tag of an earlier try there.
        check_tag(hub, target, settings.tag, None if work or main_changes else target.head)


def _main_model_changes(settings: Settings, source: Source, target: Target) -> bool:
    main = _main_model(settings, source)
    return main is not None and main_model_change(main, target.root_files) != MainModelChange()


@dataclass(frozen=True)
class Preview:
    """A planned variant as a dry run shows it."""

    quant_type: str
    tensors: Mapping[str, TensorRecord]
    predicted_bytes: int


def _dry_run(
    settings: Settings, source: Source, wanted: Iterable[str], console: Console, story: Story
) -> None:
    for variant in story.variants:
        console.info(f"{variant} is up to date and would not be made again")
    if not wanted:
        return
    from smolquant.architecture import Architecture

    architecture = Architecture(source.folder, trust_remote_code=settings.trust_remote_code)
    plans = _plan(settings, source, architecture, wanted)
    story.planned = {
        variant: Preview(
            plan.scheme.quant_type,
            {tensor.source.name: tensor.record() for tensor in plan.tensors},
            plan.size_bytes,
        )
        for variant, plan in plans.items()
    }


def _plan(
    settings: Settings, source: Source, architecture: "Architecture", wanted: Iterable[str]
) -> "dict[str, VariantPlan]":
    from smolquant.plan import make_plan

    return make_plan(
        source.layout(),
        architecture,
        tuple(wanted),
        group_size=settings.group_size,
        dtype=settings.dtype,
        max_shard_size=settings.max_shard_size,
        skip=settings.skip,
    )


def _quantize(
    settings: Settings, source: Source, wanted: Iterable[str], console: Console, story: Story
) -> dict[str, VariantRecord]:
    """Make the wanted variants in the output folder, complete or not at all."""
    from smolquant.architecture import Architecture
    from smolquant.checkpoint.reader import Checkpoint
    from smolquant.quantize import quantize_checkpoint
    from smolquant.variant import finish_variant, stack_versions, write_record

    story.versions = stack_versions()
    architecture = Architecture(source.folder, trust_remote_code=settings.trust_remote_code)
    plans = _plan(settings, source, architecture, wanted)
    _check_disk(settings.output_dir, plans)
    folders = {variant: _unfinished(settings.output_dir, variant) for variant in plans}
    records = {}
    try:
        started = time.monotonic()
        with (
            Checkpoint(source.fetch_weights()) as checkpoint,
            console.progress(", ".join(plans), checkpoint.layout.size_bytes) as progress,
        ):
            story.source = SourceRecord(
                source.identity, checkpoint.layout.size_bytes, source.repo, source.revision
            )
            written = quantize_checkpoint(checkpoint, plans, folders, advance=progress.advance)
        seconds = time.monotonic() - started
        for variant, plan in plans.items():
            records[variant] = finish_variant(
                folders[variant],
                plan,
                written[variant],
                source=source,
                config=architecture.config_dict,
                options=settings.options_of(plan.scheme.quant_type),
            )
            write_record(folders[variant], records[variant])
            story.variants[variant] = VariantResult(
                records[variant], seconds, _peak_memory_bytes(), None, up_to_date=False
            )
        for variant, folder in folders.items():
            _put_in_place(folder, settings.output_dir / variant)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    return records


def _check_disk(output_dir: Path, plans: "Mapping[str, VariantPlan]") -> None:
    needed = sum(plan.size_bytes for plan in plans.values())
    output_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise MachineError(
            f"The variants take {human_size(needed)}, and {output_dir} has {human_size(free)} free.",
            hint="Choose another --output-dir, fewer quantization types, or a machine with more disk.",
        )


def _unfinished(output_dir: Path, variant: str) -> Path:
    """An empty folder to work in; what lies in the variant's place must be ours to replace."""
    place = output_dir / variant
    if place.exists() and not (place / FILE_NAME).is_file() and any(place.iterdir()):
        raise InputError(
            f"{place} exists and holds something other than a variant.",
            hint="Move it away, or choose another --output-dir.",
        )
    folder = output_dir / f".{variant}.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _put_in_place(folder: Path, place: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
    folder.rename(place)


def _peak_memory_bytes() -> int:
    """Of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _publication(
    settings: Settings, source: Source, records: Mapping[str, VariantRecord]
) -> Publication:
    return Publication(
        variants={variant: settings.output_dir / variant for variant in records},
        records=records,
        source_identity=source.identity,
        base_model=source.repo,
        main_model=_main_model(settings, source),
        terms=source.terms if source.repo != settings.repo else None,
        private=settings.private,
        create_pr=settings.create_pr,
    )


def _publish(
    settings: Settings,
    hub: Hub,
    source: Source,
    target: Target,
    records: Mapping[str, VariantRecord],
    console: Console,
    story: Story,
) -> None:
    story.repo_url = hub.url(target.repo_id)
    for variant, result in story.variants.items():
        if result.up_to_date:
            story.variants[variant] = replace(result, url=hub.url(target.repo_id, variant))
    if not records and not _main_model_changes(settings, source, target):
        story.commit_sha = target.head
        if settings.tag is not None and target.head is not None:
            tag_commit(hub, target.repo_id, settings.tag, target.head)
        return
    publication = _publication(settings, source, records)
    published = publish(hub, target, publication, notify=console.info)
    story.changed = published.commit_sha != target.head
    story.commit_sha = published.commit_sha
    story.pull_request_url = published.pull_request_url
    for variant, url in published.variant_urls.items():
        story.variants[variant] = replace(story.variants[variant], url=url)
    if settings.tag is not None:
        tag_commit(hub, target.repo_id, settings.tag, published.commit_sha)
    console.info(f"Published {published.commit_url}")
