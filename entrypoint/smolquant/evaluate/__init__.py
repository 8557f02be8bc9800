"""What a variant costs in quality and speed, measured on the files that will be published."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.errors import CannotMeasure, CheckpointError, GateError, SmolquantError
from smolquant.evaluate.bounded import bounded
from smolquant.evaluate.documents import EvalText
from smolquant.evaluate.text import (
    default_tokens,
    load_tokenizer,
    require_known,
    token_windows,
    unknown_tokens,
)
from smolquant.model.context import known_tokens, longest_context
from smolquant.pace import Part
from smolquant.record import Behaviour, Metrics

if TYPE_CHECKING:
    import torch

    from smolquant.checkpoint.reader import Checkpoint
    from smolquant.evaluate.rounds import Ratio
    from smolquant.model.architecture import Architecture


Heard = Callable[[str, float | None], None]
"""Is told whatever begins, and the seconds that are left of all of it, or None where nobody knows."""


@contextmanager
def _untold() -> Iterator[Heard]:
    yield lambda begun, left: None


@dataclass(frozen=True)
class Measurement:
    """The text and the number of tokens that variants are measured on."""

    text: EvalText
    tokens: int | None = None
    """The number that was asked for; None for one that suits the model's size."""
    trust_remote_code: bool = False

    def is_that_of(self, metrics: Metrics | None, *, or_earlier: bool = False) -> bool:
        """Whether ``metrics`` were taken on the same text, and on as much of it.

        Args:
            or_earlier: the text that an earlier version bundled will do where the bundled one is asked for.
        """
        if metrics is None or metrics.tokens_asked != self.tokens:
            return False
        return metrics.text_sha256 == self.text.digest or (
            or_earlier and metrics.text_sha256 in self.text.earlier
        )

    def windows(
        self,
        architecture: "Architecture",
        source_folder: Path,
        notice: Callable[[str, str], None] = lambda title, text: None,
    ) -> "torch.Tensor":
        """The text in the tokens of a model.

        Args:
            source_folder: the folder with the tokenizer; the weights may still be elsewhere.
            notice: is told the title and the text of what is odd about the tokenizer.

        Returns:
            (windows, length) int64 token ids.

        Raises:
            CannotMeasure: there is no tokenizer, or it or its chat template takes too much time or memory.
            CheckpointError: the tokenizer or its chat template yields tokens that the model does not have.
            InputError: the text is too short, or conversations do not suit the chat template.
        """
        parameters = sum(parameter.numel() for parameter in architecture.model.parameters())
        known = known_tokens(architecture.model)

        def cut() -> "tuple[torch.Tensor, list[str]]":
            try:
                tokenizer = load_tokenizer(source_folder, trust_remote_code=self.trust_remote_code)
            except CheckpointError as error:
                raise CannotMeasure(error.message, hint=error.hint) from error
            windows = token_windows(
                self.text,
                tokenizer,
                self.tokens or default_tokens(parameters),
                longest=longest_context(architecture.model.config),
                exact=self.tokens is not None,
            )
            require_known(windows, tokenizer, known)
            return windows, unknown_tokens(tokenizer, known)

        windows, unknown = bounded(cut)
        if unknown:
            notice(
                "The tokenizer has more tokens than the model",
                f"The model has no row for {', '.join(map(repr, unknown[:3]))}"
                f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}: its tables end at the "
                f"token id {known - 1}. A text that holds such a token cannot be run.",
            )
        return windows

    def run(
        self,
        windows: "torch.Tensor",
        architecture: "Architecture",
        checkpoint: "Checkpoint",
        source_folder: Path,
        *,
        variants: Mapping[str, Path],
        progress: Callable[[Sequence[Part]], AbstractContextManager[Callable[[int], None]]],
        timing: Callable[[], AbstractContextManager[Heard]] = _untold,
        observed: Callable[[str, Behaviour], None] | None = None,
        device: str = "cpu",
    ) -> dict[str, Metrics]:
        """Measure every variant against its source.

        Args:
            windows: the result of :meth:`windows`.
            source_folder: the folder of the whole checkpoint, tokenizer included.
            variants: variant -> its folder as it will be published, apart from the card.
            progress: given the tokens to work through, those of the text once for each model and once
                more to compare them, yields the function that is called with each number that is done.
            timing: entered while speed is measured.
            observed: as for :func:`smolquant.evaluate.speed.measure_speeds`.
            device: ``cpu`` or ``cuda``.

        Raises:
            CannotMeasure: the model does not run layer by layer, or a variant not on this device.
            CheckpointError: the source's own predictions are not finite.
            GateError: a variant's predictions are not finite, it does not load back, or it does not run
                when it is loaded as users load it.
            MachineError: it does not fit in memory; the message has the numbers if they are known before.
        """
        from smolquant.evaluate.measure import Evaluation

        try:
            with Evaluation(
                architecture, checkpoint, variants, windows, device=device
            ) as evaluation:
                evaluation.require_memory()
                with progress(evaluation.work()) as advance:
                    quality = evaluation.run(advance)
                tokens = evaluation.tokens
        except CannotMeasure:
            with timing() as heard:  # what cannot be measured has to run, too
                self._speeds(source_folder, variants, device, heard, None)
            raise
        measured_on: dict[str, Any] = {
            "text": self.text.name,
            "text_sha256": self.text.digest,
            "tokens": tokens,
            "tokens_asked": self.tokens,
            "compute_capability": compute_capability(device),
        }
        with timing() as heard:
            speeds = self._speeds(source_folder, variants, device, heard, observed)
        return {
            variant: replace(metrics, **speeds[variant], **measured_on)
            for variant, metrics in quality.items()
        }

    def _speeds(
        self,
        source_folder: Path,
        variants: Mapping[str, Path],
        device: str,
        heard: Heard,
        observed: Callable[[str, Behaviour], None] | None,
    ) -> dict[str, dict[str, Any]]:
        """The fields of :class:`Metrics` about speed, per variant; None where it cannot be had here.

        Raises:
            CannotMeasure: a variant does not run on this GPU.
            GateError: a variant does not run, though its source does.
        """
        from smolquant.evaluate.speed import measure_speeds

        speeds = measure_speeds(
            source_folder,  # without weights where it is streamed
            variants,
            device=device,
            code=source_folder if self.trust_remote_code else None,
            heard=heard,
            observed=observed,
        )
        source = speeds.source
        for variant, speed in speeds.variants.items():
            if speed.fault and not source.fault:  # otherwise it says nothing of the variant
                raise _not_running(variant, speed.fault, device)
        on_machine = machine(device, speeds.threads, speeds.load_average)
        return {
            variant: {
                "tokens_per_second": speed.decode_tokens_per_second,
                "source_tokens_per_second": source.decode_tokens_per_second,
                "prefill_tokens_per_second": speed.prefill_tokens_per_second,
                "source_prefill_tokens_per_second": source.prefill_tokens_per_second,
                **_ratio("speed_ratio", speed.decode_ratio),
                **_ratio("prefill_ratio", speed.prefill_ratio),
                "peak_memory_bytes": speed.peak_memory_bytes,
                "source_peak_memory_bytes": source.peak_memory_bytes,
                "machine": on_machine,
            }
            for variant, speed in speeds.variants.items()
        }


