"""Before the work: a small model of the same architecture, quantized, loaded and run as users will.

Not every model's own code takes a quantized weight: some multiply with ``weight.T``, some change weights
in place. That shows on a model of two layers in a second or two as well as on the real one after hours.
Nothing here knows a family by name: what fails is found by running it, and kept where that helps.

What cannot be tried is left as it is planned, and said: neither a slow machine nor a fault of the trial's
own stops a run, and neither decides about a byte.
"""

import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from torchao.utils import TorchAOBaseTensor
from transformers import PretrainedConfig, PreTrainedModel

from smolquant.checkpoint.folder import FolderSource
from smolquant.memory import is_out_of_memory
from smolquant.model.architecture import Architecture
from smolquant.model.shrink import smaller_configs
from smolquant.names import pattern_in_every_layer
from smolquant.quantize.engine import quantize_checkpoint
from smolquant.quantize.plan import make_plan
from smolquant.quantize.planned import VariantPlan
from smolquant.quantize.small_model import (
    Deadline,
    Failure,
    OutOfTime,
    failure_of,
    first_line,
    save,
    small_model,
    undisturbed,
)
from smolquant.quantize.variant import finish_variant
from smolquant.runtime.kernels import has_kernels, use_kernels
from smolquant.runtime.load import load_model
from smolquant.schemes import SCHEMES, Quantize

SECONDS = 15.0
"""For all variants of a run."""

_NOT_LOADED = "transformers does not load it quantized"

_HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Trial:
    """What the small model showed of one variant."""

    keep: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions of whole module names -> why they have to stay unquantized."""
    refusal: str = ""
    """Why the variant would be of no use, a sentence; empty where it runs, :attr:`keep` kept."""
    hint: str = "Choose another scheme, or do not quantize this model."
    """What to do about a refusal."""
    untried: str = ""
    """Why nothing can be said, or what the small model could not show; empty where all was tried."""


def try_variants(
    architecture: Architecture,
    plans: Mapping[str, VariantPlan],
    folder: Path,
    *,
    skip: Sequence[str] = (),
    embeddings: str = "source",
    trust_remote_code: bool = False,
    seconds: float = SECONDS,
) -> dict[str, Trial]:
    """Try every planned variant on a small model.

    Args:
        plans: variant -> its plan for the real checkpoint.
        folder: the source's, for a model's own code.
        skip: as the plans were made with.
        embeddings: as the plans were made with.
        trust_remote_code: run the model's own code.
        seconds: what is not tried by then is not tried.

    Returns:
        Variant -> what was found. A plan is to be made again with what has to be kept.
    """
    found: dict[str, Trial] = {}
    untried = "nothing was planned"
    try:
        with _temporary_folder() as root, undisturbed():
            deadline = Deadline(seconds)
            plan = next(iter(plans.values()))  # dtype and group size are those of all
            configs = list(
                smaller_configs(architecture.model, architecture.language_model, plan.group_size)
            )
            build = partial(small_model, type(architecture.model), configs, plan.dtype, deadline)
            small, not_run = build(), ""
            if small is None:
                verdict = _without_small_model(architecture, configs, plan.dtype, deadline)
                not_run, small = verdict.untried, build(runs=False)
                if verdict.refusal or small is None:
                    return dict.fromkeys(plans, verdict)
            source = save(small, root / "source", folder, architecture.config_dict)
            laboratory = _Laboratory(
                small,
                source,
                deadline,
                skip=tuple(skip),
                embeddings=embeddings,
                trust_remote_code=trust_remote_code,
                not_run=not_run,
            )
            for variant, plan in plans.items():
                found[variant] = _unless_it_breaks(laboratory, plan)
    except OutOfTime:
        untried = f"that took more than {seconds:g} seconds"
    except Exception as error:  # whatever it is, it is about the trial and not about the model
        untried = _told(error)
    return {variant: found.get(variant, Trial(untried=untried)) for variant in plans}


def _unless_it_breaks(laboratory: "_Laboratory", plan: VariantPlan) -> Trial:
    try:
        return laboratory.try_variant(plan)
    except Exception as error:  # as above: the other variants may still be tried
        return Trial(untried=_told(error))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="smolquant-trial-", ignore_cleanup_errors=True) as name:
        yield Path(name)


class _NotAsStored(Exception):
    """A loaded model's weight is not the one in the file."""


class _NotQuantized(Exception):
    """transformers does not find quantized weights of a variant under the names that torchao gives them."""

    def __init__(self, class_name: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{class_name} does not get back {names[0]!r} when a variant with it quantized is loaded."
        )
        self.modules = [name.rpartition(".")[0] for name in names]


