"""Stacks of experts, (E, N, K) in one tensor: what torchao's tensors lack to be run one expert at a time.

transformers' plain loop over a mixture's experts takes the matrix of each expert that a token chose out of
its stack and multiplies with it. torchao's int8 and float8 tensors can do that where a matrix is (N, K).
Importing this adds the int4 ones, whose kernels and layouts then serve an expert as they do a linear layer,
and int8 where a matrix is (K, N) and multiplied from the right.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int4Tensor, Int4TilePackedTo4dTensor, Int8Tensor

_aten = torch.ops.aten


Pack = Callable[[Any], torch.Tensor]
"""What turns the stored weight of a linear layer, (N, K), into the one that a kernel takes."""


def each_expert(pack: Pack) -> Pack:
    """``pack`` for stacks too, (E, N, K): every expert of one is packed by itself."""

    def packed(weight: Any) -> torch.Tensor:
        if len(weight.shape) == 2:
            return pack(weight)
        return _joined([pack(weight[number]) for number in range(weight.shape[0])])

    return packed


def _joined(experts: Sequence[Any]) -> torch.Tensor:
    """One stack of experts that are laid out alike."""
    first = experts[0]
    parts = {
        name: torch.stack([getattr(expert, name) for expert in experts])
        for name in first.tensor_data_names
    }
    attributes = _attributes(first)
    attributes["block_size"] = [1, *first.block_size]
    attributes["shape"] = torch.Size([len(experts), *first.shape])
    stack: torch.Tensor = type(first)(**parts, **attributes)
    return stack


def _attributes(tensor: Any) -> dict[str, Any]:
    names = [*tensor.tensor_attribute_names, *(tensor.optional_tensor_attribute_names or ())]
    return {name: getattr(tensor, name) for name in names}


def _int4_expert(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """``stack[number]``, one expert's parts in their own layout.

    The stack remembers it, so that what an expert is packed into at its first use is found again.
    """
    stack, number = args[0], operator.index(args[1])
    if len(stack.shape) != 3:
        raise NotImplementedError(f"{type(stack).__name__} has rows of its own for a stack only")
    known: dict[int, torch.Tensor] = stack.__dict__.setdefault("_experts", {})
    if number not in known:
        parts = {name: getattr(stack, name)[number] for name in stack.tensor_data_names}
        attributes = _attributes(stack)
        attributes |= {"block_size": stack.block_size[1:], "shape": stack.shape[1:]}
        known[number] = type(stack)(**parts, **attributes)
    return known[number]


def _int8_from_the_right(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """``inputs @ weight`` of a (K, N) weight with a scale a column, as a linear layer of its transpose."""
    inputs, weight = args
    if not isinstance(weight, Int8Tensor) or list(weight.block_size) != [weight.shape[0], 1]:
        raise NotImplementedError(f"{func} is for int8 weights with a scale a column only")
    parts = {"qdata": weight.qdata.t(), "scale": weight.scale.t()}
    if weight.zero_point is not None:
        parts["zero_point"] = weight.zero_point.t()
    linear = Int8Tensor(
        **parts,
        block_size=[1, weight.shape[0]],
        dtype=weight.dtype,
        act_quant_kwargs=weight.act_quant_kwargs,
        reduce_range=weight.reduce_range,
    )
    return functional.linear(inputs, linear)


def _int8_batch_from_the_right(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Each expert's own inputs, (E, n, K), times its (K, N)."""
    inputs, stack = args
    return torch.stack([inputs[number] @ stack[number] for number in range(stack.shape[0])])


for _class in (Int4Tensor, Int4OpaqueTensor, Int4TilePackedTo4dTensor):
    _class.implements_torch_function(torch.Tensor.__getitem__)(_int4_expert)
Int8Tensor.implements(_aten.mm.default)(_int8_from_the_right)
Int8Tensor.implements(_aten.bmm.default)(_int8_batch_from_the_right)
