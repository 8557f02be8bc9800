"""The weights that a model reads for each token, which bound how fast it can generate."""

from typing import Any


def bytes_read(model: Any) -> int:
    """Bytes of weights that a token makes a loaded model read, in the form that they have in memory.

    Told by running one: the weights of every layer that takes part, each once. Of a table that only gives
    a row it is that row, which is not worth counting; of a stack of experts it is the chosen ones.
    """
    import torch
    from torch import nn

    ran: dict[int, int] = {}
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1

    def note(module: Any, _inputs: Any) -> None:
        if isinstance(module, nn.Embedding):
            return
        for weight in module.parameters(recurse=False):
            share = min(1.0, chosen / len(weight)) if weight.dim() == 3 else 1.0
            ran[id(weight)] = int(stored_bytes(weight) * share)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        with torch.inference_mode():
            model(input_ids=torch.ones((1, 1), dtype=torch.long, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(ran.values())


def stored_bytes(weight: Any) -> int:
    """Bytes of a plain weight, or of the parts of one of torchao's."""
    names = [
        *getattr(weight, "tensor_data_names", ()),
        *getattr(weight, "optional_tensor_data_names", ()),
    ]
    parts = [part for name in names if (part := getattr(weight, name, None)) is not None]
    return sum(part.nbytes for part in parts) if parts else int(weight.nbytes)
