"""What small models are run on: a few tokens, and a picture where its tensors can be made without a processor."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

_TOKENS = 24


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of a model's forward."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    has_image: bool = False

    def for_model(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The arguments, those of floating point in the model's dtype."""
        return {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in self.tensors.items()
        }


def text_inputs(model: PreTrainedModel) -> Inputs:
    """A prompt of tokens that mean nothing special to ``model``."""
    rows = model.get_input_embeddings().weight.shape[0]
    taken = {
        value
        for config in (model.config, model.config.get_text_config())
        for name, value in config.to_dict().items()
        if isinstance(value, int) and name.endswith(("token_id", "token_index"))
    }
    free = [token for token in range(3, rows) if token not in taken]
    ids = torch.tensor([[free[place % len(free)] for place in range(_TOKENS)]])
    return Inputs({"input_ids": ids})


def with_image(model: PreTrainedModel, text: Inputs) -> Inputs | None:
    """``text`` and a picture; None where it takes the family's own processor to make one."""
    return None
