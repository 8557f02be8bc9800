"""Runs a model whose weights stay on disk: one layer at a time is in memory, for all the text at once.

The skeleton is stock transformers' own and runs its own forward; only the time at which its weights are in
memory is changed. A layer reads them when it is entered, works through the text window by window, and
releases them. So a model of any size is measured in the memory of its largest layer, and its weights are
read once however long the text is.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from smolquant.model.architecture import Architecture
from smolquant.model.trunk import trunk_of
from smolquant.model.weights import Weights

Forward = Callable[..., Any]

Visit = Callable[[str, nn.Module, Callable[[], Any]], Any]
"""A function that is given a layer's name, the layer with its weights in memory, and a function that runs
the layer on the whole text, and that returns the layer's output. It may run the layer more than once, and
change its weights in between."""


def _run_once(name: str, layer: nn.Module, run: Callable[[], Any]) -> Any:
    return run()


def _as_stored(layer: nn.Module) -> None:
    """Plain weights need nothing more."""


class StreamedModel:
    """A causal language model that is never in memory as a whole."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        *,
        device: str = "cpu",
        advance: Callable[[int], None] = lambda n_bytes: None,
        visit: Visit = _run_once,
        prepare: Callable[[nn.Module], object] = _as_stored,
    ) -> None:
        """Build the skeleton; its weights are read by :meth:`hidden_states` and :meth:`head_rows`.

        Args:
            device: the device that computes the layers.
            advance: called with each layer's bytes on disk when the layer is done.
            visit: called for each layer, and for every other module that owns weights.
            prepare: makes each of them run with its weights as they are stored.
        """
        from accelerate import init_empty_weights

        template = architecture.model
        with init_empty_weights(
            include_buffers=False
        ):  # rotary frequencies are computed, not stored
            model = type(template)._from_config(
                copy.deepcopy(template.config),
                dtype=weights.dtype,
                # A mixture's experts one by one, as published variants run them.
                experts_implementation="eager",
            )
        self._model: Any = model.eval()
        self._weights = weights
        self._device = device
        self._advance = advance
        self._visit = visit
        self._prepare = prepare
        self._windows = 1
        # Not the largest list of all: that may be of what sees, and text never enters it.
        language = next(
            name
            for name, module in template.named_modules()
            if module is architecture.language_model
        )
        self._trunk, layers = trunk_of(model.get_submodule(language))
        self._head = model.get_output_embeddings()
        self._head_name = next(
            name for name, module in model.named_modules() if module is self._head
        )
        self._load_buffers()
        self._units = self._wire(layers)

    @property
    def vocabulary_size(self) -> int:
        """The number of rows of the output head."""
        return int(self._head.weight.shape[0])

    @property
    def units(self) -> Sequence[Sequence[str]]:
        """The names of the parameters that are in memory together, layer by layer."""
        return self._units

    @property
    def size_bytes(self) -> int:
        """The bytes on disk that :meth:`hidden_states` reads, without the embeddings."""
        return sum(map(self._bytes_on_disk, self._units))

    @property
    def hidden_size(self) -> int:
        """The width of the last hidden states."""
        return int(self._head.weight.shape[1])

    @property
    def largest_layer_bytes(self) -> int:
        """The bytes on disk of the largest layer."""
        return max(map(self._bytes_on_disk, self._units))

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """The hidden states that the output head receives for ``ids``, computed layer by layer.

        Args:
            ids: (windows, length) token ids.

        Returns:
            (windows, length, hidden size) in the model's dtype, on the device. Each window is computed
            by itself, so the result does not depend on the others.

        Raises:
            NotImplementedError: the model changes its weights while it runs.
        """
        self._windows = ids.shape[0]
        before = self._changes()
        with torch.inference_mode():
            output = self._trunk(input_ids=ids.to(self._device), use_cache=False)
        if self._changes() != before:
            raise NotImplementedError(
                f"{type(self._trunk).__name__} changes weights while it runs, which does not reach those "
                "on the disk"
            )
        states: torch.Tensor = output.last_hidden_state
        return states

    @contextmanager
    def head_rows(self, start: int, stop: int) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Rows [start, stop) of the output head, as a function from hidden states to logits.

        In float32: bfloat16 logits are so coarse that their rounding alone costs as much KL
        divergence as int8 weights do. Everything that the model does after its head, such as soft
        capping, is done by the model itself.

        Yields:
            (n, hidden size) hidden states -> (n, stop - start) float32 logits.
        """
        own_forward, own_weights = self._trunk.forward, dict(self._head._parameters)
        for attribute, parameter in own_weights.items():
            if parameter is not None:
                rows = self._weights.rows(f"{self._head_name}.{attribute}", start, stop)
                self._head._parameters[attribute] = _fixed(rows.to(self._device, torch.float32))

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            carried = _LastStates(last_hidden_state=hidden.float().unsqueeze(0))
            self._trunk.forward = lambda *_, **__: carried
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self._device)
            with torch.inference_mode():
                result: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
            return result[0]

        try:
            yield logits
        finally:
            self._trunk.forward = own_forward
            self._head._parameters.update(own_weights)

    def _changes(self) -> int:
        """How often the empty parameters, which stand for those on the disk, have been written to."""
        return sum(parameter._version for parameter in self._model.parameters())

    def _load_buffers(self) -> None:
        for name, buffer in self._model.named_buffers():
            module, _, attribute = name.rpartition(".")
            stored = self._weights.load(name) if self._weights.has(name) else buffer
            self._model.get_submodule(module)._buffers[attribute] = stored.to(self._device)

    def _wire(self, layers: nn.ModuleList) -> list[list[str]]:
        """Make every module that owns weights read them when it is entered.

        Returns:
            The parameter names of each module that reads its weights whole.
        """
        units = []
        in_layers = {module for layer in layers for module in layer.modules()}
        trunk = set(self._trunk.modules())
        for name, module in self._model.named_modules():
            is_layer = module in set(layers)
            if module not in trunk or (module in in_layers and not is_layer):
                continue
            if module is self._model.get_input_embeddings():
                module.forward = self._looking_up(f"{name}.weight", module)
                continue
            parameters = [
                f"{name}.{attribute}" for attribute, _ in module.named_parameters(recurse=is_layer)
            ]
            if parameters:
                module.forward = self._visiting(name, module, parameters)
                units.append(parameters)
        return units

    def _bytes_on_disk(self, parameters: list[str]) -> int:
        return sum(map(self._weights.size_bytes, parameters))

    def _visiting(self, unit: str, module: nn.Module, parameters: list[str]) -> Forward:
        """``module.forward`` with its weights in memory for as long as it runs."""
        own_forward = module.forward
        places = {name: self._place(name) for name in parameters}
        empty = {name: owner._parameters[attribute] for name, (owner, attribute) in places.items()}

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                for name, (owner, attribute) in places.items():
                    weight = self._weights.load(name).to(self._device)
                    owner._parameters[attribute] = _fixed(weight)
                self._prepare(module)
                run = partial(_window_by_window, own_forward, self._windows, args, kwargs)
                return self._visit(unit, module, run)
            finally:
                for name, (owner, attribute) in places.items():
                    owner._parameters[attribute] = empty[name]
                self._advance(self._bytes_on_disk(parameters))

        return forward

    def _looking_up(self, weight: str, module: Any) -> Forward:
        """``module.forward`` on a table of only those rows that it is asked for."""
        own_forward, empty = module.forward, module.weight

        def forward(indices: torch.Tensor) -> Any:
            used, places = torch.unique(indices, return_inverse=True)
            rows = [self._weights.rows(weight, row, row + 1) for row in used.tolist()]
            module._parameters["weight"] = _fixed(torch.cat(rows).to(self._device))
            try:
                return own_forward(places)
            finally:
                module._parameters["weight"] = empty

        return forward

    def _place(self, parameter: str) -> tuple[nn.Module, str]:
        module, _, attribute = parameter.rpartition(".")
        return self._model.get_submodule(module), attribute


class _LastStates(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]  # transformers has no types
    """The last hidden states as a trunk returns them, and None for whatever else some trunks return."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _window_by_window(forward: Forward, windows: int, args: Any, kwargs: Any) -> Any:
    """Call a layer for one window at a time, so that its activations stay small.

    A layer is called once for all windows if it receives something in which it could store values for a
    later layer (a cache, a mapping), because the next window would overwrite those values.
    """
    if windows == 1 or not (_can_cut(args) and _can_cut(tuple(kwargs.values()))):
        return forward(*args, **kwargs)
    outputs = [
        forward(
            *_cut(args, window, windows),
            **{name: _cut(value, window, windows) for name, value in kwargs.items()},
        )
        for window in range(windows)
    ]
    return _join(outputs)


def _can_cut(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_can_cut, value))
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str)


def _cut(value: Any, window: int, windows: int) -> Any:
    """``value`` for one window; what all windows share (positions, masks) has a first axis of one."""
    if isinstance(value, tuple):
        return tuple(_cut(item, window, windows) for item in value)
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == windows:
        return value[window : window + 1]
    return value


def _join(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple):
        return tuple(_join([output[i] for output in outputs]) for i in range(len(first)))
    return first
