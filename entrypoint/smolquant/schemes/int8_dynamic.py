"""int8 weights, and activations quantized to int8 per token while the model runs."""

from typing import TYPE_CHECKING, Any, ClassVar

from smolquant.schemes.int8_weight_only import Int8WeightOnly
from smolquant.schemes.per_row import granularity

if TYPE_CHECKING:
    import torch


class Int8Dynamic(Int8WeightOnly):
    """torchao's ``Int8DynamicActivationInt8WeightConfig``; its weights are those of int8_weight_only."""

    quant_type: ClassVar = "int8_dynamic"
    variant: ClassVar = "int8_dynamic"
    title: ClassVar = "int8 weights, int8 activations chosen per token at run time"
    best_for: ClassVar = "hardware with int8 matrix units and large batches or long prompts"
    in_both: ClassVar = False
    stores_tables: ClassVar = False
    layer_memory: ClassVar = 2.0  # the int32 copies that torchao makes of one weight

    def gentler(self, group_size: int) -> tuple[str, ...]:
        return (
            f"--quant-type {Int8WeightOnly.quant_type} (the same weights; activations stay as they are)",
        )

    def torchao_config(self, group_size: int, *, transposed: bool = False) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig(
            granularity=[granularity(transposed=False), granularity(transposed=True)]
            if transposed
            else granularity(transposed=False)
        )

    def quantize(
        self, weight: "torch.Tensor", group_size: int | None, *, transposed: bool = False
    ) -> "torch.Tensor":
        from torchao.quantization import Int8Tensor
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        quantized: torch.Tensor = Int8Tensor.from_hp(
            weight,
            granularity=granularity(transposed=transposed),
            act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=granularity(transposed=False)),
        )
        return quantized
