"""Stored weights computed as the plain ones that they stand for, in float32: the same on every machine.

Kernels round as their CPU does; this is what they all approximate. One layer's plain weights are in memory
at a time, so that whatever can be loaded can be computed this way, slowly.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.utils import TorchAOBaseTensor

from smolquant.runtime.registry import plain

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class _Unit:
    """A module that is computed with all of its weights plain, and where they are."""

    module: nn.Module
    places: list[tuple[nn.Module, str]]

    @property
    def plain_bytes(self) -> int:
        """What its weights take in float32."""
        parameters = [owner._parameters[name] for owner, name in self.places]
        return sum(_FLOAT32_BYTES * one.numel() for one in parameters if one is not None)


@contextmanager
def computing_plainly(model: Any) -> Iterator[None]:
    """Let a transformers model, whose weights are as they were loaded, compute in float32 for a while."""
    own_attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with ExitStack() as undoing:
        undoing.callback(model.set_attn_implementation, own_attention)
        for unit in _units(model):
            undoing.enter_context(_in_float32(unit))
        yield


def plain_bytes(model: nn.Module) -> int:
    """The memory that :func:`computing_plainly` takes beside the model: its largest layer in float32."""
    return max(unit.plain_bytes for unit in _units(model))


def _units(model: nn.Module) -> list[_Unit]:
    """Layers as a whole, since their own code may use a child's weight, and what else owns weights."""
    layers = {
        layer
        for lists in model.modules()
        if isinstance(lists, nn.ModuleList)
        for layer in lists
        if any(True for _ in layer.parameters())
    }
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    units = []
    for module in model.modules():
        if module in inside:
            continue
        owners = module.modules() if module in layers else [module]
        places = [(owner, name) for owner in owners for name, _ in _own_parameters(owner)]
        if places:
            units.append(_Unit(module, places))
    return units


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False, remove_duplicate=False)


@contextmanager
def _in_float32(unit: _Unit) -> Iterator[None]:
    own = unit.module.__dict__
    before = own.get("forward")  # of a module that somebody else has wrapped
    own["forward"] = _looked_up(unit.module) if _is_plain_table(unit.module) else _swapping(unit)
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


def _is_plain_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and not isinstance(module.weight, TorchAOBaseTensor)


def _looked_up(table: nn.Module) -> Callable[..., Any]:
    """``table.forward`` that makes only those rows wider that are asked for."""
    own_forward = table.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own_forward(*args, **kwargs).float()

    return forward


def _swapping(unit: _Unit) -> Callable[..., Any]:
    """The unit's forward with its weights plain and wide for as long as it runs."""
    own_forward = unit.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        stored = [(owner, name, owner._parameters[name]) for owner, name in unit.places]
        try:
            for owner, name, weight in stored:
                owner._parameters[name] = _widened(weight)
            return own_forward(*args, **kwargs)
        finally:
            for owner, name, weight in stored:
                owner._parameters[name] = weight

    return forward


def _widened(weight: Any) -> nn.Parameter:
    wide = _plain_float32(weight) if isinstance(weight, TorchAOBaseTensor) else weight.detach()
    if wide.is_floating_point():
        wide = wide.to(torch.float32)
    return nn.Parameter(wide, requires_grad=False)


def _plain_float32(weight: Any) -> torch.Tensor:
    """What a stored weight stands for; where its rows have one scale each, in no more than two passes."""
    rows = weight.shape[-2]
    one_a_row = isinstance(weight, Int8Tensor | Float8Tensor) and (
        weight.scale.shape == (*weight.shape[:-2], rows, 1)
    )
    zero_point = getattr(weight, "zero_point", None)
    if not one_a_row or (zero_point is not None and bool(zero_point.any())):
        return plain(weight)
    levels: torch.Tensor = weight.qdata.to(torch.float32)
    return levels.mul_(weight.scale.to(torch.float32))
