"""Before the work: a small model of the same architecture, quantized, loaded and run as users will.

Not every model's own code takes a quantized weight: some multiply with ``weight.T``, some change weights
in place. That shows on a model of two layers in a second or two as well as on the real one after hours.
Nothing here knows a family by name: what fails is found by running it, and kept where that helps.
"""

import copy
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from smolquant.checkpoint.files import is_code
from smolquant.checkpoint.source import FolderSource
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture
from smolquant.model.shrink import smaller_configs
from smolquant.quantize.engine import quantize_checkpoint
from smolquant.quantize.plan import VariantPlan, make_plan
from smolquant.quantize.variant import finish_variant
from smolquant.runtime.load import load_model
from smolquant.schemes import Quantize

_LARGEST = 60_000_000
"""Parameters of a model that is still tried; quantizing more would take longer than anyone waits."""

_PROMPT, _GENERATED = 24, 3
"""Tokens."""

_NOISE = 0.02
"""Added to what a fresh model starts with, so that no two tensors are alike."""


@dataclass(frozen=True)
class Trial:
    """What the small model showed of one variant."""

    keep: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions of whole module names -> why they have to stay unquantized."""
    refusal: str | None = None
    """Why the variant would be of no use; None where it runs, :attr:`keep` kept."""
    untried: str | None = None
    """Why nothing can be said, or what the small model could not show; None where all was tried."""


def try_variants(
    architecture: Architecture,
    plans: Mapping[str, VariantPlan],
    folder: Path,
    *,
    skip: Sequence[str] = (),
    embeddings: str = "source",
    trust_remote_code: bool = False,
) -> dict[str, Trial]:
    """Try every planned variant on a small model.

    Args:
        plans: variant -> its plan for the real checkpoint.
        folder: the source's, for a model's own code.
        skip: as the plans were made with.
        embeddings: as the plans were made with.
        trust_remote_code: run the model's own code.

    Returns:
        Variant -> what was found. A plan is to be made again with what has to be kept.
    """
    with tempfile.TemporaryDirectory(prefix="smolquant-trial-") as name, _undisturbed():
        root = Path(name)
        plan = next(iter(plans.values()))  # dtype and group size are those of all
        configs = list(smaller_configs(architecture.model, plan.group_size))
        small = _small_model(type(architecture.model), configs, plan.dtype)
        if small is None:
            return dict.fromkeys(plans, _without_small_model(architecture, configs, plan.dtype))
        source = _save(small, root / "source", folder, architecture.config_dict)
        laboratory = _Laboratory(
            small,
            source,
            root,
            skip=tuple(skip),
            embeddings=embeddings,
            trust_remote_code=trust_remote_code,
        )
        return {variant: laboratory.try_variant(plan) for variant, plan in plans.items()}


class _Laboratory:
    """One small model, saved, and what was asked for it; tries one variant at a time."""

    def __init__(
        self,
        small: PreTrainedModel,
        source: Path,
        root: Path,
        *,
        skip: tuple[str, ...],
        embeddings: str,
        trust_remote_code: bool,
    ) -> None:
        self.weights = {name: value.clone() for name, value in small.state_dict().items()}
        self.generates = _failure(small) is None
        self.root, self.skip, self.embeddings = root, skip, embeddings
        self.trust_remote_code = trust_remote_code
        self.folder = source
        self.source = FolderSource(source, with_code=trust_remote_code)
        self.architecture = Architecture(source, trust_remote_code=trust_remote_code)

    def try_variant(self, full: VariantPlan) -> Trial:
        keep: dict[str, str] = {}
        decided = {tensor.name: isinstance(tensor.decision, Quantize) for tensor in full.tensors}
        kept_by_plan = {
            re.escape(tensor.name.rpartition(".")[0]): "kept by the plan"
            for tensor in full.tensors
            if not decided[tensor.name] and tensor.name.endswith(".weight")
        }
        for _ in range(2):
            plan = self._plan(full, {**kept_by_plan, **keep})
            otherwise = [
                tensor.name
                for tensor in plan.tensors
                if isinstance(tensor.decision, Quantize) != decided.get(tensor.name, False)
                and not _kept(keep, tensor.name)
            ]
            try:
                failing, failure = self._make_and_run(plan)
            except CheckpointError as error:
                return Trial(keep, refusal=str(error))
            except Exception as error:  # loading can raise anything
                return Trial(keep, refusal=self._cannot_load(error))
            if failure is None:
                untried = (
                    f"{len(otherwise)} weights, {otherwise[0]!r} among them" if otherwise else None
                )
                return Trial(keep, untried=untried)
            if not failing:
                return Trial(keep, refusal=failure.text)
            keep |= failing
        return Trial(keep, refusal=failure.text if failure else None)

    def _plan(self, full: VariantPlan, keep: Mapping[str, str]) -> VariantPlan:
        (plan,) = make_plan(
            self.source.layout(),
            self.architecture,
            [full.scheme],
            group_size=full.group_size,
            dtype=full.dtype_name,
            max_shard_size=10**9,
            skip=self.skip,
            embeddings=self.embeddings,
            keep={full.scheme.variant: keep},
            however_little=True,
        ).values()
        return plan

    def _make_and_run(self, plan: VariantPlan) -> "tuple[dict[str, str], _Failure | None]":
        """Modules that have to be kept for the variant to run, and its failure without that."""
        variant = plan.scheme.variant
        folder = self.root / variant
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with self.source.checkpoint() as checkpoint:
            written = quantize_checkpoint(
                checkpoint, {variant: plan}, {variant: folder}, advance=lambda n_bytes: None
            )[variant]
        finish_variant(
            folder,
            plan,
            written,
            source=self.source,
            config=self.architecture.config_dict,
            options={},
            source_bytes=0,
        )
        for path in self.folder.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
        model = load_model(
            folder,
            variant,
            device_map="cpu",
            trust_remote_code=self.trust_remote_code,
            prepare=lambda loaded: self._require_stored_values(loaded, plan),
        )
        failure = _failure(model, generate=self.generates)
        if failure is None:
            return {}, None
        return self._to_keep(model, plan, failure), failure

    def _cannot_load(self, error: Exception) -> str:
        return (
            f"{self.architecture.class_name} cannot be loaded quantized by transformers "
            f"{transformers.__version__}: {_first_line(error)}"
        )

    def _require_stored_values(self, loaded: PreTrainedModel, plan: VariantPlan) -> None:
        """Every unquantized weight is the source's, once loaded.

        Raises:
            CheckpointError: naming one that is not.
        """
        state = loaded.state_dict()
        for tensor in plan.tensors:
            if isinstance(tensor.decision, Quantize) or not tensor.parts:
                continue
            expected = self.weights[tensor.name].to(tensor.dtype)
            found = state.get(tensor.name)
            if found is None or not torch.equal(found.to(tensor.dtype), expected):
                raise CheckpointError(
                    f"{type(loaded).__name__} does not get back {tensor.name!r} as it is stored when a "
                    "quantized variant of it is loaded.",
                    hint="No variant of this architecture can be published.",
                )

    def _to_keep(
        self, model: PreTrainedModel, plan: VariantPlan, failure: "_Failure"
    ) -> dict[str, str]:
        """Patterns of modules that have to stay unquantized, in all layers; none where nothing helps."""
        quantized = [
            tensor.name.rpartition(".")[0]
            for tensor in plan.tensors
            if isinstance(tensor.decision, Quantize)
        ]
        keep: dict[str, str] = {}
        found: _Failure | None = failure
        while found is not None:
            below = [
                name
                for name in quantized
                if name == found.module or name.startswith(f"{found.module}.")
            ]
            kinds = list(dict.fromkeys(_kind(name) for name in below or quantized))
            kinds = [kind for kind in kinds if kind not in keep]
            for tried in [*([kind] for kind in kinds), kinds]:
                with self._unquantized(model, quantized, {*keep, *tried}):
                    again = _failure(model, generate=self.generates)
                if again is None or again.place != found.place:
                    keep |= dict.fromkeys(
                        tried, f"{found.class_name} does not run with it quantized"
                    )
                    found = again
                    break
            else:
                return {}
        return keep

    @contextmanager
    def _unquantized(
        self, model: PreTrainedModel, names: Iterable[str], kinds: set[str]
    ) -> Iterator[None]:
        """``model`` with the source's weights in modules of ``kinds``."""
        modules = {name: model.get_submodule(name) for name in names if _kind(name) in kinds}
        before = {name: module._parameters["weight"] for name, module in modules.items()}
        for name, module in modules.items():
            weight = self.weights[f"{name}.weight"].clone()
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            for name, module in modules.items():
                module._parameters["weight"] = before[name]


