"""float8 weights, and activations quantized to float8 per token while the model runs."""

from typing import TYPE_CHECKING, Any, ClassVar

from smolquant.schemes.base import Decision, Keep, Quantize
from smolquant.schemes.float8_weight_only import Float8WeightOnly, zero_rows_as_zeros

if TYPE_CHECKING:
    import torch

_MULTIPLE = 16
"""The kernel for float8 matrices wants both sides of a weight to be multiples of it."""


class Float8Dynamic(Float8WeightOnly):
    """torchao's ``Float8DynamicActivationFloat8WeightConfig`` with a scale per row, and per token.

    Its weights are those of float8_weight_only.
    """

    quant_type: ClassVar = "float8_dynamic"
    variant: ClassVar = "float8_dynamic"
    title: ClassVar = "float8 weights, float8 activations chosen per token at run time"
    best_for: ClassVar = "recent GPUs with large batches or long prompts, and servers such as vLLM"
    loading: ClassVar = (
        "stock transformers with torchao, on a GPU of compute capability 8.9 or more"
    )
    caution: ClassVar = "It needs a GPU of compute capability 8.9 or more."
    cuda_capability: ClassVar = (8, 9)
    measured_as: ClassVar = (
        "Where there is no GPU of compute capability 8.9 or more, it is measured through its dequantized "
        "weights, which leaves out the rounding of activations, and its speed is not measured."
    )
    weight_dtypes: ClassVar = frozenset({"bfloat16"})
    stores_transposed: ClassVar = False
    # Dequantized weights in bfloat16, and what is made of one on the way there.
    layer_memory: ClassVar = 7.0

    def decide(self, rows: int, columns: int, group_size: int) -> Decision:
        """torchao leaves such weights as they are, without a word."""
        if rows % _MULTIPLE or columns % _MULTIPLE:
            return Keep(f"{rows} x {columns} are not multiples of {_MULTIPLE}")
        return Quantize()

    def gentler(self, group_size: int) -> tuple[str, ...]:
        return (
            f"--quant-type {Float8WeightOnly.quant_type} (the same weights; activations stay as they are)",
        )

    def torchao_config(self, group_size: int, *, transposed: bool = False) -> Any:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())

    def quantize(
        self, weight: "torch.Tensor", group_size: int | None, *, transposed: bool = False
    ) -> "torch.Tensor":
        """Make what the config would make, which it refuses to do where there is no such GPU.

        Source: ``_float8_dynamic_activation_float8_weight_quantize_tensor`` of
        torchao.quantization.quant_api.
        """
        from torchao.quantization import Float8Tensor
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

        config = self.torchao_config(0)
        of_activations, of_weights = config.granularity
        activations = QuantizeTensorToFloat8Kwargs(
            config.activation_dtype,
            of_activations,
            hp_value_lb=config.activation_value_lb,
            hp_value_ub=config.activation_value_ub,
            kernel_preference=config.kernel_preference,
        )
        return zero_rows_as_zeros(
            Float8Tensor.from_hp(
                weight,
                float8_dtype=config.weight_dtype,
                granularity=of_weights,
                mm_config=config.mm_config,
                kernel_preference=config.kernel_preference,
                act_quant_kwargs=activations,
            )
        )
