"""What was asked for: one frozen, validated value. It knows neither argv nor torch nor the Hub."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from smolquant.errors import InputError
from smolquant.evaluate.gate import Gate, parse_limits
from smolquant.evaluate.text import EvalText, bundled_calibration_text, read_text
from smolquant.schemes import (
    BOTH,
    BY_VARIANT,
    DEFAULT_INT4_METHOD,
    SCHEMES,
    Int4Method,
    Scheme,
    scheme_of,
)
from smolquant.schemes.base import GROUP_SIZES
from smolquant.tracking.destination import Destination, make_destination

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16"]
Evaluate = Literal["auto", "always", "never"]
Embeddings = Literal["source", "int8"]
LowDisk = Literal["auto", "always", "never"]

DEFAULT_QUANT_TYPE = "int8_weight_only"
DEFAULT_GROUP_SIZE = 128
DEFAULT_SHARD_SIZE = "1GB"
DEFAULT_OUTPUT_DIR = "./quantized"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TAG = re.compile(
    r"(?!.*(\.\.|//|@\{|\.lock$))[^\s~^:?*\[\\\x00-\x1f\x7f/.][^\s~^:?*\[\\\x00-\x1f\x7f]*"
)


@dataclass(frozen=True)
class Settings:
    """One run. Build it with :func:`make_settings`, which refuses what makes no sense."""

    model: str
    """Checkpoint folder or Hub id, as given."""
    model_is_folder: bool
    repo: str | None
    """Hub repo to publish into; None with ``save_only`` from a folder."""
    quant_types: tuple[str, ...]
    device: Device
    group_size: int
    int4_method: Int4Method
    embeddings: Embeddings
    calibration_text: Path | None
    """None: the bundled one."""
    token: str | None = field(repr=False)
    """None leaves the choice to the Hub client: HF_TOKEN, a login, or keyless OIDC."""
    private: bool
    revision: str | None
    tag: str | None
    replace_main: bool
    dtype: Dtype
    max_shard_size: int
    """Bytes."""
    create_pr: bool
    save_only: bool
    output_dir: Path
    low_disk: LowDisk
    trackio: Destination | None
    """Where the run is recorded; None keeps a local project in the output folder."""
    experiment_name: str | None
    evaluate: Evaluate
    eval_text: Path | None
    """None: the bundled one."""
    eval_tokens: int | None
    """None: by the model's size."""
    gate: Gate
    """How much worse a published variant may be."""
    cuda_image: str | None
    """The image that a GPU sibling runs; None: the one of this version."""
    skip: tuple[str, ...]
    """Regular expressions, searched for in module names."""
    trust_remote_code: bool
    force: bool
    dry_run: bool

    @property
    def publishes(self) -> bool:
        """Whether this run may change the Hub."""
        return not (self.save_only or self.dry_run)

    def scheme(self, quant_type: str) -> Scheme:
        """The scheme with what was asked of it."""
        text = self.calibration
        return scheme_of(
            quant_type, int4_method=self.int4_method, calibration=text.digest if text else None
        )

    @property
    def calibration(self) -> EvalText | None:
        """The text that int4 weights are calibrated on; None where they are not."""
        if self.int4_method != "calibrated":
            return None
        if self.calibration_text is None:
            return bundled_calibration_text()
        return read_text(self.calibration_text, "--calibration-text")

    def options_of(self, quant_type: str) -> dict[str, str | int | float | bool | list[str] | None]:
        """The options that decide the stored bytes of one variant; what "unchanged" means."""
        return {
            **self.scheme(quant_type).options(self.group_size),
            "dtype": self.dtype,
            "embeddings": self.embeddings,
            "max_shard_size": self.max_shard_size,
            "skip": sorted(self.skip),
        }


