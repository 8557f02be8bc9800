"""Stacks of experts, (E, N, K) in one tensor: what torchao's tensors lack to be run one expert at a time.

transformers' plain loop over a mixture's experts takes the matrix of each expert that a token chose out of
its stack and multiplies with it. Importing this lets it do so with every class that variants are stored or
packed in: an expert is then a weight like that of a linear layer, with the same kernels. torchao's own int8
and float8 can do that too, but not in inference mode, and not where a matrix is (K, N) and multiplied from
the right.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Float8Tensor, Int4Tensor, Int4TilePackedTo4dTensor, Int8Tensor

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
        name: torch.stack([getattr(expert, name) for expert in experts]) for name in _parts(first)
    }
    of_stack = {
        "block_size": [1, *first.block_size],
        "shape": torch.Size([len(experts), *first.shape]),
    }
    stack: torch.Tensor = type(first)(**parts, **_attributes(first, of_stack))
    return stack


def _parts(tensor: Any) -> dict[str, torch.Tensor]:
    optional = getattr(tensor, "optional_tensor_data_names", None) or ()
    names = (*tensor.tensor_data_names, *optional)
    return {name: part for name in names if (part := getattr(tensor, name, None)) is not None}


def _attributes(tensor: Any, changed: dict[str, Any]) -> dict[str, Any]:
    optional = getattr(tensor, "optional_tensor_attribute_names", None) or ()
    names = (*tensor.tensor_attribute_names, *optional)
    return {name: changed.get(name, getattr(tensor, name)) for name in names}


def _expert(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """``stack[number]``, one expert's parts in their own layout; anything else as torchao does it.

    The stack remembers it, so that what an expert is packed into at its first use is found again.
    """
    stack, index = args
    is_tensor = isinstance(index, torch.Tensor)
    is_number = isinstance(index, int) or (is_tensor and index.ndim == 0)
    if len(stack.shape) != 3 or not is_number or index is True or index is False:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
    number = operator.index(index)
    known: dict[int, torch.Tensor] = stack.__dict__.setdefault("_experts", {})
    if number not in known:
        parts = {name: part[number] for name, part in _parts(stack).items()}
        of_expert = {"block_size": stack.block_size[1:], "shape": stack.shape[1:]}
        known[number] = type(stack)(**parts, **_attributes(stack, of_expert))
    return known[number]


def _from_the_right(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """``inputs @ weight`` of a (K, N) weight with a scale a column, as a linear layer of its transpose."""
    inputs, weight = args
    if not isinstance(weight, Int8Tensor) or list(weight.block_size) != [weight.shape[0], 1]:
        raise NotImplementedError(f"{func} is for weights with a scale a column only")
    parts = {name: part.t() for name, part in _parts(weight).items()}
    transposed = {"block_size": [1, weight.shape[0]]}
    return functional.linear(inputs, Int8Tensor(**parts, **_attributes(weight, transposed)))


def _transpose_from_the_right(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """``inputs @ weight`` of a (K, N) weight that is stored as its transpose, (N, K)."""
    inputs, weight = args
    if inputs.shape[-1] != weight.shape[1]:
        raise NotImplementedError(f"{func} is for weights that are stored as their transposes only")
    return functional.linear(inputs, weight)


def _batch_from_the_right(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Each expert's own inputs, (E, n, K), times its (K, N)."""
    inputs, stack = args
    return torch.stack([inputs[number] @ stack[number] for number in range(stack.shape[0])])


_INT4 = (Int4Tensor, Int4OpaqueTensor, Int4TilePackedTo4dTensor)
for _class in (*_INT4, Int8Tensor, Float8Tensor):
    _class.implements_torch_function(torch.Tensor.__getitem__)(_expert)
for _class, _multiply in (
    (Int8Tensor, _from_the_right),
    *((c, _transpose_from_the_right) for c in _INT4),
):
    for _matmul in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
        _class.implements_torch_function(_matmul)(_multiply)
    for _bmm in (torch.bmm, torch.Tensor.bmm):
        _class.implements_torch_function(_bmm)(_batch_from_the_right)
