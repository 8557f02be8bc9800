"""Proof of one family: its variants against torchao's own quantization in memory, and the source."""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.utils import TorchAOBaseTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    TorchAoConfig,
)

import smolquant
from families.build import CannotBuild, Small, small_model
from families.inputs import Inputs
from families.kinds import Kind
from families.oracle import quantize_in_memory
from families.tokenizer import save_tokenizer
from smolquant.checkpoint.folder import FolderSource
from smolquant.errors import SmolquantError
from smolquant.model.task import auto_class
from smolquant.quantize import making
from smolquant.quantize.planning import plan_variants
from smolquant.record import VariantRecord
from smolquant.report.console import Console
from smolquant.schemes import SCHEMES
from smolquant.settings import Settings, make_settings

TOLERANCE = 1e-3
"""Of the norm of the logits."""

_NEW_TOKENS = 3
_TRIAL_SECONDS = 300.0
"""More than any trial takes, however busy the machine is; what a slow one leaves out is not asked here."""

_SENSES = ("vision", "visual", "image", "audio", "projector", "connector", "speech", "multi_modal")
_TEXT_PARTS = ("language_model.", "text_model.")


@dataclass(frozen=True)
class Outcome:
    """What became of one scheme."""

    verdict: str
    """``works``, ``refused`` or ``wrong``."""
    reason: str = ""
    """Why it is refused, or what is wrong."""
    quantized: int = 0
    """Weights."""
    relative_error: float | None = None
    """Of the logits, against torchao's own quantization."""
    stock: str = ""
    """Of what is refused: why transformers and torchao cannot do it either; empty where they can."""


class _Wrong(Exception):
    """A variant was made that is not what it says."""


def prove(kind: Kind, quant_types: Sequence[str]) -> dict[str, Any]:
    """Build, quantize, load and compare one family, every scheme by itself.

    Returns:
        What the page tells of it, as JSON.
    """
    about: dict[str, Any] = {"key": kind.key, "class": kind.class_name}
    try:
        small = small_model(kind)
    except CannotBuild as error:
        return about | {"cannot_build": str(error), "outcomes": {}}
    about["parameters"] = sum(p.numel() for p in small.model.parameters())
    about["dtype"] = str(small.model.dtype).removeprefix("torch.")
    about["image"] = small.inputs.has_image
    with tempfile.TemporaryDirectory(prefix="families-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        source = folder / "source"
        small.model.save_pretrained(source)
        save_tokenizer(source, rows=small.model.get_input_embeddings().weight.shape[0])
        outcomes = {
            quant_type: asdict(_outcome(kind, small, source, folder / quant_type, quant_type))
            for quant_type in quant_types
        }
    return about | {"outcomes": outcomes}


def _outcome(kind: Kind, small: Small, source: Path, output: Path, quant_type: str) -> Outcome:
    try:
        record = _quantized(source, output, quant_type)
    except SmolquantError as error:
        return Outcome("refused", str(error), stock=_stock_failure(kind, small, source, quant_type))
    except Exception as error:
        return Outcome("wrong", f"quantizing fails with {_told(error)}")
    quantized = sum(tensor.quantized for tensor in record.tensors.values())
    try:
        difference = _compare(kind, small, source, output, record)
    except _Wrong as wrong:
        return Outcome("wrong", str(wrong), quantized)
    return Outcome("works", "", quantized, difference)


def _quantized(source: Path, output: Path, quant_type: str) -> VariantRecord:
    """Quantize as the command does; what it would publish lies in ``output`` then."""
    settings = _settings(source, output, quant_type)
    opened = FolderSource(source)
    console = Console({}, io.StringIO())
    plans = plan_variants(opened, settings, [quant_type], console, trial_seconds=_TRIAL_SECONDS)
    with making.open_work(plans, opened, settings, None, console, send=None) as work:
        results = making.quantize_variants(work, console, watch=lambda n_bytes: None)
        (made,) = making.keep_variants(work, results).values()
    return made.record


def _settings(source: Path, output: Path, quant_type: str) -> Settings:
    return make_settings(
        model_path=str(source),
        repo_name=None,
        quant_type=quant_type,
        output_dir=str(output),
        save_only=True,
        evaluate="never",
        int4_method="rtn",  # torchao's own way, so that its own quantization is the oracle
    )


def _compare(kind: Kind, small: Small, source: Path, output: Path, record: VariantRecord) -> float:
    """The relative error of the variant's logits.

    Raises:
        _Wrong: something that was stored or loaded is not what it has to be.
    """
    scheme = SCHEMES[record.quant_type]
    model = _loaded(output, scheme.variant, stock=scheme.stock_loads)
    if type(model).__name__ != kind.class_name:
        raise _Wrong(f"it is loaded as {type(model).__name__}, and is a {kind.class_name}")
    expected = type(small.model).from_pretrained(
        source,
        dtype=getattr(torch, record.dtype),
        # What transformers would choose by itself multiplies whole stacks of experts, for which torchao
        # has no kernels on a CPU; so the variant's config says the same.
        experts_implementation=getattr(model.config, "_experts_implementation", None),
    )
    expected.eval()
    weights = _quantized_weights(model)
    recorded = sum(tensor.quantized for tensor in record.tensors.values())
    if len(weights) != recorded:
        raise _Wrong(f"{len(weights)} weights are quantized, and {recorded} in the record")
    _require_senses_untouched(weights)
    _require_source_values(model, expected, weights)
    quantize_in_memory(expected, model, record)
    error = _relative_error(
        _run("the variant", model, small.inputs), _run("torchao's", expected, small.inputs)
    )
    if not error <= TOLERANCE:
        raise _Wrong(f"its logits are {error:.2g} of their norm from torchao's own quantization")
    _require_same_text(model, expected, small.inputs)
    return error


def _loaded(output: Path, variant: str, *, stock: bool) -> PreTrainedModel:
    """The variant as its card has users load it."""
    try:
        if not stock:
            model, _ = smolquant.load(output, variant=variant, device="cpu")
            return model.eval()
        config = json.loads((output / variant / "config.json").read_text())
        model, told = auto_class(config).from_pretrained(
            output, subfolder=variant, device_map="cpu", output_loading_info=True
        )
        AutoTokenizer.from_pretrained(output, subfolder=variant)
    except Exception as error:
        raise _Wrong(f"it does not load: {_told(error)}") from error
    for name in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if told.get(name):
            raise _Wrong(f"loading it tells of {name}: {sorted(told[name])[0]}")
    loaded: PreTrainedModel = model
    return loaded.eval()


def _quantized_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if isinstance(parameter.data, TorchAOBaseTensor)
    }


