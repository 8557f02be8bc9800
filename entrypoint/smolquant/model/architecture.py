"""The model that transformers would build from a config, on the meta device: shapes, no weights.

It answers, per checkpoint tensor, which parameter it becomes and what that parameter is for, by asking
transformers' own loader and quantizer. It knows nothing of schemes or files.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smolquant.checkpoint.tensors import Layout, SourceTensor, pieces_of
from smolquant.errors import CheckpointError
from smolquant.model.config import read_config
from smolquant.model.conversion import converted_layout
from smolquant.model.norms import Norm, is_norm, norms_in_front
from smolquant.model.task import auto_class, check_built, task_of
from smolquant.model.trunk import language_model, trunk_of
from smolquant.model.unplaced import Unplaced, fate_of
from smolquant.record import IMAGE_TEXT_TO_TEXT, TensorKind
from smolquant.text import error_words

_REMOTE_CODE_HINT = (
    "Read the code that the repository brings along; if you trust it, add --trust-remote-code."
)

_SKELETON_DTYPE = torch.bfloat16
"""What is float32 all the same, when the model is built, is so by its own code."""


_ROUTERS = ("gate", "router")
"""transformers' names, beside the experts of a layer, for what chooses among them."""


@dataclass(frozen=True)
class Parameter:
    """What a checkpoint tensor becomes in the model."""

    name: str
    shape: tuple[int, ...]
    kind: TensorKind
    """What the module that owns it is."""
    keep_reason: str
    """Why it is not a linear weight to quantize; empty when it is one."""
    module: str
    """Full name of the module that owns it."""
    outside_layers: bool
    """Embedding or output head: kept by design, not counted as a shortcoming."""
    is_vocabulary: bool
    """A table with a row for every token, which is looked up or is the output head."""
    beside_language: bool = False
    """It belongs to what sees or hears, and not to the language model: kept by design."""
    is_linear: bool = False
    """The weight of a linear layer, whether it is to be quantized or not."""
    contracts_rows: bool = False
    """Of a stack of experts: it is multiplied from the right, so that a matrix of it is (K, N) and not
    (N, K) as a linear layer's weight is."""
    is_buffer: bool = False
    """It is no weight, but what a module computes or counts."""

    @property
    def what(self) -> str:
        """What is quantized or kept: its module, or itself where it is one of several in a module."""
        return self.name.removesuffix(".weight")


