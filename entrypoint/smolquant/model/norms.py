"""The normalization in front of a linear weight, and what it says about the columns of the weight's inputs.

It is found by running the skeleton: a linear module that receives the very tensor which a norm returned
comes right after it, whatever the family calls the two. A normalized vector has a mean square of one, so
how large each column of the norm's output is follows from the norm's own weights, without data. Nothing
here knows of schemes, files or variants.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smolquant.model.trunk import trunk_of

_MOST_LAYERS = 256
"""Layers that are run one by one, which is more than released models have."""


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalization, by its class's name, as transformers has no common class."""
    return "norm" in type(module).__name__.lower()


@dataclass(frozen=True)
class Norm:
    """A normalization module with weights of its own."""

    name: str
    """The module's name in the model."""
    module: nn.Module
    parameters: Mapping[str, str]
    """Attribute of the module -> the parameter's name in the model."""

    def input_mean_squares(
        self, values: Mapping[str, torch.Tensor], columns: int
    ) -> torch.Tensor | None:
        """The mean square of each column of its output, for inputs whose columns are all alike.

        Args:
            values: attribute -> its value, on the CPU.
            columns: K, the number of columns of the output.

        Returns:
            (K,) float64, finite; None where the module cannot be run by itself.
        """
        # A mean of zero and a mean square of one: the input is normalized already. It is float64, so that
        # processors whose vectors round differently agree far beyond the precision that is used.
        probe = torch.ones(columns, device="cpu", dtype=torch.float64)
        probe[1::2] = -1
        exact = {attribute: value.double() for attribute, value in values.items()}
        try:
            with torch.inference_mode():
                # Both signs, because a bias adds to one what it takes from the other.
                outputs = torch.stack(
                    [
                        torch.func.functional_call(self.module, exact, (some.view(1, 1, -1),))
                        for some in (probe, -probe)
                    ]
                )
        except Exception:  # a model's own code raises anything
            return None
        mean_squares = outputs.double().square().mean(0).view(-1)
        usable = mean_squares.shape == (columns,) and not mean_squares.is_meta
        return mean_squares if usable and bool(mean_squares.isfinite().all()) else None


def norms_in_front(model: nn.Module) -> dict[str, Norm]:
    """Linear weight (its name in ``model``) -> the norm whose output its module receives.

    Args:
        model: a causal language model on the meta device, not in training; nothing is computed. The
            result is empty for a model that cannot run there to its end, and leaves out a norm that
            needs more than its input.
    """
    watch = _InputWatch(model)
    hooks = [hook for name, module in model.named_modules() for hook in watch.hooks(name, module)]
    try:
        with torch.inference_mode(), _one_of_each_kind(model) as alike:
            # Without a cache, masks would depend on what the tokens are.
            model(torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=True)
    except Exception:  # a model's own code raises anything
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    found = {
        weight: norm
        for weight, norm in watch.norm_of.items()
        if norm is not None and _runs_alone(norm, model.get_parameter(weight).shape[1])
    }
    return found | _of_layers_alike(model, found, alike)


@contextmanager
def _one_of_each_kind(model: nn.Module) -> Iterator[Mapping[str, Sequence[str]]]:
    """Let a very deep model run with one layer of each kind: its name -> those of the others."""
    try:
        trunk, layers = trunk_of(model)
    except NotImplementedError:
        yield {}
        return
    if len(layers) <= _MOST_LAYERS:
        yield {}
        return
    kinds = defaultdict[object, list[int]](list)
    for index, layer in enumerate(layers):
        kinds[_kind(layer)].append(index)
    name = next(name for name, module in model.named_modules() if module is layers)
    attribute = name.rpartition(".")[2]
    setattr(trunk, attribute, nn.ModuleList(layers[same[0]] for same in kinds.values()))
    try:
        yield {f"{name}.{same[0]}": [f"{name}.{i}" for i in same[1:]] for same in kinds.values()}
    finally:
        setattr(trunk, attribute, layers)


def _kind(layer: nn.Module) -> object:
    """What layers have in common that are built alike: modules, and shapes of their weights."""
    return tuple(
        (name, type(module), tuple(weight.shape for weight in module.parameters(recurse=False)))
        for name, module in layer.named_modules()
    )


def _of_layers_alike(
    model: nn.Module, found: Mapping[str, Norm], alike: Mapping[str, Sequence[str]]
) -> dict[str, Norm]:
    """What was found in one layer, for the layers like it."""
    result = {}
    for layer, others in alike.items():
        inside = {
            weight.removeprefix(layer): norm
            for weight, norm in found.items()
            if weight.startswith(f"{layer}.") and norm.name.startswith(f"{layer}.")
        }
        for other in others:
            for weight, norm in inside.items():
                name = other + norm.name.removeprefix(layer)
                parameters = {
                    attribute: other + parameter.removeprefix(layer)
                    for attribute, parameter in norm.parameters.items()
                }
                result[other + weight] = Norm(name, model.get_submodule(name), parameters)
    return result


def _runs_alone(norm: Norm, columns: int) -> bool:
    """Whether a norm can be run by itself, so that a plan may count on it."""
    ones = {
        attribute: torch.ones(parameter.shape, device="cpu")
        for attribute, parameter in norm.module.named_parameters()
    }
    return norm.input_mean_squares(ones, columns) is not None


class _InputWatch:
    """Records which norm's output each linear module receives while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.norm_of: dict[str, Norm | None] = {}
        """Linear weight -> the norm in front; None where there is none, or another one each time."""
        self._returned: dict[int, tuple[torch.Tensor, Norm]] = {}
        """Id of a norm's output -> that output, kept so that no other tensor gets its id, and the norm."""

    def hooks(self, name: str, module: nn.Module) -> list[Any]:
        """Register what watches ``module``; the caller removes the hooks."""
        if isinstance(module, nn.Linear):
            return [module.register_forward_pre_hook(self._linear(f"{name}.weight"))]
        if not is_norm(module):
            return []
        parameters = {
            attribute: f"{name}.{attribute}" for attribute, _ in module.named_parameters()
        }
        return [module.register_forward_hook(self._norm(Norm(name, module, parameters)))]

    def _norm(self, norm: Norm) -> Any:
        def returned(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and norm.parameters:
                self._returned[id(output)] = (output, norm)

        return returned

    def _linear(self, weight: str) -> Any:
        def given(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            _, norm = self._returned.get(id(inputs[0]), (None, None)) if inputs else (None, None)
            self.norm_of[weight] = norm if self.norm_of.get(weight, norm) is norm else None

        return given
