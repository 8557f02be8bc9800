"""torchao's own quantization of a model in memory, of the layers that a variant has quantized."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import quant_api, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel

from smolquant.record import VariantRecord
from smolquant.schemes import SCHEMES

_ROW_MULTIPLE = 16
"""The rows that torch's int4 kernel for CPUs computes at a time."""


def quantize_in_memory(source: PreTrainedModel, variant: nn.Module, record: VariantRecord) -> None:
    """Quantize ``source``, in place, where ``variant`` has a quantized weight; by torchao alone.

    Args:
        source: the unquantized model, in the dtype of the variant.
        variant: as it is loaded.
    """
    quantized = {
        name.rpartition(".")[0]: parameter
        for name, parameter in variant.named_parameters()
        if isinstance(parameter.data, TorchAOBaseTensor)
    }
    source.config._is_quantized = (
        True  # some families' code computes otherwise then, as Falcon Mamba's
    )
    if record.quant_type == "int4_weight_only":
        for name, weight in quantized.items():
            module = source.get_submodule(name)
            module.weight = nn.Parameter(
                _int4(module.weight.data, list(weight.block_size)), requires_grad=False
            )
        return
    # float8's dynamic config insists on a GPU, though torch has a slow stand-in for its kernel on the CPU.
    check: Any = quant_api._check_hardware_support
    quant_api._check_hardware_support = lambda granularities: None
    try:
        quantize_(
            source,
            SCHEMES[record.quant_type].torchao_config(128),
            filter_fn=lambda module, name: name in quantized,
        )
    finally:
        quant_api._check_hardware_support = check


def _int4(weight: torch.Tensor, block_size: list[int]) -> torch.Tensor:
    """torchao's int4 weight for this CPU; rows of zeros fill up what its kernel wants more of."""
    rows = weight.shape[0]
    padded = functional.pad(weight, (0, 0, 0, -rows % _ROW_MULTIPLE))
    made = Int4OpaqueTensor.from_hp(padded, block_size)
    return Int4OpaqueTensor(
        qdata=made.qdata,
        scale_and_zero=made.scale_and_zero,
        block_size=block_size,
        shape=weight.shape,
        act_pre_scale=None,
    )
