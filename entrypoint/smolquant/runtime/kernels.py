"""Stored weights on the machine at hand: models made to run with its kernels, or with plain weights."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torchao.utils import TorchAOBaseTensor

from smolquant.runtime.modules import call_directly, make_plain, widen_plain
from smolquant.runtime.quantizer import let_be_saved
from smolquant.runtime.registry import kernel_of, lacking, plain
from smolquant.schemes import Scheme


def use_kernels(model: nn.Module) -> None:
    """Make every stored weight of ``model`` run with its device's kernel, in place.

    A weight that its best kernel cannot take is computed with the next one; on a CPU that is said once.
    """
    lacks = Counter(
        why
        for _, weight in _stored_weights(model)
        if weight.device.type == "cpu" and (why := lacking(weight))
    )
    _replace_stored(model, _with_kernel)
    if hasattr(model, "save_pretrained") and next(_stored_weights(model), None) is None:
        _call_plain(model)  # the weights that it now has are what its config has to tell of
    call_directly(model)
    widen_plain(model)
    if lacks:
        told = "; ".join(f"{why} ({count})" for why, count in lacks.most_common())
        logging.getLogger("smolquant").warning(
            "%d weights run with another kernel than the best one: %s.", lacks.total(), told
        )


def kernels(model: nn.Module) -> dict[str, str]:
    """What multiplies with each stored weight of a model.

    Returns:
        The parameter's name -> the kernel's, with the reason where it is not the best one.
    """
    told = {}
    for name, weight in _stored_weights(model):
        why = lacking(weight)
        told[name] = kernel_of(weight).name + (f" ({why})" if why else "")
    return told


def dequantize(model: nn.Module) -> nn.Module:
    """Turn every stored weight of a model into the plain one that it stands for, in place.

    Returns:
        The model: a plain one, which can be trained, moved and saved as any other.
    """
    _replace_stored(model, plain)
    make_plain(model)
    _call_plain(model)
    return model


def _call_plain(model: nn.Module) -> None:
    """Take back what transformers was told of the weights that a model had."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    let_be_saved(model)
    for name in ("hf_quantizer", "is_quantized"):
        model.__dict__.pop(name, None)


def has_kernels(scheme: Scheme, device: str) -> bool:
    """Whether a variant of ``scheme`` computes on ``device`` as it is meant to.

    Args:
        device: ``cpu``, ``cuda`` or any device that transformers' ``device_map`` takes.
    """
    if scheme.cuda_capability is None:
        return True
    if device == "cpu" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= scheme.cuda_capability


def preparation(scheme: Scheme, device: str) -> Callable[[nn.Module], object]:
    """What makes stored weights run on ``device``: its kernels, or plain weights where it has none."""
    return use_kernels if has_kernels(scheme, device) else _use_plain


def _use_plain(model: nn.Module) -> None:
    dequantize(model)
    widen_plain(model)


def _stored_weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, weight in model.named_parameters():
        if isinstance(weight, TorchAOBaseTensor):
            yield name, weight


def _with_kernel(weight: Any) -> torch.Tensor:
    kernel = kernel_of(weight)
    if kernel.replace is not None:
        return kernel.replace(weight)
    if kernel.stored is not None and len(weight.shape) == 3:
        kernel.stored(weight)  # a stack is laid out here, once for all of its experts
    kept: torch.Tensor = weight
    return kept


def _replace_stored(
    model: nn.Module, replacement: Callable[[TorchAOBaseTensor], torch.Tensor]
) -> None:
    """Put what ``replacement`` makes of each stored weight in its place, one by one; tied ones stay one."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, TorchAOBaseTensor):
                holders.setdefault(id(weight), []).append((module, name))
    for places in holders.values():
        module, name = places[0]
        stored: Any = module._parameters[name]
        replaced = replacement(stored)
        if replaced is not stored:
            parameter = nn.Parameter(replaced, requires_grad=False)
            for module, name in places:
                module._parameters[name] = parameter