@dataclass(frozen=True)
class _Failure:
    """Where and how running a model failed."""

    module: str
    """The innermost that was entered and not left."""
    class_name: str
    text: str
    place: tuple[object, ...]
    """Equal where it is the same failure again."""


def _failure(model: PreTrainedModel, *, generate: bool = True) -> _Failure | None:
    """Why ``model`` does not run; None where it predicts and, if asked, generates."""
    entered: list[str] = []

    def leave(*_: object) -> None:
        entered.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))
        hooks.append(module.register_forward_hook(leave))
    prompt = _prompt(model)
    try:
        with torch.no_grad():
            logits = model(input_ids=prompt, use_cache=False).logits
            if not bool(torch.isfinite(logits).all()):
                return _Failure(
                    "", type(model).__name__, "What it predicts is not finite.", ("not finite",)
                )
            if generate:
                model.generate(prompt, max_new_tokens=_GENERATED, do_sample=False)
    except Exception as error:  # a model's own code may raise anything
        name = entered[-1] if entered else ""
        class_name = type(model.get_submodule(name)).__name__
        frames = tuple((f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__))
        text = f"{class_name} fails with quantized weights: {_first_line(error)}"
        return _Failure(name, class_name, text, (name, *frames, str(error)))
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _without_small_model(
    architecture: Architecture, configs: Sequence[PretrainedConfig], dtype: torch.dtype
) -> Trial:
    """What can be said where no small model runs in ``dtype``, which every variant computes in."""
    name = architecture.class_name
    if _small_model(type(architecture.model), configs, torch.float32) is not None:
        return Trial(
            refusal=f"{name} runs in float32 only: transformers' own code for it fails in "
            f"{str(dtype).removeprefix('torch.')}, quantized or not."
        )
    return Trial(untried=f"no small {name} could be built and run")


