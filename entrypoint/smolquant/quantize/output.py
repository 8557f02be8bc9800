"""A variant's weight files while they are written: tensors fill shards from any thread, and a full shard is
hashed and noted in the journal."""

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from smolquant.checkpoint.tensors import SourceTensor
from smolquant.checkpoint.writer import Shard, ShardWriter
from smolquant.quantize.planned import NormInFront, PlannedTensor, VariantPlan
from smolquant.quantize.workfolder import FinishedShard, Journal
from smolquant.record import FileRecord, TensorRecord
from smolquant.schemes import Quantize, Scheme
from smolquant.schemes.base import QuantizedRows

if TYPE_CHECKING:
    from smolquant.quantize.calibrate import CalibratedWeights


@dataclass(frozen=True)
class Written:
    """What a variant's quantization left on disk."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]


@dataclass(frozen=True)
class OutputFolder:
    """The folder for the shards of one variant, and what happens to each shard when it is full."""

    path: Path
    journal: Journal
    hashers: ThreadPoolExecutor
    open_files: ExitStack
    """Closes at its end the files that are still open."""
    send: Callable[[Path], None] | None
    """Moves a finished shard elsewhere; None where shards stay."""


class VariantOutput:
    """One variant being written."""

    def __init__(
        self, plan: VariantPlan, folder: OutputFolder, calibrated: "CalibratedWeights | None"
    ) -> None:
        self._plan = plan
        self._calibrated = calibrated
        self._planned = {tensor.source.name: tensor for tensor in plan.tensors}
        self._shards: dict[str, ShardOutput | None] = {}
        """Stored tensor -> the shard that receives it; None where that shard is finished already."""
        self._unfinished: list[ShardOutput] = []
        self._journal = folder.journal
        for finished in folder.journal.shards.values():
            # A journal is a file that lies about: what it says is held to the bounds like what is made now.
            plan.check_error_bounds({**finished.errors, **finished.bounded})
        for shard in plan.shards:
            output = None
            if shard.name not in folder.journal.shards:
                output = ShardOutput(shard, folder, plan.check_error_bounds)
                self._unfinished.append(output)
            self._shards |= {part.name: output for part in shard.tensors}
        for tensor in self._planned.values():
            if tensor.parts and (output := self._shard_of(tensor)):
                output.tensors_left += 1

    def needs_another_shard(self, tensor: SourceTensor) -> bool:
        """Whether ``tensor`` is the first one in its shard."""
        planned = self._planned[tensor.name]
        shard = self._shard_of(planned) if planned.parts else None
        return shard is not None and not shard.is_begun

    def wait_for_full_shards(self) -> None:
        """Wait until every shard whose last block is written is hashed and, where it has to be, sent."""
        for shard in self._unfinished:
            if not shard.tensors_left:
                shard.finished.result()

    @property
    def norms(self) -> list[NormInFront]:
        """The norms in front of weights that are not stored yet."""
        return [
            planned.norm
            for planned in self._planned.values()
            if planned.norm and self._shard_of(planned)
        ]

    def begin(
        self, tensor: SourceTensor, mean_squares: "Mapping[str, torch.Tensor | None]"
    ) -> "TensorJob | None":
        """A job for ``tensor``; None where the plan does not store it, or it is stored already.

        Args:
            mean_squares: norm -> the mean squares of its output's columns.
        """
        planned = self._planned[tensor.name]
        shard = self._shard_of(planned) if planned.parts else None
        if shard is None:
            return None
        shard.begin()
        known = mean_squares[planned.norm.norm.name] if planned.norm else None
        scheme = planned.scheme or self._plan.scheme
        return TensorJob(scheme, planned, shard, self._calibrated, known)

    def written(self) -> Written:
        """Wait until every shard is hashed."""
        for shard in self._unfinished:
            shard.finished.result()
        shards = [self._journal.shards[shard.name] for shard in self._plan.shards]
        errors = {name: error for shard in shards for name, error in shard.errors.items()}
        return Written(
            {shard.name: shard.file for shard in shards},
            {name: tensor.record(errors.get(name)) for name, tensor in self._planned.items()},
        )

    def _shard_of(self, planned: PlannedTensor) -> "ShardOutput | None":
        # All parts of a weight are in one shard.
        return self._shards[next(iter(planned.parts.values())).name]


class ShardOutput:
    """A shard that receives tensors from any thread, and is hashed and noted after the last."""

    def __init__(
        self, shard: Shard, folder: OutputFolder, check: Callable[[Mapping[str, float]], None]
    ) -> None:
        """Prepare a shard; the file is created by :meth:`begin`.

        Args:
            check: given the relative errors in the finished shard, raises where they are too large.
        """
        self.tensors_left = 0
        """The number of tensors that are not written yet."""
        self.finished: Future[None] = Future()
        self._shard, self._folder, self._check = shard, folder, check
        self._writer: ShardWriter | None = None
        self._errors: dict[str, float] = {}
        self._bounded: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def is_begun(self) -> bool:
        """Whether the file exists."""
        return self._writer is not None

    def begin(self) -> None:
        """Create the file, if that is not done yet; called from one thread only."""
        if self._writer is None:
            self._writer = ShardWriter(self._folder.path, self._shard)
            self._folder.open_files.callback(self._writer.close)

    @property
    def writer(self) -> ShardWriter:
        """The writer of the shard; only once it is begun."""
        assert self._writer is not None
        return self._writer

    def done(self, name: str, error: "RelativeError | None") -> None:
        """Note that the source tensor ``name`` is written, from any thread."""
        with self._lock:
            if error is not None:
                self._errors[name] = error.whole
                if error.bounded != error.whole:
                    self._bounded[name] = error.bounded
            self.tensors_left -= 1
            last = self.tensors_left == 0
        if last:
            self._folder.hashers.submit(self._finish)

    def _finish(self) -> None:
        try:
            errors = dict(sorted(self._errors.items()))
            bounded = dict(sorted(self._bounded.items()))
            self._check(errors | bounded)
            digest = self.writer.digest()
            self.writer.close()
            shard = self._shard
            self._folder.journal.add(
                FinishedShard(shard.name, shard.size_bytes, digest, errors, bounded)
            )
            if self._folder.send is not None:
                self._folder.send(self.writer.path)
        except BaseException as error:
            self.finished.set_exception(error)
        else:
            self.finished.set_result(None)


class RelativeError(NamedTuple):
    """How far a weight is from its source, in its norm, to four digits."""

    whole: float
    bounded: float
    """Without the rows for which the scheme has no bound."""


@dataclass
class TensorJob:
    """One tensor of one variant: row blocks arrive in any order, from any worker."""

    scheme: Scheme
    planned: PlannedTensor
    shard: ShardOutput
    calibrated: "CalibratedWeights | None"
    input_mean_squares: torch.Tensor | None
    """(K,): the mean square of each column of the weight's inputs; None where it is not known."""
    _whole_parts: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    """Matrix and part, of parts whose rows do not lie one after the other, such as the scales of groups.
    They are small, held until the matrix is whole, and written then."""
    _rows_left: dict[int, int] = field(default_factory=dict)
    """Matrix -> its rows that are not stored yet."""
    _errors: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    """First row -> squared norms: of (dequantized - weight), of its part without a bound, of the weight."""
    _blocks_left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def arithmetic(self) -> Hashable:
        """Equal for jobs that store the same bytes for the same weight with the same norm in front."""
        decision = self.planned.decision
        if isinstance(decision, Quantize):
            return self.planned.dtype, self.scheme.arithmetic, decision.group_size
        return self.planned.dtype, None

    def quantize(self, rows: torch.Tensor, start: int, group_size: int | None) -> QuantizedRows:
        """Quantize rows from row ``start`` on: as calibration did, or else by the scheme itself."""
        done = self.calibrated and self.calibrated.quantize_rows(self.planned.name, rows, start)
        return done or self.scheme.quantize_rows(rows, group_size, self.input_mean_squares)

    def expect(self, blocks: int) -> None:
        """Announce the number of blocks of rows that will come; an empty tensor has none."""
        self._blocks_left = blocks
        if not blocks:
            self._finish()

    def keep(self, rows: torch.Tensor, start: int) -> None:
        """Store ``rows``, from row ``start`` on, as they are."""
        row_bytes = rows[0].numel() * rows.element_size() if rows.ndim else 0
        self.shard.writer.write(self.planned.parts[""].name, rows, start * row_bytes)
        self._count_block()

    def store(self, quantized: QuantizedRows, start: int, stop: int) -> None:
        """Store the parts of rows [start, stop) of the source, which are of one matrix."""
        matrix, row = divmod(start, self.planned.matrix_rows)
        for part, stored in self.planned.parts.items():
            data = quantized.parts[part]
            if self.planned.transposed:  # all rows of a matrix
                size = data.numel() * data.element_size()
                oriented = data.t() if self.scheme.keeps_orientation else data
                self.shard.writer.write(stored.name, oriented, matrix * size)
            elif self.scheme.row_axes[part] == 0:
                row_bytes = data[0].numel() * data.element_size()
                self.shard.writer.write(stored.name, data, start * row_bytes)
            else:
                with self._lock:
                    whole = self._whole_parts.setdefault(
                        (matrix, part), torch.empty(stored.shape[-2:], dtype=stored.dtype)
                    )
                whole[:, row : row + data.shape[1]] = data
        with self._lock:
            self._errors[start] = (
                quantized.squared_error,
                quantized.without_bound,
                quantized.squared_norm,
            )
        self._write_whole_parts(matrix, stop - start)
        self._count_block()

    def _write_whole_parts(self, matrix: int, rows: int) -> None:
        """Write what was held of a matrix, if these rows are the last of it."""
        with self._lock:
            left = self._rows_left.get(matrix, self.planned.matrix_rows) - rows
            self._rows_left[matrix] = left
            done = [key for key in self._whole_parts if key[0] == matrix] if not left else []
            held = {part: self._whole_parts.pop((matrix, part)) for _, part in done}
        for part, whole in held.items():
            size = whole.numel() * whole.element_size()
            self.shard.writer.write(self.planned.parts[part].name, whole, matrix * size)

    def _count_block(self) -> None:
        with self._lock:
            self._blocks_left -= 1
            last = self._blocks_left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        self.shard.done(self.planned.source.name, self._relative_error())

    def _relative_error(self) -> RelativeError | None:
        """None for a tensor that is not quantized."""
        if not self._errors:
            return None
        # Summed in row order, so that the record does not depend on which worker was faster.
        norms = [self._errors[row] for row in sorted(self._errors)]
        error, without_bound, exact = (sum(squares) for squares in zip(*norms, strict=True))
        return RelativeError(_ratio(error, exact), _ratio(max(0.0, error - without_bound), exact))


def _ratio(squared_error: float, squared_norm: float) -> float:
    return float(f"{math.sqrt(squared_error / squared_norm) if squared_norm else 0.0:.4g}")
