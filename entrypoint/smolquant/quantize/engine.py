"""Runs a plan: reads rows, quantizes them for every variant, writes them where they belong.

Each block of rows is one task, done by one worker from reading to writing, so that reading,
arithmetic and writing overlap and every core is busy. A shard is hashed as soon as its last block is
written, beside the rest of the work; on a disk that is too small for all of them, it is handed on
before the next is begun. The stored bytes depend neither on the block size nor on the
number of workers, because in every scheme a row depends on itself and the norm in front only.
"""

import math
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import SourceTensor, row_blocks
from smolquant.checkpoint.writer import Shard, ShardWriter
from smolquant.errors import CheckpointError
from smolquant.memory import keep_freed_blocks
from smolquant.quantize.plan import NormInFront, PlannedTensor, VariantPlan
from smolquant.quantize.workfolder import FinishedShard, Journal
from smolquant.record import FileRecord, TensorRecord
from smolquant.schemes import Quantize, Scheme
from smolquant.schemes.base import QuantizedRows

if TYPE_CHECKING:
    from smolquant.quantize.calibrate import CalibratedWeights

BLOCK_BYTES = 1 << 21
"""Source bytes a task: 512 rows of a 2048-wide bfloat16 weight. Its float32 copies stay in the cache that
the cores share, and the interpreter's part in each task, and the disk's in each write, are small."""

_TASKS_AHEAD = 4
"""Queued tasks per worker: enough to keep the workers busy, few enough to bound memory."""