def _small_model(
    model_class: type[PreTrainedModel], configs: Iterable[PretrainedConfig], dtype: torch.dtype
) -> PreTrainedModel | None:
    """A fresh model that runs unquantized, of the first config that gives one; None where none does."""
    for given in configs:
        config = copy.deepcopy(given)  # building notes things in it
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class._from_config(config).parameters())
            if size > _LARGEST:
                continue
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * _NOISE)
            model.tie_weights()
            if _failure(model, generate=False) is None:
                return model
        except Exception:  # noqa: S112 - what a config that was only guessed at may raise
            continue
    return None


def _save(small: PreTrainedModel, folder: Path, source: Path, config: Mapping[str, Any]) -> Path:
    """``small`` as transformers saves it, beside the model's own code."""
    small.save_pretrained(folder)
    for path in source.glob("*.py"):
        if is_code(path.name):
            shutil.copyfile(path, folder / path.name)
    if "auto_map" in config:
        import json

        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**saved, "auto_map": config["auto_map"]}))
    return folder


def _prompt(model: PreTrainedModel) -> torch.Tensor:
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    rows = table.shape[0]
    return (torch.arange(3, 3 + _PROMPT) % rows).unsqueeze(0)


def _kind(module: str) -> str:
    """A pattern for ``module`` in every layer."""
    return re.sub(
        r"(?<=\.)\d+(?=\\?\.|$)", r"\\d+", re.escape(module).replace(r"\.", "."), count=1
    ).replace(".", r"\.")


def _kept(keep: Mapping[str, str], parameter: str) -> bool:
    module = parameter.rpartition(".")[0]
    return any(re.fullmatch(pattern, module) for pattern in keep)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """With a fixed seed, one thread, and without transformers' words about a model that is not the user's.

    Threads wait for one another longer than a small model computes.
    """
    verbosity, threads = transformers_logging.get_verbosity(), torch.get_num_threads()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