def _ratio(name: str, ratio: "Ratio | None") -> dict[str, Any]:
    """The two fields of :class:`Metrics` about a ratio."""
    return {
        name: ratio and ratio.median,
        f"{name}_spread": ratio and (ratio.low, ratio.high),
    }


def _not_running(variant: str, fault: str, device: str) -> SmolquantError:
    """What it means that a variant cannot be loaded or run as users do it."""
    if device != "cpu":
        return CannotMeasure(
            f"On {device}, {variant} does not run: {fault}.",
            hint="Leave --evaluate always and limits out, and measure it elsewhere.",
        )
    return GateError(
        f"{variant} does not run when it is loaded as users load it: {fault}.",
        hint="Leave this scheme out, and please report it with the model's name.",
    )


def compute_capability(device: str) -> float | None:
    """The compute capability of the GPU in use, as 8.9; None on a CPU."""
    if device != "cuda":
        return None
    import torch

    major, minor = torch.cuda.get_device_capability()
    return major + minor / 10


def machine(device: str, threads: int | None = None, load_average: float | None = None) -> str:
    """The machine that speeds are measured on, in a few words; of a CPU with how much of it was in use.

    Args:
        threads: how many computed.
        load_average: how many processes had been running or waiting for a CPU before.
    """
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    used = f", {threads} thread{'' if threads == 1 else 's'}" if threads is not None else ""
    load = f", load average {load_average:.1f}" if load_average is not None else ""
    return f"{model}, {len(os.sched_getaffinity(0))} cores{used}{load}"