@dataclass(frozen=True)
class Written:
    """What a variant's quantization left on disk."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]


def quantize_checkpoint(
    checkpoint: Checkpoint,
    plans: Mapping[str, VariantPlan],
    folders: Mapping[str, Path],
    *,
    advance: Callable[[int], None],
    journals: Mapping[str, Journal] | None = None,
    calibrated: "Mapping[str, CalibratedWeights] | None" = None,
    send: Callable[[str, Path], None] | None = None,
) -> dict[str, Written]:
    """Read the checkpoint once and write every planned variant.

    Args:
        folders: variant -> existing folder that receives its weight files.
        advance: told the source bytes of each finished block; called from any thread.
        journals: variant -> the shards that are finished already, which are not touched again, and
            where to note those that this call finishes.
        calibrated: variant -> its weights that were found before.
        send: given a variant and a finished shard, takes it away. No variant then has more than one
            shard on disk, as the next is begun only when this has returned.

    Raises:
        CheckpointError: a tensor that cannot be read, is not finite, or does not fit its dtype.
        GateError: a weight came out further from its source than its scheme can put it.
        OSError: a full disk.
    """
    workers = len(os.sched_getaffinity(0))
    keep_freed_blocks()
    with ExitStack() as stack:
        # Entered first and so left last, when no worker writes to a file any more.
        opened = stack.enter_context(ExitStack())
        hashers = stack.enter_context(_hashers(workers))
        outputs = [
            _Output(
                plan,
                _Shelf(
                    folders[variant],
                    (journals or {}).get(variant, Journal()),
                    hashers,
                    opened,
                    send and partial(send, variant),
                ),
                (calibrated or {}).get(variant),
            )
            for variant, plan in plans.items()
        ]
        pool = stack.enter_context(_one_torch_thread_each(workers))
        mean_squares = _input_mean_squares(
            [norm for output in outputs for norm in output.norms], checkpoint, pool
        )
        window = stack.enter_context(_Window(pool, workers * _TASKS_AHEAD))
        for tensor in checkpoint.layout.tensors.values():
            if send and any(output.needs_another_shard(tensor) for output in outputs):
                window.finish()
                for output in outputs:
                    output.settle()
            jobs = [job for output in outputs if (job := output.begin(tensor, mean_squares))]
            if not jobs:
                if tensor.name not in checkpoint.layout.aliases:
                    advance(tensor.size_bytes)
                continue
            blocks = list(row_blocks(tensor, BLOCK_BYTES))
            shares = _shared(jobs)
            for job in jobs:
                job.expect(len(blocks))
            for rows in blocks:
                window.submit(_do_block, checkpoint, tensor, rows, shares, advance)
        window.finish()
        return {variant: output.written() for variant, output in zip(plans, outputs, strict=True)}


def _do_block(
    checkpoint: Checkpoint,
    tensor: SourceTensor,
    rows: tuple[int, int],
    shares: "Sequence[Sequence[_Job]]",
    advance: Callable[[int], None],
) -> None:
    block = checkpoint.read_rows(tensor, *rows)
    for jobs in shares:
        planned = jobs[0].planned
        cast = block.to(planned.dtype)
        if isinstance(planned.decision, Quantize):
            quantized = jobs[0].quantize(cast, rows[0], planned.decision.group_size)
            if not math.isfinite(quantized.squared_norm + quantized.squared_error):
                raise _unusable(tensor.name, block, cast)
            for job in jobs:
                job.store(quantized, rows[0])
        else:
            if not _is_finite(cast):
                raise _unusable(tensor.name, block, cast)
            for job in jobs:
                job.keep(cast, rows[0])
    advance(block.numel() * block.element_size())


def _unusable(name: str, block: torch.Tensor, cast: torch.Tensor) -> CheckpointError:
    """Why the values of ``block`` cannot be stored."""
    wrong_run = "The training run went wrong there; take an earlier checkpoint."
    if not _is_finite(block):
        kind = "NaN" if bool(torch.isnan(block).any()) else "infinity"
        return CheckpointError(f"The weight {name!r} holds {kind}.", hint=wrong_run)
    if not _is_finite(cast):
        return CheckpointError(
            f"The weight {name!r} has values too large for {cast.dtype}.",
            hint="Use --dtype bfloat16, or an earlier checkpoint.",
        )
    return CheckpointError(f"The weight {name!r} has values too large to quantize.", hint=wrong_run)


def _is_finite(block: torch.Tensor) -> bool:
    if not block.is_floating_point():
        return True
    # A finite sum proves that every value is finite, at a fraction of the price of looking at each.
    total = block.sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(torch.isfinite(block).all())


@dataclass(frozen=True)
class _Shelf:
    """Where the shards of one variant go, and what happens to each."""

    folder: Path
    journal: Journal
    hashers: ThreadPoolExecutor
    opened: ExitStack
    """Closes, at the end, whatever is left open."""
    send: Callable[[Path], None] | None


class _Output:
    """One variant being written."""

    def __init__(
        self, plan: VariantPlan, shelf: _Shelf, calibrated: "CalibratedWeights | None"
    ) -> None:
        self._plan = plan
        self._calibrated = calibrated
        self._planned = {tensor.source.name: tensor for tensor in plan.tensors}
        self._shards: dict[str, _ShardInWork | None] = {}
        """Stored tensor -> the shard that receives it; None where that is finished already."""
        self._in_work: list[_ShardInWork] = []
        self._journal = shelf.journal
        for finished in shelf.journal.shards.values():
            plan.check_error_bounds(
                finished.errors
            )  # the version that made them may not have looked
        for shard in plan.shards:
            in_work = None
            if shard.name not in shelf.journal.shards:
                in_work = _ShardInWork(shard, shelf, plan.check_error_bounds)
                self._in_work.append(in_work)
            self._shards |= {part.name: in_work for part in shard.tensors}
        for tensor in self._planned.values():
            if tensor.parts and (in_work := self._shard_of(tensor)):
                in_work.left += 1

    def needs_another_shard(self, tensor: SourceTensor) -> bool:
        """Whether ``tensor`` is the first of its shard."""
        planned = self._planned[tensor.name]
        shard = self._shard_of(planned) if planned.parts else None
        return shard is not None and not shard.is_begun

    def settle(self) -> None:
        """Wait until every shard whose last block is written is gone."""
        for shard in self._in_work:
            if not shard.left:
                shard.finished.result()

    @property
    def norms(self) -> list[NormInFront]:
        """In front of weights that are not stored yet."""
        return [
            planned.norm
            for planned in self._planned.values()
            if planned.norm and self._shard_of(planned)
        ]

    def begin(
        self, tensor: SourceTensor, mean_squares: "Mapping[str, torch.Tensor | None]"
    ) -> "_Job | None":
        """A job for ``tensor``; None where the plan does not store it, or it is stored already.

        Args:
            mean_squares: norm -> those of its output's columns.
        """
        planned = self._planned[tensor.name]
        shard = self._shard_of(planned) if planned.parts else None
        if shard is None:
            return None
        shard.begin()
        known = mean_squares[planned.norm.norm.name] if planned.norm else None
        scheme = planned.scheme or self._plan.scheme
        return _Job(scheme, planned, shard, self._calibrated, known)

    def written(self) -> Written:
        """Wait until every shard is hashed."""
        for shard in self._in_work:
            shard.finished.result()
        shards = [self._journal.shards[shard.name] for shard in self._plan.shards]
        errors = {name: error for shard in shards for name, error in shard.errors.items()}
        return Written(
            {shard.name: FileRecord(shard.sha256, shard.size) for shard in shards},
            {name: tensor.record(errors.get(name)) for name, tensor in self._planned.items()},
        )

    def _shard_of(self, planned: PlannedTensor) -> "_ShardInWork | None":
        # All parts of a weight are in one shard.
        return self._shards[next(iter(planned.parts.values())).name]


class _ShardInWork:
    """A shard that receives tensors from any thread, and is hashed and noted after the last."""

    def __init__(
        self, shard: Shard, shelf: _Shelf, accept: Callable[[Mapping[str, float]], None]
    ) -> None:
        """``accept``: given the relative errors in the finished shard, raises where they are too large."""
        self.left = 0
        """Tensors still to come."""
        self.finished: Future[None] = Future()
        self._shard, self._shelf, self._accept = shard, shelf, accept
        self._writer: ShardWriter | None = None
        self._errors: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def is_begun(self) -> bool:
        return self._writer is not None

    def begin(self) -> None:
        """Create the file, if that is not done yet; called from one thread only."""
        if self._writer is None:
            self._writer = ShardWriter(self._shelf.folder, self._shard)
            self._shelf.opened.callback(self._writer.close)

    @property
    def writer(self) -> ShardWriter:
        """Of the shard, once begun."""
        assert self._writer is not None
        return self._writer

    def done(self, name: str, relative_error: float | None) -> None:
        """Source tensor ``name`` is written."""
        with self._lock:
            if relative_error is not None:
                self._errors[name] = relative_error
            self.left -= 1
            last = self.left == 0
        if last:
            self._shelf.hashers.submit(self._finish)

    def _finish(self) -> None:
        try:
            errors = dict(sorted(self._errors.items()))
            self._accept(errors)
            digest = self.writer.digest()
            self.writer.close()
            shard = self._shard
            self._shelf.journal.add(FinishedShard(shard.name, shard.size_bytes, digest, errors))
            if self._shelf.send is not None:
                self._shelf.send(self.writer.path)
        except BaseException as error:
            self.finished.set_exception(error)
        else:
            self.finished.set_result(None)


@dataclass
class _Job:
    """One tensor of one variant: row blocks arrive in any order, from any worker."""

    scheme: Scheme
    planned: PlannedTensor
    shard: _ShardInWork
    calibrated: "CalibratedWeights | None"
    input_mean_squares: torch.Tensor | None
    """(K,), of the weight's inputs, as far as they are known."""
    _small: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parts whose rows do not lie one after the other; held whole (a scale a group), written last."""
    _errors: dict[int, tuple[float, float]] = field(default_factory=dict)
    """First row -> squared norms of (dequantized - weight) and of the weight."""
    _left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def arithmetic(self) -> Hashable:
        """What the stored bytes depend on beside the weight, and the norm in front, which is its own."""
        decision = self.planned.decision
        if isinstance(decision, Quantize):
            return self.planned.dtype, self.scheme.arithmetic, decision.group_size
        return self.planned.dtype, None

    def quantize(self, rows: torch.Tensor, start: int, group_size: int | None) -> QuantizedRows:
        """Rows from row ``start`` on: as calibration found them, or else by the scheme itself."""
        found = self.calibrated and self.calibrated.quantize_rows(self.planned.name, rows, start)
        return found or self.scheme.quantize_rows(rows, group_size, self.input_mean_squares)

    def expect(self, blocks: int) -> None:
        """``blocks`` blocks of rows will come; none for an empty tensor."""
        self._left = blocks
        if not blocks:
            self._finish()

    def keep(self, rows: torch.Tensor, start: int) -> None:
        """Store ``rows``, from row ``start`` on, as they are."""
        row_bytes = rows[0].numel() * rows.element_size() if rows.ndim else 0
        self.shard.writer.write(self.planned.parts[""].name, rows, start * row_bytes)
        self._one_less()

    def store(self, quantized: QuantizedRows, start: int) -> None:
        """Store the parts of rows from row ``start`` on."""
        for part, stored in self.planned.parts.items():
            data = quantized.parts[part]
            if self.scheme.row_axes[part] == 0:
                row_bytes = data[0].numel() * data.element_size()
                self.shard.writer.write(stored.name, data, start * row_bytes)
            else:
                with self._lock:
                    whole = self._small.setdefault(
                        part, torch.empty(stored.shape, dtype=stored.dtype)
                    )
                whole[:, start : start + data.shape[1]] = data
        with self._lock:
            self._errors[start] = (quantized.squared_error, quantized.squared_norm)
        self._one_less()

    def _one_less(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        for part, whole in self._small.items():
            self.shard.writer.write(self.planned.parts[part].name, whole)
        self._small.clear()
        self.shard.done(self.planned.source.name, self._relative_error())

    def _relative_error(self) -> float | None:
        """To four digits; None for what is kept."""
        if not self._errors:
            return None
        # Summed in row order, so that the record does not depend on which worker was faster.
        norms = [self._errors[row] for row in sorted(self._errors)]
        error, exact = (sum(squares) for squares in zip(*norms, strict=True))
        return float(f"{math.sqrt(error / exact) if exact else 0.0:.4g}")


def _input_mean_squares(
    norms: Sequence[NormInFront], checkpoint: Checkpoint, pool: ThreadPoolExecutor
) -> dict[str, torch.Tensor | None]:
    """What each norm tells of the columns of its output, by the norm's name; a few kB each.

    Read before the weights, which lie on either side of it. In file order, because a pickle of the old
    format is loaded whole for it; and several at a time, because the Hub may be far.
    """
    place = {name: i for i, name in enumerate(checkpoint.layout.tensors)}

    def read(front: NormInFront) -> torch.Tensor | None:
        values = {
            attribute: checkpoint.read_rows(source, 0, source.rows, sequential=False)
            for attribute, source in front.sources.items()
        }
        return front.norm.input_mean_squares(values, front.columns)

    fronts = {front.norm.name: front for front in norms}
    ordered = sorted(
        fronts.values(),
        key=lambda front: min(place[source.name] for source in front.sources.values()),
    )
    return {
        front.norm.name: found
        for front, found in zip(ordered, pool.map(read, ordered), strict=True)
    }


def _shared(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """``jobs`` of one tensor, those together that store the same bytes of it."""
    shares: dict[Hashable, list[_Job]] = {}
    for job in jobs:
        shares.setdefault(job.arithmetic, []).append(job)
    return list(shares.values())


class _Window:
    """Submits tasks while fewer than ``size`` wait, and raises the first failure of any."""

    def __init__(self, pool: ThreadPoolExecutor, size: int) -> None:
        self._pool, self._size = pool, size
        self._pending: set[Future[None]] = set()

    def submit(self, task: Callable[..., None], *arguments: object) -> None:
        while len(self._pending) >= self._size:
            self._drain()
        self._pending.add(self._pool.submit(task, *arguments))

    def _drain(self) -> None:
        done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()

    def __enter__(self) -> "_Window":
        return self

    def finish(self) -> None:
        """Wait for every task."""
        while self._pending:
            self._drain()

    def __exit__(self, *_: object) -> None:
        if self._pending:
            self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _hashers(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that, after a failure, begins with no shard that still waits to be hashed and sent."""
    with ThreadPoolExecutor(workers, "hash") as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_torch_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers do not each start a team of threads of torch's own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            workers, "quantize", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
