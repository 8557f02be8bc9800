"""Runs a plan: reads rows, quantizes them for every variant, and writes them where they belong.

Each block of rows is one task, done by one worker from reading to writing, so that reading,
arithmetic and writing overlap and every core is busy. A shard is hashed as soon as its last block is
written, beside the rest of the work; on a disk that is too small for all of them, it is sent before the
next is begun. The stored bytes depend neither on the block size nor on the number of workers, because in
every scheme a row depends only on itself and on the norm in front.
"""

import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import ConvertedTensor, JoinedTensor, SourceTensor, row_blocks
from smolquant.errors import CheckpointError
from smolquant.memory import keep_freed_blocks
from smolquant.quantize.output import OutputFolder, TensorJob, VariantOutput, Written
from smolquant.quantize.planned import NormInFront, VariantPlan
from smolquant.quantize.workfolder import Journal
from smolquant.schemes import Quantize
from smolquant.schemes.base import QuantizedRows, squared_norm

if TYPE_CHECKING:
    from smolquant.quantize.calibrate import CalibratedWeights

BLOCK_BYTES = 1 << 21
"""Source bytes per task: 512 rows of a 2048-wide bfloat16 weight. Their float32 copies stay in the cache
that the cores share, and the interpreter's part in each task, and the disk's in each write, are small."""

_ROUNDING = 2.0**-8
"""More of a weight's norm than rounding it to float16, or from bfloat16, can cost."""

