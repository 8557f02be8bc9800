"""What a variant cost in quality and speed, measured on the files that will be published."""

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.evaluate.text import (
    EvalText,
    bundled_text,
    default_tokens,
    load_tokenizer,
    read_text,
    token_windows,
)
from smolquant.record import Metrics

if TYPE_CHECKING:
    from smolquant.architecture import Architecture
    from smolquant.checkpoint.reader import Checkpoint
    from smolquant.report.progress import Progress
    from smolquant.settings import Settings


@dataclass(frozen=True)
class Measurement:
    """What is measured on. ``text`` None: the bundled one; ``tokens`` None: the ladder's number."""

    text: EvalText | None = None
    tokens: int | None = None
    trust_remote_code: bool = False
    device: str = "cpu"

    def run(
        self,
        architecture: "Architecture",
        checkpoint: "Checkpoint",
        source_folder: Path,
        variants: Mapping[str, Path],
        progress: Callable[[int], AbstractContextManager["Progress"]],
    ) -> dict[str, Metrics]:
        """Measure every variant against its source.

        Args:
            source_folder: the whole checkpoint, tokenizer included.
            variants: variant -> folder as it will be published, its card excepted.
            progress: given the bytes of weights that will be read, shows how far it is.

        Raises:
            CheckpointError: there is no tokenizer, or the source's own predictions are not finite.
            GateError: a variant's predictions are not finite.
            InputError: the text is too short.
            MachineError: it does not fit in memory; with the numbers.
        """
        from smolquant.evaluate.measure import Evaluation

        text = self.text or bundled_text()
        parameters = sum(parameter.numel() for parameter in architecture.model.parameters())
        windows = token_windows(
            text,
            load_tokenizer(source_folder, trust_remote_code=self.trust_remote_code),
            self.tokens or default_tokens(parameters),
            longest=getattr(architecture.model.config, "max_position_embeddings", None) or 2**30,
            exact=self.tokens is not None,
        )
        with Evaluation(
            architecture, checkpoint, variants, windows, device=self.device
        ) as evaluation:
            evaluation.require_memory()
            with progress(evaluation.work_bytes) as shown:
                quality = evaluation.run(shown.advance)
            tokens = evaluation.tokens
        return {
            variant: replace(metrics, **speed, text=text.name, tokens=tokens, machine=machine())
            for (variant, metrics), speed in zip(
                quality.items(), self._speeds(source_folder, variants), strict=True
            )
        }

    def _speeds(self, source_folder: Path, variants: Mapping[str, Path]) -> list[dict[str, Any]]:
        """The fields of :class:`Metrics` about speed, per variant; None where it does not run here."""
        from smolquant.evaluate.speed import Speed, measure_speed

        def measured(folder: Path) -> Speed | None:
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
                device=self.device,
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
            for speed in map(measured, variants.values())
        ]


def measurement(settings: "Settings", device: str) -> Measurement:
    """What a run's settings ask for, computed on ``device``."""
    return Measurement(
        None if settings.eval_text is None else read_text(settings.eval_text),
        settings.eval_tokens,
        settings.trust_remote_code,
        device,
    )


def machine() -> str:
    """What speeds were measured on, in a few words."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
