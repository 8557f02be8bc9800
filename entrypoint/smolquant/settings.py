"""What was asked for: one frozen, validated value. It knows neither argv nor torch nor the Hub.

An option is a field of :class:`Settings`: its default and what reads the given text stand there and
nowhere else. What concerns several options is a check of its own, by topic.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from smolquant.errors import InputError
from smolquant.evaluate import Measurement
from smolquant.evaluate.documents import EvalText, bundled_calibration_text, bundled_text, read_text
from smolquant.evaluate.gate import Gate, Limits
from smolquant.names import is_repo_id
from smolquant.places import is_docker_run, is_file, is_folder, nearby_folders, output_folder
from smolquant.reading import (
    as_given,
    read_group_size,
    read_limits,
    read_patterns,
    read_quant_types,
    read_size,
    read_tag,
    read_text_file,
    read_token,
    read_token_count,
)
from smolquant.record import Options
from smolquant.schemes import BY_VARIANT, DEFAULT_INT4_METHOD, Int4Method, Scheme, scheme_of
from smolquant.text import one_of
from smolquant.tracking.destination import LOCAL, Destination, make_destination

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16"]
When = Literal["auto", "always", "never"]


def _setting(
    default: Any = None,
    read: Callable[[Any], Any] = as_given,
    *,
    name: str = "",
    repr: bool = True,  # noqa: A002 - the dataclass's own word for it
) -> Any:
    """Declare an option: its default as a user would write it, and what reads it.

    Args:
        name: the option's, where it is not the field's.
    """
    return field(metadata={"default": default, "read": read, "name": name}, repr=repr)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one run. Build it with :func:`make_settings`, which refuses what makes no sense."""

    model: str
    """Checkpoint folder or Hub id, as given."""
    model_is_folder: bool
    repo: str | None
    """Hub repository to publish into; None with ``save_only`` from a folder."""
    quant_types: tuple[str, ...] = _setting("int8_weight_only", read_quant_types, name="quant_type")
    device: Device = _setting("auto")
    group_size: int = _setting(128, read_group_size)
    int4_method: Int4Method = _setting(DEFAULT_INT4_METHOD)
    calibration_text: Path | None = _setting(None, read_text_file("--calibration-text"))
    """None stands for the bundled text."""
    embeddings: str = _setting("source")
    """``source`` keeps tables with a row a token; else the variant whose scheme stores them."""
    token: str | None = _setting(None, read_token, repr=False)
    """None leaves the choice to the Hub client: HF_TOKEN, a login, or keyless OIDC."""
    hub_timeout: int = _setting(120)
    """Seconds, see :mod:`smolquant.wire`."""
    private: bool = _setting(False)
    revision: str | None = _setting()
    tag: str | None = _setting(None, read_tag)
    replace_main: bool = _setting(False)
    dtype: Dtype = _setting("auto")
    max_shard_size: int = _setting("1GB", read_size)
    """Bytes."""
    create_pr: bool = _setting(False)
    branches: bool = _setting(False)
    """Whether each published variant also becomes the root of a branch of its own name."""
    save_only: bool = _setting(False)
    output_dir: Path = _setting("./quantized", output_folder)
    low_disk: When = _setting("auto")
    evaluate: When = _setting("auto")
    eval_text: Path | None = _setting(None, read_text_file("--eval-text"))
    """None stands for the bundled text."""
    eval_tokens: int | None = _setting(None, read_token_count)
    """None stands for a number that suits the model's size."""
    max_perplexity_increase: Limits = _setting(None, read_limits("--max-perplexity-increase"))
    """Variant -> percent."""
    max_kl: Limits = _setting(None, read_limits("--max-kl"))
    """Variant -> nats."""
    allow_partial: bool = _setting(False)
    """Whether variants within their limits go out without those that are not."""
    skip: tuple[str, ...] = _setting((), read_patterns)
    """Regular expressions, searched for in module names."""
    cuda_image: str | None = _setting()
    """The image that a GPU sibling runs; None: the one of this version."""
    trackio_url: str | None = _setting(repr=False)
    """As given: it may hold a write token."""
    trackio_write_token: str | None = _setting(repr=False)
    experiment_name: str | None = _setting()
    dataset_repo: str | None = _setting()
    trust_remote_code: bool = _setting(False)
    force: bool = _setting(False)
    dry_run: bool = _setting(False)

    @property
    def publishes(self) -> bool:
        """Whether this run may change the Hub."""
        return not (self.save_only or self.dry_run)

    @property
    def variants_stand_alone(self) -> bool:
        """Whether no main model, with its license, lies at the root beside the variants."""
        return self.save_only or not (self.model_is_folder or self.model == self.repo)

    @cached_property
    def trackio(self) -> Destination | None:
        """The dashboard that records the run; None where there is none.

        Raises:
            InputError: it is not an address of a Trackio dashboard.
        """
        return make_destination(
            self.trackio_url, write_token=self.trackio_write_token, bucket=self.dataset_repo
        )

    @property
    def keeps_local_project(self) -> bool:
        """Whether Trackio records the run in the output folder."""
        return (self.trackio_url or "").strip() == LOCAL

    @cached_property
    def gate(self) -> Gate:
        """The limits on how much worse than its source a published variant may be."""
        return Gate(self.max_perplexity_increase, self.max_kl)

    @cached_property
    def measurement(self) -> Measurement:
        """What quality is measured on.

        Raises:
            InputError: a text that cannot be read.
        """
        text = bundled_text() if self.eval_text is None else read_text(self.eval_text)
        return Measurement(text, self.eval_tokens, self.trust_remote_code)

    def scheme(self, quant_type: str) -> Scheme:
        """The scheme with what was asked of it."""
        text = self.calibration
        return scheme_of(
            quant_type, int4_method=self.int4_method, calibration=text.digest if text else None
        )

    @cached_property
    def calibration(self) -> EvalText | None:
        """The text that weights are calibrated on; None where none are."""
        if self.int4_method != "calibrated":
            return None
        if self.calibration_text is None:
            return bundled_calibration_text()
        return read_text(self.calibration_text, "--calibration-text")

    def options_of(self, quant_type: str) -> Options:
        """The options that decide the stored bytes of one variant; what "unchanged" means."""
        return self._options_of(self.scheme(quant_type))

    def earlier_options_of(self, quant_type: str) -> list[Options]:
        """What those options were in versions that bundled another text to calibrate on."""
        earlier = self.calibration.earlier if self.calibration else ()
        schemes = [
            scheme_of(quant_type, int4_method=self.int4_method, calibration=digest)
            for digest in sorted(earlier)
        ]
        return [self._options_of(scheme) for scheme in schemes]

    def _options_of(self, scheme: Scheme) -> Options:
        return {
            **scheme.options(self.group_size),
            "dtype": self.dtype,
            "embeddings": self.embeddings,
            "max_shard_size": self.max_shard_size,
            "skip": sorted(self.skip),
        }


