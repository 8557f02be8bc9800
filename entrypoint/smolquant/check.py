"""``smolquant check`` tests whether published variants work with the libraries that are installed now.

Each variant's files are compared with its quantization.json; then the variant is loaded as a user would
load it, predicts a token, and what it predicts on a short text is compared with what it predicted when it
was made. The command changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolquant.checkpoint.download import fetch_some
from smolquant.checkpoint.files import README, file_names, is_intact, is_read_by_libraries
from smolquant.errors import CheckpointError, InputError
from smolquant.hub import Hub
from smolquant.record import (
    FILE_NAME,
    Behaviour,
    InvalidRecord,
    VariantRecord,
    stack_versions,
)
from smolquant.runtime.contents import require_place, require_variants, variants_in
from smolquant.schemes import BY_VARIANT
from smolquant.text import Markdown, code_span, escape_markdown, one_line

_AS_RECORDED = ", and predicts what was recorded"
_NOT_RECORDED = "; what it predicts was not recorded when it was made"
_OTHERWISE = (
    "; what it predicts was recorded by a later version, in a way that this one does not know"
)
_NO_MEMORY = "; what it predicts is not compared, for which this machine lacks the memory"


@dataclass(frozen=True)
class Checked:
    """The result of checking one variant."""

    variant: str
    problem: str
    """What is wrong; empty when the variant works."""
    made_with: Mapping[str, str]
    """The versions that the record names."""
    compared: str = ""
    """What became of comparing its predictions, as the end of a sentence that says that it works."""

    @property
    def verdict(self) -> str:
        """What is wrong, or how far it works."""
        return self.problem or f"works{self.compared}"


def summary(name: str, results: Sequence[Checked]) -> str:
    """The job summary of a check, in markdown.

    Args:
        name: the repository or folder that was checked.
    """
    lines = [
        f"## smolquant check {code_span(name)}",
        "",
        "| variant | | verdict | made with |",
        "| :-- | :-- | :-- | :-- |",
        *(
            f"| {code_span(one.variant)} | {'❌' if one.problem else '✅'} "
            f"| {escape_markdown(one_line(one.verdict))} | {escape_markdown(told(one.made_with))} |"
            for one in results
        ),
        "",
        f"Checked with {escape_markdown(told(stack_versions()))}.",
        "",
    ]
    return Markdown("\n".join(lines))


def told(versions: Mapping[str, str]) -> str:
    """Versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def check(
    repo_or_folder: str,
    hub: Hub,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Iterator[Checked]:
    """Check every variant of a Hub repository or a folder with the same layout, one after the other.

    Args:
        trust_remote_code: run the code that the repository brings along for its model.

    Raises:
        InputError: there is no variant, or one needs code of its own that is not trusted.
        HubError: the repository cannot be read.
    """
    require_place(repo_or_folder)
    folder = Path(repo_or_folder)
    if not folder.is_dir():
        folder = fetch_some(
            hub,
            repo_or_folder,
            revision,
            lambda path: _is_of_a_variant(path, with_code=trust_remote_code),
            doing="downloading the variants",
        )
    variants = variants_in(folder)
    require_variants(repo_or_folder, variants)
    for variant in variants:
        made_with: Mapping[str, str] = {}
        try:
            record = VariantRecord.in_folder(variant, (folder / variant / FILE_NAME).read_bytes())
            made_with = record.versions
            _check_files(folder / variant, record)
            compared = _check_loads(folder, record, trust_remote_code)
        except (InvalidRecord, CheckpointError) as problem:
            yield Checked(variant, str(problem), made_with)
        else:
            yield Checked(variant, "", made_with, compared)


def _is_of_a_variant(path: str, *, with_code: bool) -> bool:
    """Whether a file is one of a variant's or, if it may run, code at the root, where a model's own is."""
    return path.partition("/")[0] in BY_VARIANT or (with_code and path.endswith(".py"))


def _check_files(folder: Path, record: VariantRecord) -> None:
    for name, expected in record.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise CheckpointError(f"{name} is missing.")
        if not is_intact(path, expected):
            raise CheckpointError(
                f"{name} is not the file that was made: its size or sha256 differs."
            )
    added = set(file_names(folder, "**/*")) - record.files.keys() - {README, FILE_NAME}
    if read := sorted(filter(is_read_by_libraries, added)):
        raise CheckpointError(
            f"{read[0]} was put there later, and libraries that load the variant read it."
        )


def _check_loads(folder: Path, record: VariantRecord, trust_remote_code: bool) -> str:
    """Load the variant, look at the logits of one prompt, and at whether it predicts what was recorded.

    A machine without its kernels says nothing of the variant: there it is computed with plain weights.
    Nor does code that may not run.

    Returns:
        :attr:`Checked.compared`.
    """
    import torch

    from smolquant.runtime.load import NeedsOwnCode, load_for_checking

    variant, problems, predicted = record.variant, list[str](), _Predicted(record.behaviour)
    try:
        model, tokenizer = load_for_checking(
            folder,
            variant,
            report=lambda info: problems.extend(_misfits(info, record)),
            examine=predicted.examine,
            trust_remote_code=trust_remote_code,
        )
        prompt = tokenizer(text="The", return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(**prompt).logits
        problems.extend(predicted.differences(tokenizer))
    except NeedsOwnCode as error:
        raise InputError(
            f"{variant} is not checked: it needs code of its own, which its repository brings along, and "
            "running that is off.",
            hint="Read the code; if you trust it, add --trust-remote-code.",
        ) from error
    except Exception as error:  # whatever the installed libraries raise is the answer
        if problems:
            raise CheckpointError(problems[0]) from error
        raise CheckpointError(f"It does not run: {type(error).__name__}: {error}") from error
    if not bool(torch.isfinite(logits).all()):
        problems.append("Its logits are not finite.")
    if problems:
        raise CheckpointError(problems[0])
    return predicted.compared


class _Predicted:
    """What a variant is recorded to predict, beside what it predicts now."""

    def __init__(self, recorded: Behaviour | None) -> None:
        from smolquant.evaluate.behaviour import is_comparable

        self._recorded = recorded
        self._now: Behaviour | None = None
        self.compared = _NOT_RECORDED if recorded is None else _AS_RECORDED
        if recorded is not None and not is_comparable(recorded):
            self.compared = _OTHERWISE

    def examine(self, model: Any) -> None:
        """Compute it, with a model whose weights are as they are stored."""
        from smolquant.evaluate.behaviour import fits, predict

        if self.compared != _AS_RECORDED or self._recorded is None:
            return
        if not fits(model):
            self.compared = _NO_MEMORY
            return
        self._now = predict(model, self._recorded.text, self._recorded.token_ids)

    def differences(self, tokenizer: Any) -> Iterator[str]:
        """What is not as it was recorded, a sentence each."""
        from smolquant.evaluate.behaviour import differences

        if self._recorded is not None and self._now is not None:
            yield from differences(self._recorded, self._now, tokenizer)


def _misfits(info: Mapping[str, Any], record: VariantRecord) -> Iterator[str]:
    """What transformers has filled with random numbers, or had no place for.

    Args:
        info: transformers' own, of missing and unexpected tensors.
        record: names those tensors that a variant carries along for other libraries.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        yield (
            f"It lacks {len(missing)} of the model's weights, {missing[0]!r} among them, and the installed "
            "libraries fill them with random numbers."
        )
    unexpected = sorted(set(info["unexpected_keys"]) - record.tensors.keys())
    if unexpected:
        yield (
            f"It holds {len(unexpected)} tensors that the installed libraries have no place for, "
            f"{unexpected[0]!r} among them."
        )