class Architecture:
    """The skeleton of a model that generates text, and transformers' rules for loading into it."""

    def __init__(self, folder: Path, *, trust_remote_code: bool) -> None:
        """Build the skeleton from ``folder``'s config.

        Raises:
            CheckpointError: unknown architecture, remote code needed, a model for something other than
                generating text, quantized already, or one that stock transformers cannot run quantized.
        """
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.quantizers.base import HfQuantizer

        self.config_dict = read_config(folder)
        self.quantizer = take_quantizer(self.config_dict)
        """The quantizer that the config names, and that is left out of it here; empty for none. Whether the
        weights are its own, only they can tell."""
        self.task = task_of(self.config_dict)
        model = _build(folder, self.config_dict, trust_remote_code)
        assert isinstance(model, PreTrainedModel)
        model.eval()  # not all code of a model's own returns it
        self.remarks = tuple(check_built(self.config_dict, model))
        """What users should know of how the model was understood, in sentences."""
        self.model = model
        self.class_name = type(model).__name__
        self._parameters = dict(model.state_dict())
        self._buffers = {name for name, _ in model.named_buffers()}
        self._modules = dict(model.named_modules())
        transforms = get_model_conversion_mapping(model)
        self._renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        self._converters = [item for item in transforms if isinstance(item, WeightConverter)]
        self._known: dict[str, Parameter | None] = {}
        """Tensors that were asked for already."""
        self._new_names: dict[str, tuple[str, str | None]] = {}
        """Names that were renamed already; each takes a search of all renamings."""
        self.default_skips: list[str] = sorted(HfQuantizer.get_modules_to_not_convert(model))
        self._head = model.get_output_embeddings()
        self.language_model, others = language_model(model, sees=self.task == IMAGE_TEXT_TO_TEXT)
        """What reads and writes text: all of the model, or the part that is neither eyes nor ears."""
        self._in_language = {*self.language_model.modules(), self._head} - others

    def parameter(self, checkpoint_name: str) -> Parameter | None:
        """What ``checkpoint_name`` is loaded into; None for a tensor that the model has no place for.

        Args:
            checkpoint_name: the name of a tensor of a :meth:`converted` layout.
        """
        if checkpoint_name not in self._known:
            self._known[checkpoint_name] = self._found(checkpoint_name)
        return self._known[checkpoint_name]

    def _found(self, checkpoint_name: str) -> Parameter | None:
        name, _ = self._renamed(checkpoint_name)
        if name not in self._parameters:
            return None
        module_name = name.rpartition(".")[0]
        return Parameter(
            name=name,
            shape=tuple(self._parameters[name].shape),
            kind=self._kind(name),
            keep_reason=self._keep_reason(name),
            module=module_name,
            outside_layers=self._is_outside_layers(module_name),
            is_vocabulary=name.endswith(".weight") and self._is_vocabulary(module_name),
            beside_language=self._is_beside_language(module_name),
            is_linear=name.endswith(".weight")
            and isinstance(self._modules[module_name], nn.Linear)
            and self._modules[module_name] is not self._head,
            contracts_rows=self._is_stack_of_experts(name) and self._contracts_rows(module_name),
            is_buffer=name in self._buffers,
        )

    def converted(self, layout: Layout) -> Layout:
        """``layout`` with one tensor for each parameter, where transformers makes it of several.

        Raises:
            CheckpointError: tensors do not fit together.
        """
        return converted_layout(layout, self.model, self._renamed, self._converters)

    def unplaced(self, tensor: SourceTensor) -> Unplaced | None:
        """The fate of a tensor that the model has no place for; None where it must not be passed over."""
        layers, n_layers = self._layers
        return fate_of(
            tensor,
            self._renamed(tensor.name)[0],
            layers=layers,
            n_layers=n_layers,
            ignored=self._ignored_names,
        )

    @cached_property
    def _layers(self) -> tuple[str | None, int]:
        """The name of the list of layers, None where there is none, and how many there are."""
        try:
            _, layers = trunk_of(self.language_model)
        except NotImplementedError:
            return None, 0
        return next(name for name, module in self._modules.items() if module is layers), len(layers)

    def _renamed(self, checkpoint_name: str) -> tuple[str, str | None]:
        """The parameter that transformers fills from a tensor, and the pattern of what converts it."""
        if checkpoint_name not in self._new_names:
            self._new_names[checkpoint_name] = self._rename(checkpoint_name)
        return self._new_names[checkpoint_name]

    def _rename(self, checkpoint_name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        name, converter = rename_source_key(
            checkpoint_name,
            self._renamings,
            self._converters,
            self.model.base_model_prefix,
            self._parameters,
        )
        if name not in self._parameters and checkpoint_name in self._parameters:
            return checkpoint_name, None
        return name, converter

    def name_in_files(self, part: str, source: SourceTensor) -> str:
        """The name under which a variant's files hold a part of a quantized parameter.

        transformers renames what it finds there as it does a checkpoint's tensors, and some of its
        renamings change a name of the model's own once more. There the part stands where its source does.

        Args:
            part: its name in the model, as torchao makes it.
        """
        if not self._renamings or self._renamed(part)[0] == part:
            return part
        attribute = part.rpartition(".")[2]
        path = pieces_of(source)[0].name.split(".")
        names = (".".join([*path[:n], attribute]) for n in range(len(path) - 1, 0, -1))
        return next((name for name in names if self._renamed(name) == (part, None)), part)

    def name_in_model(self, name: str) -> str:
        """What transformers makes of a name in a variant's files."""
        return self._renamed(name)[0] if self._renamings else name

    @cached_property
    def _ignored_names(self) -> Set[str]:
        """Patterns of names that stock transformers ignores when it loads them into this model."""
        return frozenset(self.model._keys_to_ignore_on_load_unexpected or ())

    def missing(self, loaded: set[str]) -> list[str]:
        """Parameters that no checkpoint tensor fills and that are not tied to one that is."""
        return sorted(set(self._parameters) - loaded - set(self.ties_of_names) - self._buffers)

    @property
    def ties_of_names(self) -> Mapping[str, str]:
        """Parameter -> the one that transformers fills it from, where a checkpoint has only that."""
        tied: Mapping[str, str] = self.model.all_tied_weights_keys
        return tied

    def ties(self, one: Parameter | None, other: Parameter | None) -> bool:
        """Whether transformers fills one of the two from the other, so that either is enough."""
        tied = self.ties_of_names
        return (
            one is not None
            and other is not None
            and (tied.get(one.name) == other.name or tied.get(other.name) == one.name)
        )

    @cached_property
    def norms_in_front(self) -> Mapping[str, Norm]:
        """Maps a linear weight to the norm whose output it is multiplied with."""
        return norms_in_front(self.model)

    def stored_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """``dtype``, but float32 where the architecture asks for it.

        It does so by ``_keep_in_fp32_modules``, or by making a parameter in float32 whatever the model's
        dtype, as Olmo Hybrid its decay rates.
        """
        from transformers.core_model_loading import build_glob_alternation

        made = self._parameters.get(name)
        if made is not None and made.dtype == torch.float32:
            return torch.float32
        plan: dict[str, torch.dtype] = self.model._get_dtype_plan(dtype)
        if not plan:
            return dtype
        pattern, by_group, _ = build_glob_alternation(list(plan))
        match = pattern.search(name)
        return dtype if match is None else plan[by_group[match.lastgroup]]

    def _is_outside_layers(self, module_name: str) -> bool:
        module = self._modules[module_name]
        return isinstance(module, nn.Embedding) or module is self._head

    def _is_beside_language(self, module_name: str) -> bool:
        return self._modules[module_name] not in self._in_language

    def _is_vocabulary(self, module_name: str) -> bool:
        # What a model makes of its own kind of table (Gemma's scales what it looks up) stock
        # transformers does not load quantized; and a tied head is that table.
        table = self.model.get_input_embeddings()
        if type(table) is not nn.Embedding:
            return False
        return self._modules[module_name] in {table, self._head}

    def _kind(self, name: str) -> TensorKind:
        module_name = name.rpartition(".")[0]
        module = self._modules[module_name]
        if module not in self._in_language:
            return "other"
        if module is self._head:
            return "output head"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, nn.Linear):
            return self._kind_of_linear(name)
        if self._is_stack_of_experts(name):
            return "expert"
        return "norm" if is_norm(module) else "other"

    def _kind_of_linear(self, name: str) -> TensorKind:
        from transformers.quantizers.quantizers_utils import should_convert_module

        if not should_convert_module(name, self.default_skips):
            return "output head"
        # transformers' own name for what a router chooses from, in every family that has them.
        return "expert" if "experts" in name.split(".") else "linear"

    def _is_stack_of_experts(self, name: str) -> bool:
        """Whether ``name`` is one matrix for each of several experts."""
        module = self._modules[name.rpartition(".")[0]]
        return self._parameters[name].ndim == 3 and "Experts" in type(module).__name__

    @cached_property
    def _routers(self) -> Set[nn.Module]:
        """Linear layers that choose among experts, or say how much the shared one counts.

        They lie beside the experts and have one output for each, or one in all; and whatever else is in
        what transformers calls the gate or the router.
        """
        routers: set[nn.Module] = set()
        for block in self._modules.values():
            n_experts = max(map(self._n_experts, block.children()), default=0)
            for name, beside in block.named_children() if n_experts else ():
                linears = {one for one in beside.modules() if isinstance(one, nn.Linear)}
                chooses = all(one.out_features in (1, n_experts) for one in linears)
                if not self._n_experts(beside) and (chooses or name in _ROUTERS):
                    routers |= linears
        return routers

    @staticmethod
    def _n_experts(module: nn.Module) -> int:
        """How many experts ``module`` is; 0 where it is something else."""
        if isinstance(module, nn.ModuleList):
            names = {type(expert).__name__ for expert in module}
            is_mixture = len(names) == 1 and any("Expert" in name for name in names)
            return len(module) if is_mixture else 0
        stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        return len(stacks[0]) if stacks and "Experts" in type(module).__name__ else 0

    def _contracts_rows(self, module_name: str) -> bool:
        """Whether the stacks of a module of experts are multiplied from the right.

        transformers' own interface for experts says so. Of a module that does not use it, the place of the
        hidden size tells: it is what all but the last projection read, and what that one writes.
        """
        module = self._modules[module_name]
        if hasattr(module, "is_transposed"):
            return bool(module.is_transposed)
        hidden = self.model.config.get_text_config(decoder=True).hidden_size
        for attribute, stack in module.named_parameters(recurse=False):
            told = "down" in attribute or "up" in attribute or "gate" in attribute
            if told and stack.ndim == 3 and stack.shape[1] != stack.shape[2]:
                reads_hidden = "down" not in attribute
                if hidden in stack.shape[1:]:
                    return (stack.shape[1] == hidden) is reads_hidden
        return False

    def _keep_reason(self, name: str) -> str:
        module_name, _, attribute = name.rpartition(".")
        kind = self._kind(name)
        if name in self._buffers:
            return "buffer"
        if self._is_beside_language(module_name):
            return f"not of the language model ({self._part(module_name)})"
        if self._is_outside_layers(module_name):
            return kind
        if attribute == "bias":
            return "bias"
        return self._keep_reason_in_layers(name)

    def _keep_reason_in_layers(self, name: str) -> str:
        module_name, _, attribute = name.rpartition(".")
        module, kind = self._modules[module_name], self._kind(name)
        if module in self._routers:
            return "a router among experts, which decides with few numbers"
        if self._is_stack_of_experts(name):
            return ""
        if isinstance(module, nn.Linear) and attribute == "weight":
            return "" if kind in ("linear", "expert") else kind
        return "norm" if is_norm(module) else f"not a linear layer ({type(module).__name__})"

    def _part(self, module_name: str) -> str:
        """The largest part of the model that holds a module and nothing of the language model."""
        parts = module_name.split(".")
        for length in range(1, len(parts)):
            name = ".".join(parts[:length])
            if self._in_language.isdisjoint(self._modules[name].modules()):
                return name
        return module_name