class _Laboratory:
    """One small model, saved, and what was asked for it; tries one variant at a time."""

    def __init__(
        self,
        small: PreTrainedModel,
        source: Path,
        deadline: Deadline,
        *,
        skip: tuple[str, ...],
        embeddings: str,
        trust_remote_code: bool,
        not_run: str,
    ) -> None:
        """``not_run``: why it can only be loaded and not run; empty where it can."""
        self.not_run = not_run
        self.weights = {name: value.clone() for name, value in small.state_dict().items()}
        self.deadline = deadline
        self.failure_of = partial(failure_of, deadline=deadline)
        self.generates = self.failure_of(small) is None
        self.skip, self.embeddings = skip, embeddings
        self.trust_remote_code = trust_remote_code
        self.folder = source
        self.source = FolderSource(source, with_code=trust_remote_code)
        self.architecture = Architecture(source, trust_remote_code=trust_remote_code)

    def try_variant(self, full: VariantPlan) -> Trial:
        """Make the variant of the small model, and make it again with what had to be kept.

        Raises:
            OutOfTime: the deadline has come.
            Exception: the small model itself is of no use.
        """
        decided = {tensor.name: isinstance(tensor.decision, Quantize) for tensor in full.tensors}
        kept_by_plan = {
            re.escape(tensor.name.removesuffix(".weight")): "kept by the plan"
            for tensor in full.tensors
            if tensor.name in self.weights  # the small model has few of the layers
            and not decided[tensor.name]
            and (tensor.name.endswith(".weight") or tensor.kind == "expert")
        }
        keep: dict[str, str] = {}
        refusal = ""
        for _ in range(3):
            self.deadline.check()
            plan = self._plan(full, {**kept_by_plan, **keep})
            with self._made(plan) as folder:
                try:
                    model = self._load(folder, plan)
                except _NotQuantized as lost:
                    refusal = str(lost)
                    keep |= dict.fromkeys(map(pattern_in_every_layer, lost.modules), _NOT_LOADED)
                    continue
                except Exception as error:
                    return self._cannot_load(error, keep)
            if self.not_run:
                return Trial(keep, untried=self.not_run)
            failure = self.failure_of(model, generate=self.generates)
            if failure is None:
                return Trial(keep, untried=_otherwise(plan, decided, keep))
            refusal = f"{failure.text.rstrip('.')}."
            failing = self._to_keep(model, plan, failure)
            if not failing:
                break
            keep |= failing
        return Trial(keep, refusal=refusal)

    def _plan(self, full: VariantPlan, keep: Mapping[str, str]) -> VariantPlan:
        (plan,) = make_plan(
            self.architecture.converted(self.source.layout()),
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

    @contextmanager
    def _made(self, plan: VariantPlan) -> Iterator[Path]:
        """The folder of a variant as it will be published, beside the model's own code."""
        variant = plan.scheme.variant
        with _temporary_folder() as folder:
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
            yield folder

    def _load(self, folder: Path, plan: VariantPlan) -> PreTrainedModel:
        """The model as users load it, ready to run on a CPU."""
        kept = {
            tensor.name: tensor.dtype
            for tensor in plan.tensors
            if tensor.parts and not isinstance(tensor.decision, Quantize)
        }
        quantized = [one.name for one in plan.tensors if isinstance(one.decision, Quantize)]
        model = load_model(
            folder,
            plan.scheme,
            "cpu",
            trust_remote_code=self.trust_remote_code,
            prepare=lambda loaded: self._require_stored_values(loaded, kept, quantized),
        )
        if has_kernels(plan.scheme, "cpu"):
            use_kernels(model)
        else:
            self._stand_in(model, plan)
        return model

    def _stand_in(self, model: PreTrainedModel, plan: VariantPlan) -> None:
        """Weights that a CPU runs, in place of those that it cannot.

        What a model's own code does to its weights, a weight of one kind takes as badly as one of another.
        """
        scheme = next(scheme for scheme in SCHEMES.values() if has_kernels(scheme, "cpu"))
        for tensor in plan.tensors:
            if tensor.scheme is plan.scheme:
                weight = self.weights[tensor.name].to(tensor.dtype)
                stand_in = scheme.quantize(weight, None, transposed=tensor.transposed)
                module, _, attribute = tensor.name.rpartition(".")
                parameters = model.get_submodule(module)._parameters
                parameters[attribute] = nn.Parameter(stand_in, requires_grad=False)

    def _require_stored_values(
        self,
        loaded: PreTrainedModel,
        kept: Mapping[str, torch.dtype],
        quantized: Collection[str] = (),
    ) -> None:
        """Every unquantized weight is the source's, once loaded, and every quantized one is quantized.

        Args:
            kept: weight -> the dtype that it is stored in.

        Raises:
            _NotAsStored: naming one that is not the source's.
            _NotQuantized: naming the modules whose weights are not loaded.
        """
        state = loaded.state_dict()
        lost = [name for name in quantized if not isinstance(state.get(name), TorchAOBaseTensor)]
        if lost:
            raise _NotQuantized(type(loaded).__name__, lost)
        for name, dtype in kept.items():
            found = state.get(name)
            if found is None or not torch.equal(found.to(dtype), self.weights[name].to(dtype)):
                raise _NotAsStored(
                    f"{type(loaded).__name__} does not get back {name!r} as it is stored when a quantized "
                    "variant of it is loaded."
                )

    def _cannot_load(self, error: Exception, keep: Mapping[str, str]) -> Trial:
        """What it means that a quantized variant cannot be loaded.

        Raises:
            Exception: ``error``, where the small model cannot be loaded unquantized either.
        """
        if isinstance(error, OSError) or is_out_of_memory(error) or not self._comes_back():
            raise error
        if isinstance(error, _NotAsStored):
            return Trial(keep, refusal=str(error))
        return Trial(
            keep,
            refusal=f"{self.architecture.class_name} cannot be loaded quantized by transformers "
            f"{transformers.__version__}: {first_line(error).rstrip('.')}.",
        )

    def _comes_back(self) -> bool:
        """Whether the small model, unquantized, is loaded as it was saved."""
        self.deadline.check()
        dtypes = {name: weight.dtype for name, weight in self.weights.items()}
        try:
            load_model(
                self.folder,
                next(iter(SCHEMES.values())),
                "cpu",
                trust_remote_code=self.trust_remote_code,
                prepare=lambda loaded: self._require_stored_values(loaded, dtypes),
            )
        except Exception:
            return False
        return True

    def _to_keep(
        self, model: PreTrainedModel, plan: VariantPlan, failure: Failure
    ) -> dict[str, str]:
        """Patterns of modules that have to stay unquantized, in all layers; none where nothing helps."""
        quantized = [
            tensor.name for tensor in plan.tensors if isinstance(tensor.decision, Quantize)
        ]
        keep: dict[str, str] = {}
        found: Failure | None = failure
        while found is not None:
            below = [name for name in quantized if name.startswith(f"{found.module}.")]
            kinds = list(dict.fromkeys(map(_module_kind, below or quantized)))
            kinds = [kind for kind in kinds if kind not in keep]
            for tried in [*([kind] for kind in kinds), kinds]:
                with self._unquantized(model, quantized, {*keep, *tried}):
                    again = self.failure_of(model, generate=self.generates)
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
        """``model`` with the source's weights, of those of ``names``, in modules of ``kinds``."""
        before: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]] = []
        for name in names:
            if _module_kind(name) in kinds:
                module, _, attribute = name.rpartition(".")
                parameters = model.get_submodule(module)._parameters
                before.append((parameters, attribute, parameters[attribute]))
                weight = self.weights[name].clone()
                parameters[attribute] = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            for parameters, attribute, weight in before:
                parameters[attribute] = weight


