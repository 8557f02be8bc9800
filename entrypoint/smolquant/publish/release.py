"""Releasing what a run has made: what stands in the target, whether it may be published, and publishing it.

It knows what was asked for and what a checkpoint is, and nothing of how variants are made or measured.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from smolquant.checkpoint.files import LARGEST_EXTRA, README, refuse_secrets
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.source import Source
from smolquant.hub import Hub
from smolquant.publish.branches import InStep, put_in_step
from smolquant.publish.cards import same_owner_text
from smolquant.publish.commit import Published, create_repo, publish, tag_commit
from smolquant.publish.front_matter import own_readme, readme_text
from smolquant.publish.local import check_place
from smolquant.publish.main_model import (
    MainModel,
    MainModelChange,
    check_same_weights,
    main_model_change,
)
from smolquant.publish.operations import Publication, changes_card
from smolquant.publish.preupload import PreuploadedShards
from smolquant.publish.target import (
    Target,
    check_branches,
    check_folder_is_ours,
    check_readme,
    check_tag,
    check_write_access,
    inspect_target,
    read_cards,
)
from smolquant.record import FILE_NAME
from smolquant.report import overview
from smolquant.report.console import Console
from smolquant.report.run_report import VariantResult
from smolquant.schemes import BY_VARIANT, in_order
from smolquant.settings import Settings
from smolquant.text import human_size


def open_target(hub: Hub, settings: Settings, *, warn: Callable[[str, str], None]) -> Target | None:
    """What stands in the target repository; None where the run does not look at one.

    A run that will publish makes sure that it may.

    Args:
        warn: is told the title and the text of what is wrong with a variant that is there.

    Raises:
        HubError: the repository cannot be read, or the token may not write to it.
        InputError: its README.md cannot be edited.
    """
    if settings.save_only or settings.repo is None:
        return None
    target = inspect_target(hub, settings.repo)
    for variant in target.unreadable:
        warn(
            f"{variant}/ is left out of the card",
            f"This version cannot read its {FILE_NAME}, or files that it names are missing.",
        )
    if settings.publishes:
        check_write_access(hub, target, create_pr=settings.create_pr)
        check_readme(hub, target.readme, f"{target.repo_id}'s {README}")
    return target


def check(
    hub: Hub, target: Target, source: Source, settings: Settings, variants: Sequence[str]
) -> None:
    """Refuse, before the work, what could not be published after it.

    Args:
        variants: those that the run will publish.

    Raises:
        InputError: a subfolder or a branch holds something else, the tag names another commit, the main
            model at the root is not the source's, or the folder's card is one that the Hub refuses.
    """
    if target.readme is None:
        card = own_readme(source, needed=True)
        check_readme(hub, card, f"{source.folder / README}")
    for variant in () if settings.force else variants:
        check_folder_is_ours(target, variant)
    if source.repo == target.repo_id:
        check_same_weights(source.weight_digests, target.root_files)
    if settings.branches:
        check_branches(hub, target, _with_branches({*target.records, *variants}))
    changes = changes_root(source, target, settings)
    if settings.tag is not None:
        # A run with nothing to do tags the head, and may find an earlier try's tag there.
        expected = None if variants or changes else target.head
        check_tag(hub, target, settings.tag, expected)


def announce(
    source: Source,
    target: Target | None,
    settings: Settings,
    variants: Sequence[str],
    console: Console,
) -> None:
    """Tell, before the work, which files of a checkpoint folder travel beside the model, and which stay.

    None travels that holds a token of this run's, and none replaces a file that somebody else has saved.

    Args:
        target: as it passed :func:`check`; None where nothing is published.
        variants: those that the run will make or publish.

    Raises:
        InputError: the README.md that is to be the root card, the folder's or one that an earlier run has
            saved, cannot be edited; a file holds a token; or something lies where a file will be saved.
    """
    refuse_secrets({name: source.folder / name for name in _travelling(source)})
    if settings.save_only:
        check_place(settings.output_dir, source)
    there = settings.output_dir / README
    if target is None and there.is_file():
        readme_text(there.read_bytes(), settings.output_dir.as_posix())
    if target is not None and target.has_another_picture and variants:
        console.notice(
            "The card will have no picture",
            f"{overview.FILE_NAME} in {target.repo_id} is not of smolquant's making, and stays.",
        )
    _announce_branches(target, settings, variants, console)
    if not isinstance(source, FolderSource):
        return
    extras = source.extras
    if extras.refused:
        console.notice(
            f"Not taken along: {_some(extras.refused)}",
            f"It is a link out of the checkpoint folder, or larger than {human_size(LARGEST_EXTRA)}. If "
            "it belongs to the model, replace the link by the file, or add a large file yourself.",
        )
    readme = own_readme(source, needed=target.readme is None if target else not there.is_file())
    if target is None:
        return
    pushes = changes_main_model(source, target, settings)
    if pushes and extras.names:
        console.info(f"Goes along with the main model: {_some(extras.names)}")
    if pushes and extras.left_behind:
        console.info(f"Stays in the checkpoint folder: {_some(extras.left_behind)}")
    differs = readme and target.readme is not None and not same_owner_text(readme, target.readme)
    if differs and (variants or pushes):
        console.notice(
            "The repository's README.md stays",
            f"The one in {settings.model} differs from it and is not published. To have it as the card, "
            f"delete README.md in {target.repo_id} first.",
        )


def _announce_branches(
    target: Target | None, settings: Settings, variants: Sequence[str], console: Console
) -> None:
    if target is None or settings.branches:
        return
    behind = [name for name in variants if name in target.own_branches]
    if behind:
        console.notice(
            f"The branches stay as they are: {', '.join(behind)}",
            "They hold these variants as they were, until a run with --branches puts them in step.",
        )


def changes_main_model(source: Source, target: Target, settings: Settings) -> bool:
    """Whether the source has to become the main model at the root of ``target``.

    Raises:
        InputError: another main model stands there, and --replace-main was not given.
    """
    main = _main_model(source, target, settings)
    return main is not None and main_model_change(main, target.root_files) != MainModelChange()


def changes_root(source: Source, target: Target, settings: Settings) -> bool:
    """Whether the root changes though no variant does: the main model, or what the card says of branches.

    Raises:
        InputError: another main model stands there, and --replace-main was not given.
    """
    if changes_main_model(source, target, settings):
        return True
    if not _new_branches(target, settings):
        return False
    return changes_card(target, _publication(source, target, settings, {}))


def preupload(hub: Hub, target: Target, settings: Settings) -> PreuploadedShards:
    """What can upload finished shards; the repository is created with the first, if it is missing."""
    create = partial(create_repo, hub, target.repo_id, private=settings.private)
    return PreuploadedShards(
        hub,
        target.repo_id,
        create_pr=settings.create_pr,
        create=None if target.exists else create,
    )


def publish_results(
    hub: Hub,
    target: Target,
    source: Source,
    settings: Settings,
    results: Mapping[str, VariantResult],
    uploads: PreuploadedShards | None,
    notify: Callable[[str], None],
) -> Published:
    """Publish variants and, where the rule asks for it, the main model, in one commit.

    Args:
        results: the variants to publish, by name, each with the folder in which it lies. A folder of
            which only the shards that were uploaded before are missing is removed afterwards.
        uploads: the shards that the Hub has already.

    Raises:
        HubError: the Hub refused or cannot be reached, or others kept pushing.
        InputError: what others have pushed meanwhile conflicts.
    """
    folders = {name: one.folder for name, one in results.items() if one.folder is not None}
    renewed = [name for name in _new_branches(target, settings) if name not in results]
    publication = replace(
        _publication(source, target, settings, results),
        preuploaded=uploads.operations if uploads else {},
        cards=read_cards(hub, target, renewed),
    )
    published = publish(hub, target, publication, notify=notify)
    notify(f"Published {published.commit_url}")
    for name, folder in folders.items():
        if folder != settings.output_dir / name:
            shutil.rmtree(folder, ignore_errors=True)
    return published


def put_branches_in_step(
    hub: Hub,
    target: Target,
    settings: Settings,
    results: Mapping[str, VariantResult],
    notify: Callable[[str], None],
) -> Iterator[InStep]:
    """Give every published variant its branch, as main has it now, if branches were asked for.

    Raises:
        HubError: the Hub refused or cannot be reached. It tells what is published and what is not.
    """
    if settings.branches:
        made = {name: one.record for name, one in results.items()}
        yield from put_in_step(hub, target.repo_id, dict(target.records) | made, notify)


def tag(hub: Hub, target: Target, settings: Settings, commit: str | None) -> str | None:
    """Tag ``commit`` if a tag was asked for.

    Returns:
        The tag that it has now; None where none was asked for.

    Raises:
        HubError: another commit was given the tag meanwhile, or the Hub refused.
    """
    if settings.tag is None or commit is None:
        return None
    tag_commit(hub, target.repo_id, settings.tag, commit)
    return settings.tag


def _travelling(source: Source) -> set[str]:
    """The files of a source, here already, that may be published or saved."""
    names = {*source.auxiliary_files, *source.license_files}
    if isinstance(source, FolderSource):
        names |= {*source.files, *source.extras.names}
    return names if source.readme is None else {*names, README}


def _with_branches(variants: Iterable[str]) -> list[str]:
    """Those of ``variants`` that get a branch: no folder of another name makes one, such as ``main``."""
    return [name for name in in_order(variants) if name in BY_VARIANT]


def _new_branches(target: Target, settings: Settings) -> list[str]:
    """The variants in the target that get their branch by this run."""
    if not settings.branches:
        return []
    there = target.own_branches
    return [name for name in _with_branches(target.records) if name not in there]


def _publication(
    source: Source, target: Target, settings: Settings, results: Mapping[str, VariantResult]
) -> Publication:
    return Publication(
        variants={name: one.folder for name, one in results.items() if one.folder is not None},
        records={name: one.record for name, one in results.items()},
        source_identity=source.identity,
        base_model=source.repo,
        source_weights=source.weight_digests,
        main_model=_main_model(source, target, settings),
        license_entries=source.license if source.repo != settings.repo else None,
        tracking_urls={name: one.tracking_url for name, one in results.items()},
        private=settings.private,
        create_pr=settings.create_pr,
        branches=settings.branches,
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    """``a, b, c``; only the first few where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _main_model(source: Source, target: Target, settings: Settings) -> MainModel | None:
    """The local checkpoint that belongs at the repository's root; a Hub source never does."""
    if not isinstance(source, FolderSource):
        return None
    return MainModel(
        source.files,
        replace=settings.replace_main,
        extras={name: source.folder / name for name in source.extras.names},
        readme=own_readme(source, needed=target.readme is None),
    )
