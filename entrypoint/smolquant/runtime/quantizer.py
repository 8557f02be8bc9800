"""transformers' reader of torchao's weights, made quick, and with a way back to the files.

Importing this puts it in the place of transformers' own, whoever loads then. Upstream goes through the
metadata of all weights for each of them, so that a small model loads slower the smaller its weights are;
and a model that it has loaded cannot be saved.
"""

import json
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any, Self

from torch import nn
from transformers.integrations.torchao import TorchAoDeserialize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

_NAMES = "tensor_names"
"""Where the metadata of torchao's files lists the weights (torchao.prototype.safetensors)."""


class OneByOne(TorchAoDeserialize):  # type: ignore[misc] # has no types
    """Makes a weight of its parts by the metadata of that weight alone."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: transformers copies it, and with it all metadata, for each weight."""
        return self

    def convert(
        self, input_dict: Any, *args: Any, full_layer_name: str | None = None, **options: Any
    ) -> Any:
        """What upstream's makes of the same."""
        quantizer: Any = self.hf_quantizer
        whole = getattr(quantizer, "metadata", None) or {}
        if full_layer_name in whole:
            own = {_NAMES: json.dumps([full_layer_name]), full_layer_name: whole[full_layer_name]}
            quantizer = SimpleNamespace(metadata=own)
        upstream = TorchAoDeserialize(quantizer)
        return upstream.convert(input_dict, *args, full_layer_name=full_layer_name, **options)


class StoredWeights(TorchAoHfQuantizer):  # type: ignore[misc] # has no types
    """Reads each weight alone, and leaves a model that ``save_pretrained`` writes as it was published."""

    def get_load_operations(self) -> dict[str, Any]:
        """Upstream's, with our reader of a weight."""
        return {**super().get_load_operations(), "deserialize": OneByOne}

    def _process_model_after_weight_loading(self, model: nn.Module, **options: Any) -> Any:
        """Let the model be saved and pickled."""
        let_be_saved(model)
        _let_be_pickled(model)
        return super()._process_model_after_weight_loading(model, **options)


def let_be_saved(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` write the weights as they are.

    transformers remembers how it made torchao's tensors of what the files hold, wants to undo that before
    it saves, and has no way to; but it also writes torchao's tensors by itself.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model.__dict__["_weight_conversions"] = [
            one
            for one in conversions
            if not any(isinstance(op, TorchAoDeserialize) for op in getattr(one, "operations", ()))
        ]


def _let_be_pickled(model: nn.Module) -> None:
    """Let pickle find what describes a quantized module in its ``repr``.

    transformers gives it a method of a function elsewhere, and pickle looks for a method in its class.
    """
    for module in model.modules():
        words = module.__dict__.get("extra_repr")
        if isinstance(words, MethodType):
            module.__dict__["extra_repr"] = partial(words.__func__, module)


AUTO_QUANTIZER_MAPPING["torchao"] = StoredWeights