_OPTIONS: dict[str, Field[Any]] = {
    one.metadata["name"] or one.name: one for one in fields(Settings) if one.metadata
}
"""The fields that are options, by the option's name."""


def default_of(option: str) -> Any:
    """An option's default as a user would write it.

    Args:
        option: its name with underscores: ``max_shard_size``.
    """
    return _OPTIONS[option].metadata["default"]


def make_settings(*, model_path: str | None, repo_name: str | None, **options: Any) -> Settings:
    """Validate what was asked for.

    Args:
        model_path: checkpoint folder or Hub id.
        repo_name: Hub repository to publish into.
        options: by name with underscores, as they were written; the others have their defaults.

    Raises:
        InputError: naming the option, why it is refused, and what would be accepted.
        TypeError: there is no such option.
    """
    if unknown := options.keys() - _OPTIONS.keys():
        raise TypeError(f"there are no options {', '.join(sorted(unknown))}")
    model, repo = _model_and_repo(
        model_path, repo_name, save_only=options.get("save_only", default_of("save_only"))
    )
    settings = Settings(
        model=model,
        model_is_folder=is_folder(model),
        repo=repo,
        **{
            one.name: one.metadata["read"](options.get(name, one.metadata["default"]))
            for name, one in _OPTIONS.items()
        },
    )
    for check in _CHECKS:
        check(settings)
    return settings


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
    if repo_name is None and not is_folder(model_path):
        return model_path, model_path
    return model_path, repo_name


# What concerns several options


def _check_source(settings: Settings) -> None:
    model, is_folder = settings.model, settings.model_is_folder
    if not is_folder and (is_file(model) or not is_repo_id(model)):
        raise _not_a_model(model)
    if is_folder and settings.revision is not None:
        raise InputError(
            f"--revision {settings.revision} was given, but {model} is a folder and has no revisions.",
            hint="Leave --revision out, or name the model by its Hub id.",
        )