def _without_small_model(
    architecture: Architecture,
    configs: Sequence[PretrainedConfig],
    dtype: torch.dtype,
    deadline: Deadline,
) -> Trial:
    """What can be said where no small model runs in ``dtype``, which every variant computes in."""
    name, fails_in = architecture.class_name, str(dtype).removeprefix("torch.")
    for other in (*(half for half in _HALF_PRECISION if half is not dtype), torch.float32):
        if small_model(type(architecture.model), configs, other, deadline) is None:
            continue
        if other in _HALF_PRECISION:
            use = str(other).removeprefix("torch.")
            return Trial(
                refusal=f"{name} does not run in {fails_in}, quantized or not.",
                hint=f"Use --dtype {use}.",
            )
        return Trial(
            refusal=f"{name} runs in float32 only: its code fails in {fails_in}, quantized or not, and "
            "what a variant does not quantize is stored in 16 bits.",
            hint="Do not quantize this model.",
        )
    return Trial(untried=f"no small {name} could be built and run on text")


def _otherwise(plan: VariantPlan, decided: Mapping[str, bool], keep: Mapping[str, str]) -> str:
    """The weights about which the small model's plan decides otherwise; empty where there are none."""
    names = [
        tensor.name
        for tensor in plan.tensors
        if isinstance(tensor.decision, Quantize) != decided.get(tensor.name, False)
        and not any(re.fullmatch(kind, tensor.name.removesuffix(".weight")) for kind in keep)
    ]
    if not names:
        return ""
    return f"the small model decides otherwise about {len(names)} weights, {names[0]!r} among them"


def _module_kind(weight: str) -> str:
    """A pattern for the module of ``weight``, or a stack of experts itself, in every layer."""
    return pattern_in_every_layer(weight.removesuffix(".weight"))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