_TASKS_AHEAD = 4
"""Queued tasks per worker: enough to keep the workers busy, few enough to bound memory."""


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
        advance: called with the source bytes of each finished block, from any thread.
        journals: variant -> the shards that are finished already, which are not touched again, and
            where to note those that this call finishes.
        calibrated: variant -> its weights that calibration has computed before.
        send: given a variant and a finished shard, moves it elsewhere. No variant then has more than
            one shard on disk, as the next is begun only when this has returned.

    Raises:
        CheckpointError: a tensor cannot be read, is not finite, or does not fit its dtype.
        GateError: a quantized weight is further from its source than its scheme can put it.
        OSError: the disk is full.
    """
    workers = len(os.sched_getaffinity(0))
    sources = [planned.source for planned in next(iter(plans.values())).tensors]
    keep_freed_blocks()
    with ExitStack() as stack:
        # Entered first and so left last, when no worker writes to a file any more.
        open_files = stack.enter_context(ExitStack())
        hashers = stack.enter_context(_hashers(workers))
        outputs = {
            variant: VariantOutput(
                plan,
                OutputFolder(
                    folders[variant],
                    (journals or {}).get(variant, Journal()),
                    hashers,
                    open_files,
                    send and partial(send, variant),
                ),
                (calibrated or {}).get(variant),
            )
            for variant, plan in plans.items()
        }
        pool = stack.enter_context(_one_torch_thread_each(workers))
        norms = [norm for output in outputs.values() for norm in output.norms]
        mean_squares = _input_mean_squares(norms, sources, checkpoint, pool)
        tasks = stack.enter_context(_TaskQueue(pool, workers * _TASKS_AHEAD))
        for tensor in sources:
            if send and any(output.needs_another_shard(tensor) for output in outputs.values()):
                tasks.finish()
                for output in outputs.values():
                    output.wait_for_full_shards()
            jobs = [job for o in outputs.values() if (job := o.begin(tensor, mean_squares))]
            _submit_blocks(tasks, checkpoint, tensor, jobs, advance)
        tasks.finish()
        return {variant: output.written() for variant, output in outputs.items()}


def _submit_blocks(
    tasks: "_TaskQueue",
    checkpoint: Checkpoint,
    tensor: SourceTensor,
    jobs: Sequence[TensorJob],
    advance: Callable[[int], None],
) -> None:
    """Have every block of rows of ``tensor`` processed for all ``jobs``; without jobs it is done."""
    if not jobs:
        if tensor.name not in checkpoint.layout.aliases:
            advance(tensor.size_bytes)
        return
    blocks = _blocks(tensor, jobs)
    groups = _by_stored_bytes(jobs)
    for job in jobs:
        job.expect(len(blocks))
    read: Read = partial(checkpoint.read_rows, tensor)
    if isinstance(tensor, ConvertedTensor):
        tasks.finish()  # so that one of them is in memory at a time, and nothing beside it
        whole = checkpoint.read_rows(tensor, 0, tensor.rows)
        read = partial(_rows_of, whole)
    for rows in _in_file_order(blocks, tensor, checkpoint.places):
        tasks.submit(_process_block, read, tensor, rows, groups, advance)
    if isinstance(tensor, ConvertedTensor):
        tasks.finish()


def _in_file_order(
    blocks: Sequence[tuple[int, int]], tensor: SourceTensor, places: Mapping[str, int]
) -> Sequence[tuple[int, int]]:
    """Blocks as they lie in the files, which sort experts by name, 10 before 2; far away, order is time."""
    if not isinstance(tensor, JoinedTensor):
        return blocks
    first = {rows: next(tensor.pieces_of(*rows))[0] for rows in blocks}
    return sorted(blocks, key=lambda rows: places[first[rows].name])


Read = Callable[[int, int], torch.Tensor]
"""Rows [start, stop) of one tensor of the source."""


def _rows_of(whole: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return whole[start:stop]


def _blocks(tensor: SourceTensor, jobs: Sequence[TensorJob]) -> list[tuple[int, int]]:
    """Ranges of rows; of a stack that is quantized within one matrix each, and transposed ones whole."""
    quantized = [job.planned for job in jobs if isinstance(job.planned.decision, Quantize)]
    if not quantized:
        return list(row_blocks(tensor, BLOCK_BYTES))
    block_bytes = tensor.size_bytes if quantized[0].transposed else BLOCK_BYTES
    return list(row_blocks(tensor, block_bytes, within=quantized[0].matrix_rows))


def _process_block(
    read_rows: Read,
    tensor: SourceTensor,
    rows: tuple[int, int],
    groups: Sequence[Sequence[TensorJob]],
    advance: Callable[[int], None],
) -> None:
    read = read_rows(*rows)
    for jobs in groups:
        planned = jobs[0].planned
        block = read.t().contiguous() if planned.transposed else read
        cast = block.to(planned.dtype)
        if isinstance(planned.decision, Quantize):
            quantized = jobs[0].quantize(cast, rows[0], planned.decision.group_size)
            if not math.isfinite(quantized.squared_norm + quantized.squared_error):
                raise _unusable(tensor.name, block, cast)
            quantized = _with_loss_of_casting(quantized, block, cast)
            for job in jobs:
                job.store(quantized, *rows)
        else:
            if not _is_finite(cast):
                raise _unusable(tensor.name, block, cast)
            for job in jobs:
                job.keep(cast, rows[0])
    advance(read.numel() * read.element_size())


def _with_loss_of_casting(
    quantized: QuantizedRows, block: torch.Tensor, cast: torch.Tensor
) -> QuantizedRows:
    """What is stored of ``cast``, with its error where ``block`` has numbers too small for float16.

    Rounding to a dtype's mantissa is no error of a scheme's; a weight that becomes zero is one to say.
    """
    if cast.dtype is not torch.float16 or block.dtype is torch.float16:
        return quantized
    exact = block.float()
    norm, lost = squared_norm(exact), squared_norm(exact - cast.float())
    if lost <= _ROUNDING**2 * norm:
        return quantized
    return replace(
        quantized,
        squared_error=quantized.squared_error + lost,
        squared_norm=norm,
        without_bound=quantized.without_bound + lost,
    )


def _unusable(name: str, block: torch.Tensor, cast: torch.Tensor) -> CheckpointError:
    """The error that says why the values of ``block`` cannot be stored."""
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


def _input_mean_squares(
    norms: Sequence[NormInFront],
    sources: Sequence[SourceTensor],
    checkpoint: Checkpoint,
    pool: ThreadPoolExecutor,
) -> dict[str, torch.Tensor | None]:
    """The mean squares of the columns of each norm's output, by the norm's name; a few kB each.

    Norms are read before the weights, which lie on either side of them. They are read in file order,
    because a pickle of the old format is loaded whole for it, and several at a time, because the Hub may
    be far.
    """
    place = {tensor.name: i for i, tensor in enumerate(sources)}

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
        front.norm.name: mean_squares
        for front, mean_squares in zip(ordered, pool.map(read, ordered), strict=True)
    }


def _by_stored_bytes(jobs: Sequence[TensorJob]) -> list[list[TensorJob]]:
    """The jobs for one tensor, in groups that store the same bytes for it."""
    groups: dict[Hashable, list[TensorJob]] = {}
    for job in jobs:
        groups.setdefault(job.arithmetic, []).append(job)
    return list(groups.values())


class _TaskQueue:
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

    def __enter__(self) -> "_TaskQueue":
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
    """A pool that, after a failure, drops the shards that still wait to be hashed and sent."""
    with ThreadPoolExecutor(workers, "hash") as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_torch_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers compute in one thread each, without torch's own thread pools."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            workers, "quantize", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
