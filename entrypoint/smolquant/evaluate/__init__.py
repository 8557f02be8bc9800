"""What a variant cost in quality and speed, measured on the files that will be published."""

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.errors import CannotMeasure, CheckpointError
from smolquant.evaluate.text import (
    EvalText,
    bundled_text,
    default_tokens,
    load_tokenizer,
    read_text,
    token_windows,
)
from smolquant.record import Metrics
from smolquant.schemes import BY_VARIANT, Scheme

if TYPE_CHECKING:
    import torch

    from smolquant.checkpoint.reader import Checkpoint
    from smolquant.model.architecture import Architecture
    from smolquant.report.progress import Progress
    from smolquant.settings import Settings


@dataclass(frozen=True)
class Measurement:
    """What is measured on."""

    text: EvalText
    tokens: int | None = None
    """The number of tokens that was asked for; None: it follows from the model's size."""
    trust_remote_code: bool = False

    def is_that_of(self, metrics: Metrics | None) -> bool:
        """Whether ``metrics`` were taken on the same text, and on as much of it."""
        return (
            metrics is not None
            and metrics.text_sha256 == self.text.digest
            and metrics.tokens_asked == self.tokens
        )

    def windows(self, architecture: "Architecture", source_folder: Path) -> "torch.Tensor":
        """The text in the tokens of a model.

        Args:
            source_folder: with the tokenizer; the weights may still be elsewhere.

        Returns:
            (windows, length) int64 token ids.

        Raises:
            CannotMeasure: there is no tokenizer.
            InputError: the text is too short, or conversations do not suit the chat template.
        """
        parameters = sum(parameter.numel() for parameter in architecture.model.parameters())
        try:
            tokenizer = load_tokenizer(source_folder, trust_remote_code=self.trust_remote_code)
        except CheckpointError as error:
            raise CannotMeasure(error.message, hint=error.hint) from error
        return token_windows(
            self.text,
            tokenizer,
            self.tokens or default_tokens(parameters),
            longest=getattr(architecture.model.config, "max_position_embeddings", None) or 2**30,
            exact=self.tokens is not None,
        )

    def run(
        self,
        windows: "torch.Tensor",
        architecture: "Architecture",
        checkpoint: "Checkpoint",
        source_folder: Path,
        *,
        variants: Mapping[str, Path],
        progress: Callable[[int], AbstractContextManager["Progress"]],
        device: str = "cpu",
    ) -> dict[str, Metrics]:
        """Measure every variant against its source.

        Args:
            windows: from :meth:`windows`.
            source_folder: the whole checkpoint, tokenizer included.
            variants: variant -> folder as it will be published, its card excepted.
            progress: given the bytes of weights that will be read, shows how far it is.
            device: ``cpu`` or ``cuda``.

        Raises:
            CannotMeasure: the model does not run layer by layer, or a variant not on this device.
            CheckpointError: the source's own predictions are not finite.
            GateError: a variant's predictions are not finite, or it does not load back.
            MachineError: it does not fit in memory; with the numbers, where they are known before.
        """
        from smolquant.evaluate.measure import Evaluation

        with Evaluation(architecture, checkpoint, variants, windows, device=device) as evaluation:
            evaluation.require_memory()
            with progress(evaluation.work_bytes) as shown:
                quality = evaluation.run(shown.advance)
            tokens = evaluation.tokens
        measured_on: dict[str, Any] = {
            "text": self.text.name,
            "text_sha256": self.text.digest,
            "tokens": tokens,
            "tokens_asked": self.tokens,
            "machine": machine(device),
        }
        speeds = self._speeds(source_folder, variants, device)
        return {
            variant: replace(metrics, **speed, **measured_on)
            for (variant, metrics), speed in zip(quality.items(), speeds, strict=True)
        }

    def _speeds(
        self, source_folder: Path, variants: Mapping[str, Path], device: str
    ) -> list[dict[str, Any]]:
        """The fields of :class:`Metrics` about speed, per variant; None where it does not run here."""
        from smolquant.evaluate.speed import Speed, measure_speed
        from smolquant.runtime.kernels import has_kernels

        def measured(folder: Path, scheme: Scheme | None = None) -> Speed | None:
            if scheme is not None and not has_kernels(scheme, device):
                return None
            weight_bytes = sum(
                path.stat().st_size
                for path in folder.iterdir()
                if path.suffix in {".safetensors", ".bin"}
            )
            if not weight_bytes:
                return None  # a source that is streamed
            return measure_speed(
                folder,
                weight_bytes=weight_bytes,
                device=device,
                trust_remote_code=self.trust_remote_code,
            )

        source = measured(source_folder)
        return [
            {
                "tokens_per_second": speed and speed.decode_tokens_per_second,
                "source_tokens_per_second": source and source.decode_tokens_per_second,
                "prefill_tokens_per_second": speed and speed.prefill_tokens_per_second,
                "source_prefill_tokens_per_second": source and source.prefill_tokens_per_second,
                "peak_memory_bytes": speed and speed.peak_memory_bytes,
                "source_peak_memory_bytes": source and source.peak_memory_bytes,
            }
            for variant, folder in variants.items()
            for speed in [measured(folder, BY_VARIANT[variant])]
        ]


def measurement(settings: "Settings") -> Measurement:
    """What a run's settings ask for.

    Raises:
        InputError: a text that cannot be read.
    """
    text = bundled_text() if settings.eval_text is None else read_text(settings.eval_text)
    return Measurement(text, settings.eval_tokens, settings.trust_remote_code)


def machine(device: str) -> str:
    """What speeds were measured on, in a few words."""
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
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
