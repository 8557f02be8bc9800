"""A run from top to bottom: settings -> source -> plan -> quantize -> evaluate -> publish -> report.

Nothing outside the output folder changes before the one commit at the end, but that finished shards may go
earlier to spare the disk, as blobs that no branch refers to, into a repository that is created if missing.
What becomes known of the run is noted in its report here, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from smolquant import judging
from smolquant.checkpoint.opening import open_source
from smolquant.checkpoint.source import Source
from smolquant.hub import Hub
from smolquant.machine import require_cuda, require_writable
from smolquant.publish import release
from smolquant.publish.commit import Published
from smolquant.publish.local import local_records, save, saved_records
from smolquant.publish.preupload import PreuploadedShards
from smolquant.publish.target import Target
from smolquant.record import stack_versions
from smolquant.report.console import Console
from smolquant.report.run_report import RunReport, VariantResult
from smolquant.reuse import Reuse, decide_reuse
from smolquant.settings import Settings
from smolquant.tracking.tracker import Tracker


def quantize(settings: Settings, console: Console, report: RunReport, tracker: Tracker) -> None:
    """Quantize and publish as asked, noting each fact in ``report`` as it becomes known.

    Raises:
        SmolquantError: one per exit code; the Hub is then as it was before.
    """
    hub = Hub(settings.token, settings.hub_timeout, console.info, progress=console.progress)
    if settings.device == "cuda":
        require_cuda()
    with console.group("Source"):
        source = open_source(
            hub,
            settings.model,
            is_folder=settings.model_is_folder,
            revision=settings.revision,
            with_code=settings.trust_remote_code,
            notify=console.info,
        )
        target = release.open_target(hub, settings, warn=console.warning)
        finished = local_records(settings.output_dir)
        there = target.records if target else saved_records(settings.output_dir)
        reuse = decide_reuse(there, finished, source, settings)
        for line in reuse.reasons.values():
            console.info(line)
        _note_up_to_date(reuse, target, hub, report, tracker)
        if target is not None:
            release.check(hub, target, source, settings, reuse.to_publish)
        release.announce(source, target, settings, reuse.to_publish, console)
    if settings.dry_run:
        from smolquant.quantize.planning import preview_variants

        report.planned = preview_variants(source, settings, reuse.to_make, console)
        return
    results = _reused(reuse, source, settings, report, tracker)
    # What is there already is judged, too: limits may have become tighter.
    judging.hold_against_limits(report, settings)
    judging.require_passing(report, settings, to_come=reuse.to_make)
    if results:
        source.require_unchanged()
    uploads = release.preupload(hub, target, settings) if target else None
    if reuse.to_make:
        require_writable(settings.output_dir)
        results |= _make(source, reuse.to_make, settings, uploads, console, report, tracker)
        judging.require_passing(report, settings)
    results = {
        name: replace(one, tracking_url=tracker.run_url(name))
        for name, one in results.items()
        if name not in report.refused
    }
    with console.group("Save" if settings.save_only else "Publish"):
        if target is None:
            save(settings.output_dir, source, results, settings.repo)
            report.changed = bool(results)
        else:
            _publish(hub, target, source, settings, results, uploads, console, report, tracker)
    if report.refused:
        raise judging.refusal(report, settings)


def _publish(
    hub: Hub,
    target: Target,
    source: Source,
    settings: Settings,
    results: Mapping[str, VariantResult],
    uploads: PreuploadedShards | None,
    console: Console,
    report: RunReport,
    tracker: Tracker,
) -> None:
    if results or release.changes_root(source, target, settings):
        published = release.publish_results(
            hub, target, source, settings, results, uploads, console.info
        )
        _note_published(published, target, report, tracker)
    else:
        console.info("Nothing to publish")
        report.repo_url, report.commit_sha = hub.url(target.repo_id), target.head
    for one in release.put_branches_in_step(hub, target, settings, results, console.info):
        report.branches[one.variant], report.changed = one.url, report.changed or one.changed
    if not report.refused:  # a tag says that the release is whole
        report.tag = release.tag(hub, target, settings, report.commit_sha)


def _note_up_to_date(
    reuse: Reuse, target: Target | None, hub: Hub, report: RunReport, tracker: Tracker
) -> None:
    for variant, record in reuse.up_to_date.items():
        tracker.up_to_date(variant)
        url = hub.url(target.repo_id, variant) if target else None
        report.variants[variant] = VariantResult(record, url=url, up_to_date=True)
        report.source = record.source


def _note_published(made: Published, target: Target, report: RunReport, tracker: Tracker) -> None:
    report.repo_url, report.commit_sha = made.repo_url, made.commit_sha
    report.pull_request_url = made.pull_request_url
    report.changed = made.commit_sha != target.head
    for variant, url in made.variant_urls.items():
        report.variants[variant] = replace(report.variants[variant], url=url)
    tracker.pushed(made.variant_urls, made.commit_sha)


def _reused(
    reuse: Reuse, source: Source, settings: Settings, report: RunReport, tracker: Tracker
) -> dict[str, VariantResult]:
    """The variants that an earlier run has finished; they only have to be published."""
    results = {}
    for variant, record in reuse.reusable.items():
        options, device = record.options, record.device or "cpu"
        tracker.started(variant, source.repo, source.revision, options, device)
        tracker.completed(record, seconds={}, peak_memory_bytes=None)
        results[variant] = VariantResult(record, folder=settings.output_dir / variant)
        report.source, report.versions = record.source, dict(record.versions)
    report.variants |= results
    return results


def _make(
    source: Source,
    quant_types: Sequence[str],
    settings: Settings,
    uploads: PreuploadedShards | None,
    console: Console,
    report: RunReport,
    tracker: Tracker,
) -> dict[str, VariantResult]:
    """Quantize, measure and judge; each variant is complete in its place, or not there."""
    from smolquant.quantize import making, planning

    report.versions = stack_versions()
    plans = planning.plan_variants(source, settings, quant_types, console)
    windows = None
    if settings.evaluate != "never":
        with judging.where_possible(plans.variants, settings, console, report):
            windows = settings.measurement.windows(
                plans.architecture, source.folder, console.notice
            )
    send = uploads.send if uploads else None
    with making.open_work(plans, source, settings, windows, console, send=send) as work:
        with console.group("Quantize"):
            report.source = work.known_source or report.source
            for variant, plan in plans.variants.items():
                device = making.device_of(plan, settings, measured=windows is not None)
                options = settings.options_of(plan.scheme.quant_type)
                tracker.started(variant, source.repo, source.revision, options, device)
            results = making.quantize_variants(work, console, watch=tracker.advance)
            _note(results, report)
        if windows is not None:
            with (
                console.group("Evaluate"),
                judging.where_possible(results, settings, console, report),
            ):
                results = making.measure_variants(work, results, windows, console)
            _note(results, report)
        for one in results.values():
            tracker.completed(
                one.record,
                seconds={"quantize": one.seconds or 0.0, "evaluate": one.evaluation_seconds},
                peak_memory_bytes=one.peak_memory_bytes,
            )
        source.require_unchanged()  # it was read for finishing and measuring, too
        judging.hold_against_limits(report, settings)
        results = making.keep_variants(work, results, refused=report.refused)
        _note(results, report)
        return results


def _note(results: Mapping[str, VariantResult], report: RunReport) -> None:
    report.variants |= results
    report.source = next(iter(results.values())).record.source