def take_quantizer(config: dict[str, Any]) -> str:
    """Take what quantizers have left in a config out of it, and return the name of one; empty for none."""
    found = ""
    for key in ("quantization_config", "compression_config"):
        entry = config.pop(key, None)
        if entry is not None and not found:
            found = _name_of_quantizer(entry)
    for part in config.values():
        if isinstance(part, dict):
            found = found or take_quantizer(part)
    return found


def _name_of_quantizer(entry: Any) -> str:
    entry = entry if isinstance(entry, dict) else {}
    of_bitsandbytes = any(key.startswith(("load_in_", "_load_in_", "bnb_")) for key in entry)
    return str(entry.get("quant_method") or ("bitsandbytes" if of_bitsandbytes else "unknown"))


def _build(folder: Path, config_dict: Mapping[str, Any], trust_remote_code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        for part in (config, config.get_text_config()):
            part.__dict__.pop(
                "quantization_config", None
            )  # whether it holds is seen by the weights
        with torch.device("meta"), no_init_weights():  # which would take as long as building does
            model = auto_class(config_dict).from_config(
                config, trust_remote_code=trust_remote_code, dtype=_SKELETON_DTYPE
            )
        model.tie_weights(recompute_mapping=False)  # goes with it
        return model
    except Exception as error:  # a config can make transformers raise anything
        raise _refusal(config_dict, error) from error


def _refusal(config: Mapping[str, Any], error: Exception) -> CheckpointError:
    import transformers

    model_type = config.get("model_type")
    if "trust_remote_code" in str(error):
        return CheckpointError(
            f"The model needs code of its own to be built (model type {model_type!r}), and running "
            "code from a repository is off.",
            hint=_REMOTE_CODE_HINT,
        )
    if "does not recognize this architecture" in str(error) or model_type is None:
        return CheckpointError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}.",
            hint="Check config.json, or use a release of smolquant with a newer transformers.",
        )
    if "Unrecognized configuration class" in str(error):
        return CheckpointError(
            f"The model type {model_type!r} is not a causal language model.",
            hint="smolquant quantizes models that AutoModelForCausalLM or AutoModelForImageTextToText "
            "loads.",
        )
    return CheckpointError(
        f"transformers {transformers.__version__} cannot build the model from config.json: "
        f"{error_words(error)}.",
        hint="Check config.json against the transformers version that saved it.",
    )
