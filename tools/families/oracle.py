"""torchao's own quantization of a model in memory, of the layers that a variant has quantized."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import FqnToConfig, quant_api, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel

from smolquant.record import VariantRecord
from smolquant.runtime.stacks import each_expert
from smolquant.schemes import SCHEMES, Scheme

_ROW_MULTIPLE = 16
"""The rows that torch's int4 kernel for CPUs computes at a time."""


def quantize_in_memory(source: PreTrainedModel, variant: nn.Module, record: VariantRecord) -> None:
    """Quantize ``source``, in place, where ``variant`` has a quantized weight; by torchao alone.

    Args:
        source: the unquantized model, in the dtype of the variant.
        variant: as it is loaded.
    """
    quantized: dict[str, Any] = {
        name: parameter
        for name, parameter in variant.named_parameters()
        if isinstance(parameter.data, TorchAOBaseTensor)
    }
    source.config._is_quantized = (
        True  # some families' code computes otherwise then, as Falcon Mamba's
    )
    if record.quant_type == "int4_weight_only":
        # Llama 4's module of experts does not say that it multiplies from the right; its record does.
        transposes = {name for name, one in record.tensors.items() if one.transposed}
        for name, weight in quantized.items():
            module_name, _, attribute = name.rpartition(".")
            module = source.get_submodule(module_name)
            # A stack that is multiplied from the right is stored as transposes.
            pack = each_expert(partial(_int4, group_size=weight.block_size[-1]))
            data = module._parameters[attribute].data
            from_the_right = getattr(module, "is_transposed", name in transposes)
            made = pack(data.mT.contiguous() if from_the_right else data)
            module._parameters[attribute] = nn.Parameter(made, requires_grad=False)
        return
    # float8's dynamic config insists on a GPU, though torch has a slow stand-in for its kernel on the CPU.
    check: Any = quant_api._check_hardware_support
    quant_api._check_hardware_support = lambda granularities: None
    try:
        _by_config(source, quantized, SCHEMES[record.quant_type])
    finally:
        quant_api._check_hardware_support = check


def _by_config(source: nn.Module, quantized: Mapping[str, torch.Tensor], scheme: Scheme) -> None:
    linears = {name.removesuffix(".weight") for name, one in quantized.items() if one.ndim == 2}
    quantize_(source, scheme.torchao_config(128), filter_fn=lambda _, name: name in linears)
    stacks = {
        name: scheme.torchao_config(128, transposed=is_transposed(one))
        for name, one in quantized.items()
        if one.ndim == 3
    }
    if stacks:
        quantize_(source, FqnToConfig(stacks), filter_fn=None)


def is_transposed(weight: Any) -> bool:
    """Whether a stored stack of experts has a scale a column of each matrix, (K, N)."""
    return weight.ndim == 3 and list(weight.block_size[1:]) == [weight.shape[1], 1]


def _int4(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """torchao's int4 weight for this CPU; rows of zeros fill up what its kernel wants more of."""
    rows = weight.shape[0]
    padded = functional.pad(weight, (0, 0, 0, -rows % _ROW_MULTIPLE))
    made = Int4OpaqueTensor.from_hp(padded, [1, group_size])
    packed: torch.Tensor = Int4OpaqueTensor(
        qdata=made.qdata,
        scale_and_zero=made.scale_and_zero,
        block_size=[1, group_size],
        shape=weight.shape,
        act_pre_scale=None,
    )
    return packed
