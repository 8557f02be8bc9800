"""A variant's folder: everything that `from_pretrained(repo, subfolder=...)` reads except the weights.

Config, tokenizer and template come from the source; the config gains torchao's entry, and
quantization.json says what was made. The publish package writes the card.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from smolquant.checkpoint.files import (
    CONFIG,
    file_names,
    is_code,
    refuse_secrets,
    sha256_of,
    write_text,
)
from smolquant.checkpoint.source import Source
from smolquant.quantize.output import Written
from smolquant.quantize.planned import VariantPlan
from smolquant.record import (
    FILE_NAME,
    TEXT_GENERATION,
    FileRecord,
    Options,
    SourceRecord,
    Task,
    VariantRecord,
    stack_versions,
)
from smolquant.report import plot

INDEX = "model.safetensors.index.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def work_key(plan: VariantPlan, source_state: str, options: Options) -> str:
    """A digest of all that decides the variant's stored bytes, short enough for a folder's name.

    Args:
        source_state: :attr:`Source.state`, as its identity may not be known before the work.
    """
    columns_by = [tensor.norm.norm.name if tensor.norm else None for tensor in plan.tensors]
    decides = json.dumps(
        [source_state, plan.scheme.quant_type, options, stack_versions(), columns_by]
    )
    digest = hashlib.sha256(decides.encode())
    for shard in plan.shards:
        digest.update(shard.header)
    return digest.hexdigest()[:12]


def finish_variant(
    folder: Path,
    plan: VariantPlan,
    written: Written,
    *,
    source: Source,
    config: dict[str, Any],
    options: Options,
    source_bytes: int,
    license_files: Sequence[str] = (),
    device: str | None = None,
    task: Task = TEXT_GENERATION,
    runs_own_code: bool = False,
) -> VariantRecord:
    """Complete ``folder``, which holds the weight files, and return its record, not yet written.

    Args:
        config: the source's config.json. Code that it names lies where transformers looks for it, at
            the root of a repository and never in a subfolder.
        options: those that decide the stored bytes.
        source_bytes: the size of the source's tensors, where shared memory counts once.
        license_files: names of the source's files that are copied too.
        device: the device that computed the stored bytes, if they depend on it.
        task: what the model is for.
        runs_own_code: whether the model is built by code of its own.

    Raises:
        InputError: a file of it holds a token that this run was given.
        OSError: the disk is full.
    """
    _copy_files(folder, source, (*source.auxiliary_files, *license_files))
    write_text(folder / CONFIG, _config_text(config, plan, source.repo))
    if plan.index_text is not None:
        write_text(folder / INDEX, plan.index_text)
    picture = plot.relative_error_plot(plan.scheme.variant, written.tensors)
    if picture is not None:
        write_text(folder / plot.FILE_NAME, picture)
    others = [name for name in file_names(folder, "**/*") if name not in written.files]
    refuse_secrets({name: folder / name for name in others})
    return VariantRecord(
        variant=plan.scheme.variant,
        quant_type=plan.scheme.quant_type,
        source=SourceRecord(
            identity=source.identity,
            size_bytes=source_bytes,
            repo=source.repo,
            revision=source.revision,
        ),
        options=options,
        dtype=plan.dtype_name,
        versions=stack_versions(),
        tensors=written.tensors,
        files={**written.files, **_file_records(folder, others)},
        device=device,
        task=task,
        has_chat_template=_has_chat_template(folder),
        runs_own_code=runs_own_code,
    )


def _copy_files(folder: Path, source: Source, names: Iterable[str]) -> None:
    """Copy files of the source but its config, which changes, and its code, which stays at the root."""
    for name in names:
        if name != CONFIG and not is_code(name):
            target = folder / name
            target.parent.mkdir(exist_ok=True)  # and no folder above, which may have been deleted
            _copy(source.folder / name, target, source.repo)


def write_record(folder: Path, record: VariantRecord) -> None:
    """Write ``quantization.json``."""
    write_text(folder / FILE_NAME, record.to_json())


def _has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in ``folder`` renders conversations: by a file of its own, or by its config."""
    if any((folder / name).is_file() for name in _TEMPLATES):
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # there is none, or none that transformers reads
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _config_text(config: dict[str, Any], plan: VariantPlan, repo: str | None) -> str:
    """The source's config with torchao's entry, in the dtype of what stays unquantized."""
    from transformers import TorchAoConfig

    changed = _with_dtype(copy.deepcopy(config), plan.dtype_name)
    if repo is not None:
        changed = _with_code_in(repo, changed)
    changed["dtype"] = plan.dtype_name
    if plan.untied:
        changed = _untied(changed) | {"tie_word_embeddings": False}
    if plan.stacks:
        # What transformers would choose by itself multiplies whole stacks, for which torchao's tensors have
        # no kernels on a CPU.
        changed["experts_implementation"] = "eager"
    changed["quantization_config"] = TorchAoConfig(
        plan.torchao_config(),
        modules_to_not_convert=list(plan.kept_modules),
    ).to_dict()
    return json.dumps(changed, indent=2, sort_keys=True) + "\n"


def _copy(path: Path, target: Path, repo: str | None) -> None:
    """Copy a file of the source; configs that name code, such as a tokenizer's, name its repository too."""
    if (
        repo is None
        or not path.name.endswith("config.json")
        or b'"auto_map"' not in path.read_bytes()
    ):
        shutil.copyfile(path, target)
        return
    entries = _with_code_in(repo, json.loads(path.read_bytes()))
    write_text(target, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")


def _with_code_in(repo: str, config: Any) -> Any:
    """``config`` whose every ``auto_map``, also those of configs nested in it, names ``repo``."""
    if isinstance(config, list):
        return [_with_code_in(repo, item) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: _in_repo(repo, value) if key == "auto_map" else _with_code_in(repo, value)
        for key, value in config.items()
    }


def _in_repo(repo: str, code: Any) -> Any:
    """References to code, ``module.Class`` each, in a form that holds from another repository too."""
    if isinstance(code, dict):
        return {auto: _in_repo(repo, item) for auto, item in code.items()}
    if isinstance(code, list):
        return [_in_repo(repo, item) for item in code]
    return code if not isinstance(code, str) or "--" in code else f"{repo}--{code}"


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Set the dtype in ``config`` and in those nested in it; before transformers 5 the key's name was
    ``torch_dtype``.
    """
    config.pop("torch_dtype", None)
    for key, value in config.items():
        if key == "dtype":
            config[key] = dtype
        elif isinstance(value, dict):
            _with_dtype(value, dtype)
    return config


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without the tie of embedding and output head, where it or one in it states that."""
    return {
        key: False
        if key == "tie_word_embeddings"
        else _untied(value)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def _file_records(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    paths = {name: folder / name for name in names}
    return {name: FileRecord(sha256_of(path), path.stat().st_size) for name, path in paths.items()}
