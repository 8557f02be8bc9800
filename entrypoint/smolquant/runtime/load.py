"""``smolquant.load``: a published variant, ready to generate on the machine at hand."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.errors import InputError, MachineError
from smolquant.model.task import auto_class
from smolquant.places import is_folder
from smolquant.runtime.contents import (
    missing_variant,
    require_place,
    variants_among,
    variants_in,
)
from smolquant.schemes import BY_VARIANT, Scheme
from smolquant.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_OF_FILES = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""What ``from_pretrained`` is told of where files are and how far they are trusted, for model, config and
tokenizer alike."""

_PATIENCE = 10.0
"""Seconds that the Hub is waited for, to tell which variants there are."""

_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


class NeedsOwnCode(InputError):
    """A variant cannot be loaded without code of its own, and nobody has allowed that to run."""


def load(
    repo_or_folder: str | Path,
    variant: str = "int4",
    device: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a variant and its tokenizer, with this machine's kernel for it.

    It computes with as many threads as torch does, whose number belongs to the process that loads it.
    torch asks for the cores that the process may be scheduled on, not for a container's CPU quota: where
    one is set, set ``OMP_NUM_THREADS``, or call ``torch.set_num_threads``.

    Args:
        repo_or_folder: a Hub id, or a folder with the same layout (``FOLDER/int4/``).
        variant: the subfolder's name, such as ``int4`` or ``int8``.
        device: ``cpu``, ``cuda`` or any device that transformers' ``device_map`` takes; by default
            CUDA where there is one, else the CPU.
        revision: branch, tag or sha on the Hub.
        options: whatever else ``from_pretrained`` takes, such as ``dtype``, ``attn_implementation``,
            ``device_map`` instead of ``device``, ``max_memory``, ``trust_remote_code``, ``cache_dir``,
            ``token`` or ``local_files_only``. What is about files goes to the tokenizer, too.

    Returns:
        The model and its tokenizer, or its processor where the model takes more than text.

    Raises:
        InputError: no such variant is known or there, which tells what is; options contradict each other,
            the variant computes in another dtype only, or it needs code of its own that is not trusted.
        MachineError: the device has no kernels for it.
    """
    # A refusal waits for no library.
    scheme = _scheme_of(repo_or_folder, variant, revision, options.get("token"))

    from smolquant.runtime.kernels import has_kernels

    device_map = _device_map(device, options.pop("device_map", None))
    where = _device_of(device_map)
    if not has_kernels(scheme, where):
        assert scheme.cuda_capability is not None
        raise MachineError(
            f"{variant} needs a GPU of compute capability "
            f"{'.'.join(map(str, scheme.cuda_capability))} or more, and {where} is not one here.",
            hint="Load it on a machine with such a GPU, or load another variant of the model.",
        )
    with _naming_what_is_there(repo_or_folder, variant, revision, options.get("token")):
        return _loaded(repo_or_folder, scheme, device_map, revision=revision, **options)


def load_for_checking(
    folder: Path,
    variant: str,
    *,
    report: "Callable[[Mapping[str, Any]], None]",
    examine: "Callable[[PreTrainedModel], None] | None" = None,
    trust_remote_code: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load as :func:`load` does, but with plain weights where this machine lacks the variant's kernels.

    Args:
        report, examine: as for :func:`load_model`.
    """
    return _loaded(
        folder,
        _scheme_of(folder, variant),
        default_device(),
        trust_remote_code=trust_remote_code,
        report=report,
        examine=examine,
    )


def load_model(
    repo_or_folder: str | Path,
    scheme: Scheme,
    device_map: Any,
    *,
    prepare: "Callable[[PreTrainedModel], object] | None" = None,
    report: "Callable[[Mapping[str, Any]], None] | None" = None,
    examine: "Callable[[PreTrainedModel], None] | None" = None,
    **options: Any,
) -> "PreTrainedModel":
    """Load a variant's model as stock transformers does, with the device's kernel for it.

    Where the device has none, the weights become the plain ones that they stand for.

    Args:
        repo_or_folder: what ``from_pretrained`` takes, as ``options`` are.
        scheme: what quantized the variant.
        device_map: a device's name, or anything that ``from_pretrained`` takes.
        prepare: given the model when its weights are as they are stored, instead of making them run.
        report: is told what transformers says of the loading, such as ``missing_keys``.
        examine: is given the model when its weights are as they are stored, before they are made to run.

    Raises:
        InputError: ``options`` ask for a dtype that the variant does not compute in.
        NeedsOwnCode: the model is not one of transformers', and its code is not trusted.
    """
    import smolquant.runtime.quantizer  # noqa: F401 - importing it is what reads the weights quickly
    from smolquant.runtime.kernels import preparation

    options.setdefault("trust_remote_code", False)  # transformers would ask the terminal
    with _naming_own_code(repo_or_folder):
        config = _config(repo_or_folder, options)
        _require_dtype(scheme, config, options)
        model, info = auto_class(config).from_pretrained(
            repo_or_folder, device_map=device_map, output_loading_info=True, **options
        )
    if report is not None:
        report(info)
    if examine is not None:
        examine(model)
    (prepare or preparation(scheme, _device_of(device_map)))(model)
    loaded: PreTrainedModel = model
    return loaded


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _naming_own_code(where: str | Path) -> "Iterator[None]":
    """Turn transformers' refusal to run a repository's code into one that says what to do."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise NeedsOwnCode(
            f"The variant in {where} needs code of its own, which its repository brings along, and "
            "running that is off.",
            hint="Read the code; if you trust it, load the variant with trust_remote_code=True.",
        ) from error


@contextmanager
def _naming_what_is_there(
    where: str | Path, variant: str, revision: str | None, token: Any
) -> "Iterator[None]":
    """Where a repository lacks the variant, tell which ones it has, instead of which file is missing."""
    try:
        yield
    except (OSError, ValueError) as error:  # transformers' own, of a file that is not there
        there = None if is_folder(str(where)) else _in_repository(str(where), revision, token)
        if (
            there is None or variant in there
        ):  # then something else is missing, which the error names
            raise
        raise missing_variant(str(where), variant, there) from error


def _in_repository(repo: str, revision: str | None, token: Any) -> list[str] | None:
    """The variants of a repository; None where it cannot be looked into."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, token=token, timeout=_PATIENCE)
    except Exception:  # it is looked into for the sake of a message only
        return None
    return variants_among({file.rfilename for file in info.siblings or ()})


def _scheme_of(
    repo_or_folder: str | Path, variant: str, revision: str | None = None, token: Any = None
) -> Scheme:
    place = str(repo_or_folder)
    require_place(place)
    if is_folder(place):
        if variant not in BY_VARIANT or not is_folder(f"{place}/{variant}"):
            raise missing_variant(place, variant, variants_in(Path(place)))
    elif variant not in BY_VARIANT:
        there = _in_repository(place, revision, token)
        if there is None:
            known = ", ".join(BY_VARIANT)
            hint = f"{did_you_mean(variant, BY_VARIANT)}Known are {known}."
            raise InputError(f"{variant!r} is not a variant.", hint=hint)
        raise missing_variant(place, variant, there)
    return BY_VARIANT[variant]


def _device_map(device: Any, device_map: Any) -> Any:
    if device is not None and device_map is not None:
        raise InputError(
            f"device={device!r} and device_map={device_map!r} both say where the model goes.",
            hint="Give one of them.",
        )
    for given in (device, device_map):
        if given is not None:
            return given
    return default_device()


def _device_of(device_map: Any) -> str:
    """What decides about kernels: ``cpu`` where any part of the model is there, else the device."""
    if isinstance(device_map, dict):
        places = {str(place) for place in device_map.values()}
        return "cpu" if places & {"cpu", "disk"} else next(iter(sorted(places)), default_device())
    return str(device_map)


def _loaded(
    repo_or_folder: str | Path, scheme: Scheme, device_map: Any, **options: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    options = {"trust_remote_code": False, **options, "subfolder": scheme.variant}
    model = load_model(repo_or_folder, scheme, device_map, **options)
    with _naming_own_code(repo_or_folder):
        return model, _text_class(repo_or_folder, model, options).from_pretrained(
            repo_or_folder, **_of_files(options)
        )


def _of_files(options: "Mapping[str, Any]") -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _OF_FILES}


def _config(repo_or_folder: str | Path, options: "Mapping[str, Any]") -> "PreTrainedConfig":
    from transformers import AutoConfig

    if options.get("config") is not None:
        given: PreTrainedConfig = options["config"]
        return given
    read: PreTrainedConfig = AutoConfig.from_pretrained(repo_or_folder, **_of_files(options))
    return read


def _require_dtype(
    scheme: Scheme, config: "PreTrainedConfig", options: "Mapping[str, Any]"
) -> None:
    asked, stored = options.get("dtype", options.get("torch_dtype")), config.dtype
    if not scheme.computes_as_stored or asked is None or asked == "auto" or stored is None:
        return
    asked, stored = (str(dtype).removeprefix("torch.") for dtype in (asked, stored))
    if asked != stored:
        raise InputError(
            f"{scheme.variant} cannot compute in {asked}: its weights belong to a kernel that takes "
            f"activations in the dtype of their scales only, which are {stored}.",
            hint="Leave dtype out, or load a variant that computes in any dtype.",
        )


def _text_class(
    repo_or_folder: str | Path, model: "PreTrainedModel", options: "Mapping[str, Any]"
) -> Any:
    """What reads a prompt for ``model``: its processor where it takes images too and brings one along."""
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils import cached_file

    if not hasattr(model.config, "vision_config"):
        return AutoTokenizer
    where = {
        name: value
        for name, value in _of_files(options).items()
        if name not in ("trust_remote_code", "code_revision")
    }
    found = (
        cached_file(repo_or_folder, name, _raise_exceptions_for_missing_entries=False, **where)
        for name in _OF_PROCESSORS
    )
    return AutoProcessor if any(found) else AutoTokenizer