def make_settings(
    *,
    model_path: str | None,
    repo_name: str | None,
    quant_type: str = DEFAULT_QUANT_TYPE,
    device: str = "auto",
    group_size: int = DEFAULT_GROUP_SIZE,
    int4_method: str = DEFAULT_INT4_METHOD,
    embeddings: str = "source",
    calibration_text: str | None = None,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    replace_main: bool = False,
    dtype: str = "auto",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    create_pr: bool = False,
    save_only: bool = False,
    output_dir: str = DEFAULT_OUTPUT_DIR,
    low_disk: str = "auto",
    evaluate: str = "auto",
    eval_text: str | None = None,
    eval_tokens: int | None = None,
    max_perplexity_increase: str | None = None,
    max_kl: str | None = None,
    trackio_url: str | None = None,
    trackio_write_token: str | None = None,
    experiment_name: str | None = None,
    dataset_repo: str | None = None,
    cuda_image: str | None = None,
    skip: Iterable[str] = (),
    trust_remote_code: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Settings:
    """Validate what was asked for.

    Raises:
        InputError: naming the option, why it is refused, and what would be accepted.
    """
    model, repo = _model_and_repo(model_path, repo_name, save_only=save_only)
    is_folder = Path(model).is_dir()
    if not is_folder and not _HUB_ID.fullmatch(model):
        raise InputError(
            f"{model!r} is neither an existing folder nor a Hub id.",
            hint="Give a checkpoint folder, or a Hub id such as `user/model`.",
        )
    if repo is not None and not _HUB_ID.fullmatch(repo):
        raise InputError(
            f"{repo!r} is not the name of a Hub repository.",
            hint="Name the repository `user/model`; variants become its subfolders by themselves.",
        )
    if is_folder and repo is None and not (save_only or dry_run):
        raise InputError(
            f"{model} is a folder, and no repository to publish into was named.",
            hint=f"Add the repository (`smolquant quantize {model} user/model`), or --save-only.",
        )
    if is_folder and revision is not None:
        raise InputError(
            f"--revision {revision} was given, but {model} is a folder and has no revisions.",
            hint="Leave --revision out, or name the model by its Hub id.",
        )
    if tag is not None and not _TAG.fullmatch(tag):
        raise InputError(f"{tag!r} is not a valid tag name.", hint="Use a name such as `v1.0`.")
    for given, name in (
        (tag, "--tag"),
        (create_pr, "--create-pr"),
        (replace_main, "--replace-main"),
    ):
        if given and save_only:
            raise InputError(
                f"{name} is about publishing, and --save-only publishes nothing.",
                hint="Leave one of the two out.",
            )
    if tag is not None and create_pr:
        raise InputError(
            "--tag and --create-pr do not go together: a pull request is not yet the release.",
            hint="Leave --tag out, and tag the commit when the pull request is merged.",
        )
    measured_on = _text_file(eval_text, "--eval-text")
    calibrated_on = _calibration_text(calibration_text, int4_method)
    if evaluate != "never":
        _refuse_one_text_for_both(measured_on, calibrated_on)
    return Settings(
        model=model,
        model_is_folder=is_folder,
        repo=repo,
        quant_types=_quant_types(quant_type),
        device=cast("Device", device),
        group_size=_group_size(group_size),
        int4_method=cast("Int4Method", int4_method),
        embeddings=cast("Embeddings", embeddings),
        calibration_text=calibrated_on,
        token=token or None,
        private=private,
        revision=revision,
        tag=tag,
        replace_main=replace_main,
        dtype=cast("Dtype", dtype),
        max_shard_size=shard_size(max_shard_size),
        create_pr=create_pr,
        save_only=save_only,
        output_dir=Path(output_dir),
        low_disk=cast("LowDisk", low_disk),
        trackio=make_destination(trackio_url, write_token=trackio_write_token, bucket=dataset_repo),
        experiment_name=experiment_name,
        evaluate=cast("Evaluate", evaluate),
        eval_text=measured_on,
        eval_tokens=_eval_tokens(eval_tokens),
        gate=_gate(evaluate, max_perplexity_increase, max_kl),
        cuda_image=cuda_image,
        skip=_skip_patterns(skip),
        trust_remote_code=trust_remote_code,
        force=force,
        dry_run=dry_run,
    )


def _model_and_repo(
    model_path: str | None, repo_name: str | None, *, save_only: bool
) -> tuple[str, str | None]:
    if model_path is None and repo_name is None:
        raise InputError(
            "No model was named.",
            hint="Give a checkpoint folder or a Hub id: `smolquant quantize user/model`.",
        )
    if model_path is None:
        assert repo_name is not None
        return repo_name, None if save_only else repo_name
    if save_only:
        return model_path, None
    if repo_name is None and not Path(model_path).is_dir():
        return model_path, model_path
    return model_path, repo_name


def _quant_types(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    expanded = [part for name in names for part in (BOTH if name == "both" else (name,))]
    for name in expanded:
        if name not in SCHEMES:
            known = BY_VARIANT.get(name)
            suggestion = f"Did you mean {known.quant_type}? " if known else ""
            raise InputError(
                f"{name!r} is not a quantization type.",
                hint=f"{suggestion}Known: {', '.join(SCHEMES)}, both, or a comma-separated list.",
            )
    if not expanded:
        raise InputError(
            "No quantization type was named.", hint=f"Known: {', '.join(SCHEMES)}, both."
        )
    return tuple(dict.fromkeys(expanded))


def _group_size(group_size: int) -> int:
    if group_size not in GROUP_SIZES:
        raise InputError(
            f"A group size of {group_size} has no kernel.",
            hint=f"Choose one of {', '.join(map(str, GROUP_SIZES))}.",
        )
    return group_size


def shard_size(text: str) -> int:
    """Bytes of a size such as ``1GB``.

    Raises:
        InputError: it is not one, or less than a megabyte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size < _UNITS["MB"]:
        raise InputError(
            f"{text!r} is not a shard size of at least 1MB.", hint="Write it as 1GB or 500MB."
        )
    return size


def _text_file(name: str | None, option: str) -> Path | None:
    if name is None:
        return None
    read_text(Path(name), option)  # refuses what it cannot read, before any work
    return Path(name)


def _calibration_text(name: str | None, int4_method: str) -> Path | None:
    if name is not None and int4_method != "calibrated":
        raise InputError(
            f"--calibration-text {name} was given, and --int4-method {int4_method} uses no text.",
            hint="Add --int4-method calibrated, or leave the text out.",
        )
    return _text_file(name, "--calibration-text")


def _refuse_one_text_for_both(eval_text: Path | None, calibration_text: Path | None) -> None:
    """What was calibrated on a text looks better there than anywhere else."""
    if eval_text is None or calibration_text is None:
        return
    if read_text(eval_text).digest == read_text(calibration_text, "--calibration-text").digest:
        raise InputError(
            f"--eval-text {eval_text} and --calibration-text {calibration_text} are the same text, so "
            "that the measured quality would be too good.",
            hint="Leave one of the two out for the bundled text, or divide the text in two.",
        )


def _eval_tokens(tokens: int | None) -> int | None:
    if tokens is not None and tokens < 2:
        raise InputError(
            f"--eval-tokens {tokens} is too few to predict one from another.",
            hint="Give at least 2; the default suits the model's size.",
        )
    return tokens


def _gate(evaluate: str, max_perplexity_increase: str | None, max_kl: str | None) -> Gate:
    options = {"--max-perplexity-increase": max_perplexity_increase, "--max-kl": max_kl}
    limits = {name: parse_limits(text, name) if text else {} for name, text in options.items()}
    gate = Gate(limits["--max-perplexity-increase"], limits["--max-kl"])
    if gate and evaluate == "never":
        raise InputError(
            f"{' and '.join(name for name in limits if limits[name])} needs measurements, and "
            "--evaluate never forbids them.",
            hint="Leave one of the two out.",
        )
    return gate


def _skip_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"--skip {pattern!r} is not a regular expression: {error}.",
                hint=r"Write it as part of a module name, such as `layers\.0\.` or `down_proj$`.",
            ) from error
    return tuple(dict.fromkeys(patterns))
