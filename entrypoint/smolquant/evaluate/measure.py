"""Perplexity, divergence and agreement of variants with their source, on the same tokens.

Source and variants run one after another, each streamed from its files; only their last hidden states
are kept. Logits are made from these in blocks of the vocabulary, so that the divergence is exact over
all of it and no table of (tokens, vocabulary) ever exists.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import STORED_DTYPES
from smolquant.errors import (
    CannotMeasure,
    CheckpointError,
    GateError,
    MachineError,
    SmolquantError,
)
from smolquant.machine import require_memory_for
from smolquant.memory import freed_blocks_kept, is_out_of_memory, return_freed_blocks
from smolquant.model.architecture import Architecture
from smolquant.model.layerwise import StreamedModel
from smolquant.model.weights import SourceWeights, VariantWeights
from smolquant.pace import Part
from smolquant.record import Metrics
from smolquant.runtime.kernels import preparation
from smolquant.runtime.modules import widen_plain
from smolquant.schemes import BY_VARIANT, Scheme
from smolquant.text import error_words

VOCABULARY_BLOCK = 8_192
TOKEN_BLOCK = 512
"""Fixed, like everything that orders the arithmetic: the same inputs give the same numbers."""

_LIBRARIES_BYTES = 100_000_000
"""Buffers of torch, torchao and oneDNN that the first computation brings, and some to spare."""

_MOST_NATS = 38.0
"""The largest nll that is told. The perplexity of more is no number that a record can hold; nobody needs
to know how much more."""

_ELSEWHERE = "Leave --evaluate always and limits out, and measure it elsewhere."
"""What to do where a model does not run layer by layer."""

_DIGITS = 6
"""Significant digits of what is recorded; the rest is rounding of bfloat16 arithmetic."""


class Evaluation:
    """One source and its variants, about to be measured."""

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        variants: Mapping[str, Path],
        windows: torch.Tensor,
        *,
        device: str = "cpu",
    ) -> None:
        """Open the files; nothing is computed yet.

        Args:
            architecture: the source's.
            checkpoint: the source's weights, open for as long as this is used.
            variants: variant -> folder with the weight files that will be published.
            windows: (windows, length) token ids, see :func:`smolquant.evaluate.text.token_windows`.
            device: where layers are computed: ``cpu`` or ``cuda``.

        Raises:
            CannotMeasure: a model that does not consist of layers.
            GateError: a variant's files do not hold the model.
        """
        self._windows = windows
        self._advance: Callable[[int], None] = lambda n_tokens: None
        self._done_tokens = 0.0
        self._device = device
        with ExitStack() as stack:
            with running_the_source():
                self._source = StreamedModel(
                    architecture,
                    SourceWeights(checkpoint, architecture),
                    device=device,
                    advance=lambda n_bytes: self._tell_layer(self._source, n_bytes),
                    prepare=widen_plain,
                )
            self._variants: dict[str, StreamedModel] = {}
            for variant, folder in variants.items():
                with _loading_back(variant, device):
                    files = sorted(folder.glob("*.safetensors"))
                    opened = stack.enter_context(Checkpoint(files, STORED_DTYPES))
                    self._variants[variant] = StreamedModel(
                        architecture,
                        VariantWeights(opened, architecture, files[0]),
                        device=device,
                        advance=partial(self._tell_layer_of, variant),
                        prepare=preparation(BY_VARIANT[variant], device),
                    )
            self._stack = stack.pop_all()

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def tokens(self) -> int:
        """The number of tokens that are predicted and compared."""
        return self._windows.shape[0] * (self._windows.shape[1] - 1)

    def work(self) -> list[Part]:
        """What :meth:`run` advances over: the text's tokens for each model, and once more to compare them.

        How long comparing takes is tried on some tokens and a part of the vocabulary, since it comes last
        and has nothing in common with running layers.

        Raises:
            as :meth:`run` does.
        """
        tokens = self._windows.numel()
        targets = self._windows.flatten()[:TOKEN_BLOCK].to(self._device)
        rows = min(VOCABULARY_BLOCK // 2, self._source.vocabulary_size)
        states = torch.ones(len(targets), self._source.hidden_size, device=self._device)

        def compare(some: int) -> float:
            started = time.perf_counter()
            hidden = dict.fromkeys(self._variants, states[:some])
            source, *_ = self._gathered(states[:some], hidden, targets[:some], rows)
            float(source.nll.sum())  # a GPU may still compute
            return time.perf_counter() - started

        with freed_blocks_kept(), _within_memory():  # as comparing does
            compare(1)  # the first one prepares
            seconds = statistics.median(compare(len(targets)) for _ in range(3))
        share = len(targets) / tokens * rows / self._source.vocabulary_size
        return [*(Part(tokens) for _ in self._models), Part(tokens, seconds / share)]

    @property
    def needed_bytes(self) -> int:
        """Memory that a run takes beyond what the process has now: a bound, not a guess.

        The largest layer with what torchao makes of it, the hidden states of every model and three more
        of the one that runs, and blocks of the output heads with their logits.
        """
        width = self._source.hidden_size
        states = self._windows.numel() * width * 4 * (len(self._models) + 3)
        layer = max(
            Scheme.layer_memory * self._source.largest_layer_bytes,
            *(
                BY_VARIANT[variant].layer_memory * model.largest_layer_bytes
                for variant, model in self._variants.items()
            ),
        )
        rows = min(VOCABULARY_BLOCK, self._source.vocabulary_size)
        blocks = rows * 4 * (2 * width * len(self._models) + 6 * TOKEN_BLOCK)
        return _LIBRARIES_BYTES + states + max(int(layer), blocks)

    def require_memory(self) -> None:
        """Refuse early what the kernel would kill later.

        Raises:
            MachineError: with the numbers.
        """
        require_memory_for(
            "Measuring",
            self.needed_bytes,
            "Use a machine with more memory, or a smaller --eval-tokens; or leave --evaluate always and "
            "limits out.",
        )

    def run(self, advance: Callable[[int], None] | None = None) -> dict[str, Metrics]:
        """Measure.

        Args:
            advance: told of tokens that have been worked through, those of :meth:`work` in all.

        Raises:
            CannotMeasure: the source does not run layer by layer.
            CheckpointError: the source itself computes NaN or infinity.
            GateError: a variant does, or its files do not hold the model.
            MachineError: it ran out of memory.
        """
        self._advance, self._done_tokens = advance or self._advance, 0.0
        return_freed_blocks()
        with _within_memory():
            with running_the_source():
                source = self._source.hidden_states(self._windows)[:, :-1].flatten(0, 1)
            variants = {}
            for variant, model in self._variants.items():
                with _loading_back(variant, self._device):
                    variants[variant] = model.hidden_states(self._windows)[:, :-1].flatten(0, 1)
            return self._compare(source, variants)

    def _tell(self, share: float) -> None:
        """A share of the work with one model is done; whole tokens are told."""
        before = round(self._done_tokens)
        self._done_tokens += share * self._windows.numel()
        self._advance(round(self._done_tokens) - before)

    def _tell_layer_of(self, variant: str, n_bytes: int) -> None:
        self._tell_layer(self._variants[variant], n_bytes)

    def _tell_layer(self, model: StreamedModel, n_bytes: int) -> None:
        self._tell(n_bytes / model.size_bytes)

    @property
    def _models(self) -> Sequence[StreamedModel]:
        return [self._source, *self._variants.values()]

    def _compare(
        self, source_hidden: torch.Tensor, hidden: Mapping[str, torch.Tensor]
    ) -> dict[str, Metrics]:
        targets = self._windows[:, 1:].flatten().to(self._device)
        vocabulary = self._source.vocabulary_size
        with freed_blocks_kept():  # of few sizes; clearing new ones would take as long as computing
            source, variants, divergences = self._gathered(
                source_hidden, hidden, targets, vocabulary, self._tell
            )
        _refuse_non_finite(source, variants)
        return {
            variant: _metrics(source, predictions, divergences[variant])
            for variant, predictions in variants.items()
        }

    def _gathered(
        self,
        source_hidden: torch.Tensor,
        hidden: Mapping[str, torch.Tensor],
        targets: torch.Tensor,
        vocabulary: int,
        tell: Callable[[float], None] = lambda share: None,
    ) -> "tuple[_Predictions, dict[str, _Predictions], dict[str, _Divergence]]":
        """What the models predict of the first ``vocabulary`` entries after each of the hidden states.

        Args:
            source_hidden: (tokens, hidden size); those of the variants by their names in ``hidden``.
            targets: (tokens,) the ids that come next in the text.
            tell: is told the share of it that each step is.
        """
        source = _Predictions(targets)
        variants = {variant: _Predictions(targets) for variant in hidden}
        divergences = {variant: _Divergence(targets) for variant in hidden}
        for first in range(0, vocabulary, VOCABULARY_BLOCK):
            rows = (first, min(first + VOCABULARY_BLOCK, vocabulary))
            with ExitStack() as stack:
                heads = {}
                with running_the_source():
                    source_head = stack.enter_context(self._source.head_rows(*rows))
                for variant, model in self._variants.items():
                    with _loading_back(variant, self._device):
                        heads[variant] = stack.enter_context(model.head_rows(*rows))
                for start in range(0, len(targets), TOKEN_BLOCK):
                    at = slice(start, start + TOKEN_BLOCK)
                    with running_the_source():
                        reference = source_head(source_hidden[at])
                    shares, decay = source.add(at, first, reference)
                    for variant, head in heads.items():
                        with _loading_back(variant, self._device):
                            logits = head(hidden[variant][at])
                        variants[variant].add(at, first, logits)
                        divergences[variant].add(at, reference - logits, shares, decay)
                    tell(len(targets[at]) / len(targets) * (rows[1] - rows[0]) / vocabulary)
        return source, variants, divergences


@contextmanager
def running_the_source(hint: str = _ELSEWHERE) -> Iterator[None]:
    """A model's own forward may not be made for running layer by layer; it tells so in many ways.

    Args:
        hint: what to do where it does not run.

    Raises:
        CannotMeasure: it does not.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SmolquantError | OSError) or is_out_of_memory(error):
            raise
        raise _cannot_run("The model", error, hint) from error


