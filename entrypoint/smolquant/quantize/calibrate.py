"""Finds a checkpoint's quantized weights from a text, layer by layer, before they are written.

The source runs on the text as the evaluation runs it: streamed from its files, all windows through one
layer before the next is read. Each layer runs twice. First as it is, while the second moments of its linear
modules' inputs are gathered; from these, the scheme finds its quantized weights. Then with the weights that
were found, so that the next layer is calibrated on the inputs that it will meet. What was found waits on
disk, quantized already, for the engine to store it; so memory is bounded by the largest layer and its
inputs' moments, whatever the number of layers.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import STORED_DTYPES
from smolquant.errors import CheckpointError, InputError
from smolquant.evaluate.documents import EvalText
from smolquant.evaluate.measure import running_the_source
from smolquant.evaluate.text import require_known, token_windows
from smolquant.machine import require_memory_for
from smolquant.memory import return_freed_blocks
from smolquant.model.architecture import Architecture
from smolquant.model.context import known_tokens, longest_context
from smolquant.model.layerwise import StreamedModel
from smolquant.model.weights import SourceWeights
from smolquant.quantize.calibrate_experts import RoutedInputs, calibrate_stack
from smolquant.quantize.moments import add_moments
from smolquant.quantize.planned import PlannedTensor, VariantPlan
from smolquant.runtime.modules import widen_plain
from smolquant.schemes import Quantize, Scheme
from smolquant.schemes.base import QuantizedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 16_384
"""Taken of the text, whatever the model's size: more than most weights have columns."""
_LEAST_TOKENS = 2_048

_WITHOUT_CALIBRATION = "Use --int4-method search, which does not run the model."

_LIBRARIES_BYTES = 300_000_000
"""Code and buffers of torch and oneDNN that come into memory with the first computation."""


def calibration_windows(
    text: EvalText, tokenizer: "PreTrainedTokenizerBase", architecture: Architecture
) -> torch.Tensor:
    """(windows, length) token ids of the text's beginning.

    Raises:
        CheckpointError: it has tokens that the model does not have.
        InputError: it is too short to tell which inputs matter.
    """
    longest = longest_context(architecture.model.config)
    windows = token_windows(text, tokenizer, TOKENS, longest=longest)
    require_known(windows, tokenizer, known_tokens(architecture.model))
    if windows.numel() < _LEAST_TOKENS:
        raise InputError(
            f"{text.name} has {windows.numel()} tokens in this model's vocabulary, and calibration "
            f"takes at least {_LEAST_TOKENS}.",
            hint="Give a longer --calibration-text, or leave it out for the bundled text.",
        )
    return windows


