"""Linear modules that call their weight's kernel directly, and those with the same inputs together.

torchao's way from a module to a kernel takes as long as a small layer does. These modules leave it out.
Their weights stay torchao's tensors, as they were loaded, so what saves, moves or copies a model finds
nothing unusual.
"""

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torchao.utils import TorchAOBaseTensor

from smolquant.runtime import cpu_linear
from smolquant.runtime.compiled import Stored
from smolquant.runtime.dispatch import can_compute
from smolquant.runtime.many_tokens import in_blocks, matmul_dtype
from smolquant.runtime.registry import kernel_of

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of a module that transformers' own code calls one after the other, with the same inputs."""


_Bound = tuple[Callable[[], Any], Any, cpu_linear.Linears | None]
"""A reference to a weight, its bias, and what computes with them: None where it is left to torchao."""

_UNBOUND: _Bound = (lambda: None, None, None)

_OWN = ("_bound", "_stored", "_together", "_ready")
"""What a :class:`QuantizedLinear` keeps beside its weight."""


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is a stored one.

    What it keeps beside its weight goes straight into ``__dict__``: ``nn.Module`` takes a microsecond to
    look at what is assigned to it.
    """

    _bound: _Bound = _UNBOUND
    _together: "Together | None" = None
    """On the first of the modules with the same inputs."""
    _stored: Stored | None = None
    """The weight's parts, for what compiles."""
    _ready: tuple[torch.Tensor, torch.Tensor] | None = None
    """Inputs, and what this module makes of them: computed together with those of the first."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.Linear names it
        """(..., K) -> (..., N)."""
        if torch.compiler.is_compiling():
            return self._compiled(input)
        ready = self._ready
        if ready is not None:
            self.__dict__["_ready"] = None
            if ready[0] is input:
                return ready[1]
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        bound_to, with_bias, linears = self._bound
        if bound_to() is not weight or with_bias is not bias:
            linears = self.bind()
        if linears is None or not can_compute(input):
            return super().forward(input)
        together = self._together
        if together is not None:
            return together.compute(input)
        return linears(input)[0]

    def _compiled(self, inputs: torch.Tensor) -> torch.Tensor:
        """As one operation, of plain tensors where the module is bound.

        A compiled model would look at each torchao tensor once more for every token, and take it apart.
        """
        stored = self._stored
        if stored is None or not can_compute(inputs):
            return super().forward(inputs)
        output: torch.Tensor = torch.ops.smolquant.linear(
            inputs,
            stored.levels,
            stored.scale,
            stored.zero_point,
            stored.dynamic,
            self._parameters["bias"],
        )
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        """A new weight or bias is the one that counts, in what was compiled with the old one, too."""
        if name in ("weight", "bias"):
            self._forget()
        super().__setattr__(name, value)

    def is_bound(self) -> bool:
        """Whether what this module computes with is still its weight."""
        weight, bias, _ = self._bound
        return weight() is self._parameters["weight"] and bias is self._parameters["bias"]

    def bind(self) -> cpu_linear.Linears | None:
        """Make ready to compute with the weight and the bias that the module has now.

        Returns:
            What computes with them; None where that is left to torchao.
        """
        weight: Any = self._parameters["weight"]
        bias, layer = self._parameters["bias"], _layer(self)
        linears = cpu_linear.Linears([layer]) if layer is not None else None
        self.__dict__["_stored"] = layer[0] if layer is not None else None
        # Held weakly, so that a layer whose weights are taken away keeps no part of them.
        this = weakref.ref(self)

        def forget(_: Any) -> None:
            module = this()
            if module is not None:
                module._forget()

        self.__dict__["_bound"] = (weakref.ref(weight, forget), bias, linears)
        return linears

    def _forget(self) -> None:
        self.__dict__.update(_bound=_UNBOUND, _stored=None, _together=None, _ready=None)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        self._forget()  # parts may move
        moved: QuantizedLinear = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process."""
        return {name: value for name, value in self.__dict__.items() if name not in _OWN}


class WideLinear(nn.Linear):
    """A linear layer with a plain weight, which multiplies many tokens in the dtype that is fastest."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.Linear names it
        """(..., K) -> (..., N)."""
        if torch.compiler.is_compiling() or not can_compute(input) or self._is_trained():
            return super().forward(input)
        tokens = input.numel() // self.in_features
        if tokens <= cpu_linear.FEW_TOKENS:
            return super().forward(input)
        output = in_blocks(
            input.reshape(tokens, self.in_features),
            self.out_features,
            lambda start, stop, out: out.copy_(self.weight[start:stop]),
            self.bias,
        )
        return output.view(*input.shape[:-1], self.out_features)

    def _is_trained(self) -> bool:
        """Whether the weight or the bias wants a derivative, which blocks do not have."""
        parts = (self.weight, self.bias)
        return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parts)


class Together:
    """Modules with the same inputs, in the order in which they are called: one call for all."""

    def __init__(self, modules: list[QuantizedLinear], linears: cpu_linear.Linears) -> None:
        self._modules = modules
        self._linears = linears

    def compute(self, inputs: torch.Tensor) -> torch.Tensor:
        """The first module's outputs; the others find theirs ready when they are called."""
        first, *others = self._modules
        asked_for = all(module._ready is None for module in others)
        if not asked_for or not all(module.is_bound() for module in others):
            for module in others:
                module.__dict__["_ready"] = None
            first.__dict__["_together"] = None  # they got other inputs, or other weights
            return first(inputs)  # type: ignore[no-any-return]
        output, *ready = self._linears(inputs)
        for module, its_output in zip(others, ready, strict=True):
            module.__dict__["_ready"] = (inputs, its_output)
        return output


def call_directly(model: nn.Module) -> None:
    """Let every plain linear module of ``model`` with a stored weight be a :class:`QuantizedLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear and isinstance(module.weight, TorchAOBaseTensor):
            module.__class__ = QuantizedLinear
            cast(QuantizedLinear, module).bind()
    for parent in model.modules():
        if type(parent).__module__.startswith("transformers."):
            for names in _TOGETHER:
                _join([getattr(parent, name, None) for name in names])


def widen_plain(model: nn.Module) -> None:
    """Let plain linear modules compute in a wider dtype where this CPU is faster in it than in theirs.

    Without instructions for bfloat16 that is several times as fast, and only rounds less.
    """
    for module in model.modules():
        if type(module) is not nn.Linear or isinstance(module.weight, TorchAOBaseTensor):
            continue
        dtype = module.weight.dtype
        if module.weight.is_cpu and matmul_dtype(dtype) != dtype:
            module.__class__ = WideLinear


def make_plain(model: nn.Module) -> None:
    """Undo :func:`call_directly` and :func:`widen_plain`."""
    for module in model.modules():
        if isinstance(module, WideLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
        if isinstance(module, QuantizedLinear):
            for name in _OWN:
                module.__dict__.pop(name, None)
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _join(modules: list[Any]) -> None:
    if not all(isinstance(module, QuantizedLinear) for module in modules):
        return
    layers = [_layer(module) for module in modules]
    known = [layer for layer in layers if layer is not None]
    alike = {(weight.kind, weight.columns, weight.group) for weight, _ in known}
    if len(known) < len(modules) or len(alike) > 1:
        return
    modules[0].__dict__["_together"] = Together(modules, cpu_linear.Linears(known))


def _layer(module: QuantizedLinear) -> tuple[Stored, torch.Tensor | None] | None:
    weight: Any = module.weight
    stored = kernel_of(weight).stored if isinstance(weight, TorchAOBaseTensor) else None
    return (stored(weight), module.bias) if stored is not None else None