@contextmanager
def _loading_back(variant: str, device: str) -> Iterator[None]:
    """What was made of a source that did run has to run as well, unless the device has no kernel for it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        if device != "cpu" and not isinstance(error, CheckpointError):
            raise _cannot_run(f"On {device}, {variant}", error) from error
        raise GateError(
            f"{variant} does not load back from the files that would be published: "
            f"{_first_words(error)}.",
            hint="Run it again; if it happens again, please report it with the model's name.",
        ) from error


@contextmanager
def _within_memory() -> Iterator[None]:
    """What a machine lacks is said of the machine, and not of what was made."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            f"Measuring ran out of memory: {_first_words(error)}.",
            hint="Use a machine with more memory, a smaller --eval-tokens, or --device cpu.",
        ) from error


def _cannot_run(what: str, error: Exception, hint: str = _ELSEWHERE) -> CannotMeasure:
    return CannotMeasure(f"{what} does not run layer by layer: {_first_words(error)}.", hint=hint)


def _first_words(error: Exception) -> str:
    if isinstance(error, SmolquantError):
        return error.message.rstrip(".")
    return error_words(error)


class _Predictions:
    """Next-token distributions of one model, gathered over blocks of the vocabulary.

    Sums of exponentials are kept relative to the largest logit so far, as in an online softmax
    (https://arxiv.org/abs/1805.02867), in float64.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        """``targets``: (tokens,) the ids that come next in the text."""
        self._targets = targets
        self._peak = torch.full(targets.shape, -math.inf, device=targets.device)
        self.total = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        self._target_logits = torch.zeros_like(self.total)
        self.best = torch.zeros_like(targets)

    def add(self, at: slice, first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the logits of vocabulary entries ``first`` and following for tokens ``at``.

        Returns:
            The exponentials of this block, and the factor that brings earlier ones to the same scale.
        """
        block_peak, block_best = logits.max(dim=-1)
        old_peak = self._peak[at]
        peak = torch.maximum(old_peak, block_peak)
        self.best[at] = torch.where(block_peak > old_peak, block_best + first, self.best[at])
        exponentials = torch.exp(logits - peak.unsqueeze(-1))
        decay = torch.exp((old_peak - peak).double())
        self.total[at] = self.total[at] * decay + exponentials.sum(dim=-1, dtype=torch.float64)
        self._peak[at] = peak
        column = self._targets[at] - first
        here = (column >= 0) & (column < logits.shape[1])
        picked = logits.gather(1, column.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self._target_logits[at] = torch.where(here, picked.double(), self._target_logits[at])
        return exponentials, decay

    @property
    def log_normalizer(self) -> torch.Tensor:
        """(tokens,) log of the sum of exponentials of all logits."""
        return self._peak.double() + self.total.log()

    @property
    def nll(self) -> torch.Tensor:
        """(tokens,) negative log-likelihood of the text's next token, in nats."""
        return self.log_normalizer - self._target_logits


class _Divergence:
    """Expected difference of logits under the source: what KL(source || variant) lacks but normalizers."""

    def __init__(self, targets: torch.Tensor) -> None:
        self._sum = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)

    def add(
        self, at: slice, difference: torch.Tensor, shares: torch.Tensor, decay: torch.Tensor
    ) -> None:
        """Take in (tokens, block) ``source - variant`` logits, weighted by the source's exponentials."""
        # A token that the source rules out (logit -inf) counts nothing, whatever the variant says.
        weighted = torch.where(shares > 0, shares * difference, 0.0)
        self._sum[at] = self._sum[at] * decay + weighted.sum(dim=-1, dtype=torch.float64)

    def of(self, source: _Predictions, variant: _Predictions) -> torch.Tensor:
        """(tokens,) KL(source || variant) in nats."""
        return self._sum / source.total - source.log_normalizer + variant.log_normalizer