class Calibration:
    """One source and one plan of it whose scheme uses a text, about to be calibrated on it."""

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        plan: VariantPlan,
        windows: torch.Tensor,
        *,
        device: str = "cpu",
    ) -> None:
        """Nothing is read or computed yet.

        Args:
            checkpoint: the source's weights, open for as long as this is used.
            windows: (windows, length) token ids, see :func:`calibration_windows`.
            device: where layers are computed: ``cpu`` or ``cuda``.

        Raises:
            CannotMeasure: a model that does not consist of layers.
        """
        self._windows = windows
        self.scheme = plan.scheme
        """What finds the weights."""
        # Tables may be stored by another scheme, as --embeddings may ask for.
        self._planned = {
            tensor.name: tensor for tensor in plan.tensors if tensor.scheme is plan.scheme
        }
        self.searched_experts = 0
        """How many experts the text reached too seldom, so that they were searched for by themselves."""
        config = architecture.model.config.get_text_config(decoder=True)
        self._experts_per_token = getattr(config, "num_experts_per_tok", None)
        self._advance: Callable[[int], None] = lambda n_bytes: None
        self._folder = Path()
        with running_the_source(_WITHOUT_CALIBRATION):
            self._source = StreamedModel(
                architecture,
                SourceWeights(checkpoint, architecture),
                device=device,
                advance=self._tell,
                visit=self._visit,
                prepare=widen_plain,
            )

    @property
    def work_bytes(self) -> int:
        """Bytes of weights that the layers will read."""
        return self._source.size_bytes

    @property
    def needed_bytes(self) -> int:
        """Memory that a run takes beyond what the process has now: a bound, not a guess.

        The largest layer as it is and as it was found; the moments of all its inputs as if no two
        modules shared them, and what its experts are given; what one weight's arithmetic takes; and the
        hidden states, of which a layer has its inputs, its outputs, and the outputs joined.
        """
        states = self._windows.numel() * self._source.hidden_size * 4 * 4
        moments = max(
            sum(
                self._bytes_of_inputs(self._planned[name]) for name in unit if name in self._planned
            )
            for unit in self._source.units
        )
        arithmetic = max(
            self.scheme.calibration_bytes(tensor.matrix_rows, tensor.columns)
            for tensor in self._planned.values()
        )
        layer = 2 * self._source.largest_layer_bytes
        return _LIBRARIES_BYTES + states + layer + moments + arithmetic

    def _bytes_of_inputs(self, tensor: PlannedTensor) -> int:
        """What is held of a weight's inputs: their moments; of a stack's, also each expert's own tokens."""
        moments = 4 * tensor.columns**2
        if not tensor.is_stack:
            return moments
        times = self._experts_per_token or tensor.source.shape[0]
        return moments + self._windows.numel() * times * tensor.columns * 4

    def require_memory(self) -> None:
        """Refuse early what the kernel would kill later.

        Raises:
            MachineError: with the numbers.
        """
        require_memory_for(
            "Calibrating",
            self.needed_bytes,
            "Use a machine with more memory, or --int4-method search, which needs little.",
        )

    def run(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Write what is found into ``folder``, which is empty, a file a layer.

        Args:
            advance: told of bytes of weights read, :attr:`work_bytes` in all.

        Raises:
            CannotMeasure: the source does not run layer by layer.
            CheckpointError: the source computes NaN or infinity.
            OSError: a full disk.
        """
        self._folder, self._advance = folder, advance
        return_freed_blocks()
        with running_the_source(_WITHOUT_CALIBRATION):
            self._source.hidden_states(self._windows)

    def _tell(self, n_bytes: int) -> None:
        self._advance(n_bytes)

    def _visit(self, name: str, layer: nn.Module, run: Callable[[], Any]) -> Any:
        owned = {
            ".".join(filter(None, (name, path, attribute))): (module, weight)
            for path, module in layer.named_modules()
            for attribute, weight in module.named_parameters(recurse=False)
        }
        planned = {weight: held for weight, held in owned.items() if weight in self._planned}
        if not planned:
            return run()
        stacks = {n: weight for n, (_, weight) in planned.items() if self._planned[n].is_stack}
        linears = {n: module for n, (module, _) in planned.items() if n not in stacks}
        with _Inputs(linears) as inputs, RoutedInputs(stacks) as routed:
            run()
        try:
            found = self._found(linears, inputs) | self._found_stacks(stacks, routed)
        except ValueError as error:
            raise CheckpointError(
                f"{name} computes NaN or infinity on plain text, so nothing can be calibrated: "
                f"{error}.",
                hint="The training run went wrong, or float16 is too narrow; take an earlier "
                "checkpoint.",
            ) from error
        save_file(found, self._folder / f"{name}.safetensors")
        return run()

    def _found(
        self, linears: Mapping[str, nn.Module], inputs: "_Inputs"
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for weights, moments in inputs.take():
            feedback = self.scheme.feedback(moments)
            del moments
            for weight in weights:
                found |= _calibrated(self.scheme, linears[weight], self._planned[weight], feedback)
        return found

    def _found_stacks(
        self, stacks: Mapping[str, torch.Tensor], routed: RoutedInputs
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, stack in stacks.items():
            parts, searched = calibrate_stack(self.scheme, stack, self._planned[name], routed)
            self.searched_experts += searched
            found |= {f"{name}.{part}": rows for part, rows in parts.items()}
        return found


class _Inputs:
    """Second moments of what linear modules are given, while this is entered."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._moments: dict[str, torch.Tensor] = {}
        self._weights: dict[str, list[str]] = {}
        """First weight that is given an input -> all that are given the same."""
        self._last: tuple[str, torch.Tensor] | None = None

    def __enter__(self) -> "_Inputs":
        self._hooks = [
            module.register_forward_pre_hook(self._watcher(name))
            for name, module in self._linears.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def take(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Weights and their inputs' moments, (K, K) float32, given away one after another."""
        for first, weights in self._weights.items():
            yield weights, self._moments.pop(first)

    def _watcher(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            # Modules that follow each other, as queries, keys and values do, are handed one tensor.
            if self._last is None or self._last[1] is not inputs[0]:
                self._last = (name, inputs[0])
                self._add(name, inputs[0])
            members = self._weights.setdefault(self._last[0], [])
            if name not in members:
                members.append(name)

        return watch

    def _add(self, name: str, inputs: torch.Tensor) -> None:
        self._moments[name] = add_moments(self._moments.get(name), inputs)


def _calibrated(
    scheme: Scheme, module: Any, planned: PlannedTensor, feedback: Any
) -> dict[str, torch.Tensor]:
    """The quantized weight of ``module``, whose own weight is replaced by what it stands for."""
    assert isinstance(planned.decision, Quantize)
    weight = module.weight.to(planned.dtype)
    parts, found = scheme.calibrate(weight, planned.decision.group_size, feedback)
    module.weight = nn.Parameter(found.to(module.weight.dtype), requires_grad=False)
    return {f"{planned.name}.{part}": data.contiguous().cpu() for part, data in parts.items()}


class CalibratedWeights:
    """Weights that were found by calibration, read by rows from any thread."""

    def __init__(self, files: Checkpoint, scheme: Scheme) -> None:
        """``files``: what ``scheme`` found, as :meth:`Calibration.run` wrote it."""
        self._files, self._scheme = files, scheme

    def quantize_rows(self, name: str, weight: torch.Tensor, start: int) -> QuantizedRows | None:
        """Rows of the parameter ``name`` as they are stored; None where nothing was found for it.

        Args:
            weight: (n, K) rows of the source, from row ``start`` on.
        """
        tensors = self._files.layout.tensors
        found = {part: tensors.get(f"{name}.{part}") for part in self._scheme.row_axes}
        parts = {
            part: self._files.read_rows(tensor, start, start + len(weight))
            for part, tensor in found.items()
            if tensor is not None
        }
        return self._scheme.stored_rows(weight, parts) if parts else None


@contextmanager
def calibrated_weights(
    calibration: Calibration, folder: Path, advance: Callable[[int], None]
) -> Iterator[CalibratedWeights]:
    """What ``calibration`` finds, for as long as it is needed; see :meth:`Calibration.run`.

    Args:
        folder: made for it and removed after it. What a killed run left there is removed first:
            the layers that it lacks need the hidden states of those before, so nothing is saved by it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        calibration.run(folder, advance)
        with Checkpoint(sorted(folder.glob("*.safetensors")), STORED_DTYPES) as files:
            yield CalibratedWeights(files, calibration.scheme)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