def _not_a_model(model: str) -> InputError:
    path = Path(model)
    if path.suffix == ".gguf" and is_file(model):
        return InputError(
            f"{model} is a GGUF file: llama.cpp's own format, whose weights are mostly quantized already.",
            hint="Start from the checkpoint that it was made from, as `save_pretrained` wrote it.",
        )
    if is_file(model):
        return InputError(
            f"{model} is a file, and a checkpoint is a folder with config.json and weights.",
            hint=f"Name the folder that it lies in: `{path.parent}`.",
        )
    similar = nearby_folders(model)
    return InputError(
        f"{model!r} is neither an existing folder nor a Hub id.",
        hint=f"{one_of(similar)}Give a checkpoint folder, or a Hub id such as `user/model`."
        + _where_it_may_be(),
    )


def _where_it_may_be() -> str:
    """What keeps a folder from being found by the name that its owner knows."""
    if is_file("config.json"):
        return " The working folder is a checkpoint itself: its name is `.`."
    if is_docker_run():
        return (
            " A container has only the folders that were mounted: "
            '`docker run -v "$PWD:/github/workspace"` mounts the one that you are in, and names count '
            "from there. In a workflow, an earlier step has to bring the checkpoint."
        )
    return ""


def _check_target(settings: Settings) -> None:
    repo, model = settings.repo, settings.model
    if repo is not None and not is_repo_id(repo):
        raise InputError(
            f"{repo!r} is not the name of a Hub repository.",
            hint="Name the repository `user/model`; variants become its subfolders by themselves.",
        )
    if settings.model_is_folder and repo is None and settings.publishes:
        raise InputError(
            f"{model} is a folder, and no repository to publish into was named.",
            hint=f"Add the repository (`smolquant quantize {model} user/model`), or --save-only.",
        )


def _check_publishing(settings: Settings) -> None:
    for given, name in (
        (settings.tag, "--tag"),
        (settings.create_pr, "--create-pr"),
        (settings.branches, "--branches"),
        (settings.replace_main, "--replace-main"),
    ):
        if given and settings.save_only:
            raise InputError(
                f"{name} is about publishing, and --save-only publishes nothing.",
                hint="Leave one of the two out.",
            )
    if settings.tag is not None and settings.create_pr:
        raise InputError(
            "--tag and --create-pr do not go together: a pull request is not yet the release.",
            hint="Leave --tag out, and tag the commit when the pull request is merged.",
        )
    if settings.branches and settings.create_pr:
        raise InputError(
            "--branches and --create-pr do not go together: a branch repeats what main has, and a pull "
            "request is not yet merged into it.",
            hint="Leave --branches out, and run again with it alone when the pull request is merged.",
        )
    if settings.branches and settings.tag in BY_VARIANT:
        raise InputError(
            f"--tag {settings.tag} has the name of a variant, and with --branches a branch may have it.",
            hint="Choose another tag, such as the release's own, or leave --branches out.",
        )


def _check_calibration(settings: Settings) -> None:
    if settings.calibration_text is not None and settings.int4_method != "calibrated":
        raise InputError(
            f"--calibration-text {settings.calibration_text} was given, and --int4-method "
            f"{settings.int4_method} uses no text.",
            hint="Add --int4-method calibrated, or leave the text out.",
        )


def _check_texts(settings: Settings) -> None:
    """Refuse to measure on the text that weights are calibrated on, where they look their best."""
    measured_on, calibrated_on = settings.eval_text, settings.calibration_text
    if settings.evaluate == "never" or measured_on is None or calibrated_on is None:
        return
    if read_text(measured_on).digest == read_text(calibrated_on, "--calibration-text").digest:
        raise InputError(
            f"--eval-text {measured_on} and --calibration-text {calibrated_on} are the same text, so "
            "that the measured quality would be too good.",
            hint="Leave one of the two out for the bundled text, or divide the text in two.",
        )


def _check_limits(settings: Settings) -> None:
    limits = {
        "--max-perplexity-increase": settings.max_perplexity_increase,
        "--max-kl": settings.max_kl,
    }
    given = [name for name, limit in limits.items() if limit]
    if settings.allow_partial and not given:
        raise InputError(
            "--allow-partial says what becomes of variants that do not keep a limit, and there is none.",
            hint=f"Add {' or '.join(limits)}, or leave --allow-partial out.",
        )
    if given and settings.evaluate == "never":
        raise InputError(
            f"{' and '.join(given)} needs measurements, and --evaluate never forbids them.",
            hint="Leave one of the two out.",
        )


def _check_trackio(settings: Settings) -> None:
    settings.trackio  # noqa: B018 - reading the address checks it


_CHECKS = (
    _check_source,
    _check_target,
    _check_publishing,
    _check_calibration,
    _check_texts,
    _check_limits,
    _check_trackio,
)