def compared_seconds(entries: int, width: int, tokens: int) -> float:
    """Seconds for comparing what two models of no other content predict, to tell how long a run will take.

    Args:
        entries: of the vocabulary.
        width: the hidden size.
        tokens: as many as a run takes at once, or fewer.
    """
    head, states = torch.ones(entries, width), torch.ones(tokens, width)
    targets, at = torch.zeros(tokens, dtype=torch.int64), slice(0, tokens)
    source, variant = _Predictions(targets), _Predictions(targets)
    divergence = _Divergence(targets)
    started = time.perf_counter()
    reference, logits = (torch.nn.functional.linear(states, head) for _ in range(2))
    shares, decay = source.add(at, 0, reference)
    variant.add(at, 0, logits)
    divergence.add(at, reference - logits, shares, decay)
    return time.perf_counter() - started


def _refuse_non_finite(source: _Predictions, variants: Mapping[str, _Predictions]) -> None:
    if not bool(torch.isfinite(source.nll).all()):
        raise CheckpointError(
            "The source's own predictions are not finite: it computes NaN or infinity on plain text.",
            hint="The training run went wrong, or float16 is too narrow; take an earlier checkpoint.",
        )
    for variant, predictions in variants.items():
        if not bool(torch.isfinite(predictions.nll).all()):
            raise GateError(
                f"{variant} computes NaN or infinity where its source does not.",
                hint="Use --dtype bfloat16 if it is float16; otherwise leave this scheme out.",
            )


def _metrics(source: _Predictions, variant: _Predictions, divergence: _Divergence) -> Metrics:
    source_nll, nll = _mean(source.nll), _mean(variant.nll)
    return Metrics(
        perplexity=_rounded(math.exp(min(nll, _MOST_NATS))),
        source_perplexity=_rounded(math.exp(min(source_nll, _MOST_NATS))),
        perplexity_increase_percent=_rounded(100 * math.expm1(min(nll - source_nll, _MOST_NATS))),
        mean_kl=_rounded(_mean(divergence.of(source, variant))),
        top1_agreement=_rounded(_mean((source.best == variant.best).double())),
    )


def _mean(values: torch.Tensor) -> float:
    return math.fsum(values.tolist()) / values.numel()


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
