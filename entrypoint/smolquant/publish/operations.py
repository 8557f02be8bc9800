"""What the one commit does: a function of the repository as it is and of what is to be published."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant import record
from smolquant.checkpoint.files import README, refuse_secrets
from smolquant.publish.cards import card_again, root_card, variant_card, without_our_part
from smolquant.publish.front_matter import declared_license
from smolquant.publish.main_model import (
    MainModel,
    MainModelChange,
    check_same_weights,
    main_model_change,
    main_weights,
)
from smolquant.publish.section import identity_told
from smolquant.publish.target import Target
from smolquant.record import VariantRecord
from smolquant.report import overview
from smolquant.schemes import BY_VARIANT

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    CommitOperation = CommitOperationAdd | CommitOperationDelete

COMMIT_TITLE = "Publish quantized variants"


@dataclass(frozen=True)
class Publication:
    """What one commit puts into the repository, and takes out of it."""

    variants: Mapping[str, Path]
    """Variant -> the folder with its finished files, quantization.json among them."""
    records: Mapping[str, VariantRecord]
    """The records of the same variants."""
    source_identity: str | None
    """The identity of the checkpoint that this run worked on; variants of another are marked. None where
    there is none: the marks then stay as they are."""
    base_model: str | None = None
    """Hub id of that checkpoint; None for a folder, which is the main model where there is one."""
    source_weights: Mapping[str, str] = field(default_factory=dict)
    """Name -> sha256 of its weights; held against the root's where that is the source itself."""
    main_model: MainModel | None = None
    """The local checkpoint; None for a Hub repository, whose weights are never pushed into another."""
    license_entries: Mapping[str, str] | None = None
    """What the source's card says of its license; None: what the target's own card says, or else the README
    of the main model's folder."""
    tracking_urls: Mapping[str, str | None] = field(default_factory=dict)
    """Variant -> the page of its run in Trackio."""
    preuploaded: "Mapping[str, CommitOperationAdd]" = field(default_factory=dict)
    """Path in the repository -> a file of it that has been uploaded already, and may be gone here."""
    private: bool = False
    """Whether the repository is private if this run creates it."""
    create_pr: bool = False
    branches: bool = False
    """Whether every variant will have a branch of its own, as their cards then say."""
    cards: Mapping[str, str] = field(default_factory=dict)
    """Variant -> its card as it is published, for one that stays and gets its branch now."""
    withdrawn: Collection[str] = ()
    """The variants to take out again."""

    @property
    def title(self) -> str:
        """The title of the commit or pull request."""
        if self.withdrawn:
            return f"Remove the quantized variant {', '.join(self.withdrawn)}"
        return COMMIT_TITLE


def operations(target: Target, publication: Publication) -> "list[CommitOperation]":
    """All that the commit does, for the repository as it is in ``target``.

    Raises:
        InputError: other main weights stand there, or a file holds a secret.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if publication.base_model == target.repo_id:
        check_same_weights(publication.source_weights, target.root_files)
    change = MainModelChange()
    if publication.main_model is not None:
        change = main_model_change(publication.main_model, target.root_files)
    contents: dict[str, bytes | Path] = dict(change.add)
    root = _Root(target, publication, change)
    contents |= root.contents()
    stale = [*change.delete, *root.stale()]
    for name in publication.variants:
        files = _variant_files(name, target, publication, root)
        contents |= {f"{name}/{file}": content for file, content in files.items()}
        gone = set(target.folders.get(name, ())) - set(files)
        stale += [f"{name}/{file}" for file in sorted(gone)]
    for name, card in publication.cards.items():
        if name in target.records:
            again = card_again(card, target.records[name], location=target.repo_id, has_branch=True)
            contents[f"{name}/{README}"] = again.encode()
    for name in publication.withdrawn:
        stale += [f"{name}/{file}" for file in target.folders.get(name, ())]
    refuse_secrets({path: contents[path] for path in contents.keys() - publication.preuploaded})
    return [
        *(
            publication.preuploaded.get(path) or CommitOperationAdd(path, content)
            for path, content in contents.items()
        ),
        *(CommitOperationDelete(path, is_folder=False) for path in stale),
    ]


def changes_card(target: Target, publication: Publication) -> bool:
    """Whether the root card would be another after the commit."""
    return (
        _Root(target, publication, MainModelChange()).contents()[README]
        != (target.readme or "").encode()
    )


@dataclass(frozen=True)
class _Root:
    """The root of the repository as the commit leaves it."""

    target: Target
    publication: Publication
    change: MainModelChange

    @property
    def has_main_model(self) -> bool:
        return bool(main_weights([*self.target.root_files, *self.change.add]))

    @property
    def own_readme(self) -> str | None:
        """The README of the main model's folder."""
        return self.publication.main_model.readme if self.publication.main_model else None

    @cached_property
    def records(self) -> dict[str, VariantRecord]:
        """Every variant that the repository then has."""
        all_of_them = dict(self.target.records) | dict(self.publication.records)
        return {n: one for n, one in all_of_them.items() if n not in self.publication.withdrawn}

    @property
    def identity(self) -> str | None:
        """The identity of the main model, or of what the variants were made from last."""
        if self.publication.source_identity is not None:
            return self.publication.source_identity
        return identity_told(self.target.readme or "", self.records)

    @cached_property
    def picture(self) -> str | None:
        """The picture of all variants; None without any, or where somebody else's file has its place."""
        own = self.change.add.get(overview.FILE_NAME)
        if self.target.has_another_picture or not (
            own is None or overview.is_ours(own.read_bytes())
        ):
            return None
        return overview.overview(self.records, self.identity)

    def branches(self) -> set[str]:
        """The variants that then have a branch of their own."""
        there = self.target.own_branches
        return {
            n for n in self.records if n in BY_VARIANT and (self.publication.branches or n in there)
        }

    def contents(self) -> dict[str, bytes]:
        """The root card and its picture."""
        readme = self.own_readme if self.target.readme is None else self.target.readme
        if self.publication.withdrawn and not self.records:
            card = without_our_part(readme or "", has_main_model=self.has_main_model)
            return {README: card.encode()} if readme is not None else {}
        picture = self.picture
        card = root_card(
            readme,
            self.records,
            location=self.target.repo_id,
            has_main_model=self.has_main_model,
            source_identity=self.identity,
            has_picture=picture is not None,
            branches=self.branches(),
        )
        drawn = {} if picture is None else {overview.FILE_NAME: picture.encode()}
        return {**drawn, README: card.encode()}

    def stale(self) -> list[str]:
        """Our picture, where nothing is left to draw."""
        name = overview.FILE_NAME
        ours = name in self.target.root_files and not self.target.has_another_picture
        return [name] if ours and self.picture is None and name not in self.change.add else []


def _variant_files(
    name: str, target: Target, publication: Publication, root: _Root
) -> dict[str, bytes | Path]:
    """A variant's files by their names in its folder, its card among them."""
    made, folder = publication.records[name], publication.variants[name]
    license_entries = publication.license_entries
    if license_entries is None:
        license_entries = declared_license(target.readme) or declared_license(root.own_readme)
    card = variant_card(
        made,
        location=target.repo_id,
        base_model=publication.base_model or (target.repo_id if root.has_main_model else None),
        terms=license_entries,
        tracking_url=publication.tracking_urls.get(name),
        has_branch=name in root.branches(),
    )
    files: dict[str, bytes | Path] = {
        file: folder / file for file in (*made.files, record.FILE_NAME)
    }
    return files | {README: card.encode()}