def _require_senses_untouched(weights: Mapping[str, torch.Tensor]) -> None:
    # Some language models have weights of their own for the tokens of pictures.
    touched = [
        name
        for name in weights
        if any(sense in name for sense in _SENSES) and not any(text in name for text in _TEXT_PARTS)
    ]
    if touched:
        raise _Wrong(f"a part that sees or hears is quantized: {touched[0]}")


def _require_source_values(
    model: PreTrainedModel, source: PreTrainedModel, quantized: Mapping[str, torch.Tensor]
) -> None:
    """Every unquantized value of ``model``, its stored buffers included, is the source's."""
    expected = source.state_dict()
    found = model.state_dict()
    if found.keys() != expected.keys():
        raise _Wrong(f"its names differ: {sorted(found.keys() ^ expected.keys())[0]}")
    shared = {id(weight) for weight in quantized.values()}
    for name, value in found.items():
        if name in quantized or id(value) in shared or isinstance(value, TorchAOBaseTensor):
            continue
        if not torch.equal(value.to(expected[name].dtype), expected[name]):
            raise _Wrong(f"{name} is not the source's")


def _run(whose: str, model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs.for_model(model)).logits
    except Exception as error:
        raise _Wrong(f"{whose} does not run: {_told(error)}") from error
    if not bool(torch.isfinite(logits).all()):
        raise _Wrong(f"{whose} logits are not finite")
    return logits.double()


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _require_same_text(model: PreTrainedModel, expected: PreTrainedModel, inputs: Inputs) -> None:
    """It generates what torchao's own does, where that generates anything."""
    try:
        wanted = _generated(expected, inputs)
    except Exception:
        return
    try:
        found = _generated(model, inputs)
    except Exception as error:
        raise _Wrong(f"it does not generate: {_told(error)}") from error
    if not torch.equal(found, wanted):
        raise _Wrong("it generates other tokens than torchao's own quantization")


def _generated(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        tokens: torch.Tensor = model.generate(
            **inputs.for_model(model), max_new_tokens=_NEW_TOKENS, do_sample=False
        )
    return tokens


def _stock_failure(kind: Kind, small: Small, source: Path, quant_type: str) -> str:
    """Why transformers and torchao by themselves do not quantize, save, load and run the model either."""
    scheme = SCHEMES[quant_type]
    if not scheme.stock_loads:
        return "not asked: a CPU needs smolquant for it"
    loader: Any = AutoModelForImageTextToText if kind.sees else AutoModelForCausalLM
    config = TorchAoConfig(scheme.torchao_config(128))
    try:
        model = loader.from_pretrained(
            source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        share = _quantized_share(model)
        if share < 0.5:
            return f"it quantizes {share:.0%} of the weights beside the tables"
        before = _run("stock", model, small.inputs)
        with tempfile.TemporaryDirectory(prefix="families-") as name:
            model.save_pretrained(name)
            again = loader.from_pretrained(name, device_map="cpu")
            error = _relative_error(_run("stock", again, small.inputs), before)
        return "" if error <= TOLERANCE else f"what it saves loads {error:.2g} off"
    except Exception as error:
        return _told(error)


def _quantized_share(model: PreTrainedModel) -> float:
    tables = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.add(id(head.weight))
    weights = [p for p in model.parameters() if id(p) not in tables]
    total = sum(weight.numel() for weight in weights)
    quantized = sum(w.numel() for w in weights if isinstance(w.data, TorchAOBaseTensor))
    return quantized / total if total else 0.0


def _told(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
