"""Runs a plan: reads rows, quantizes them for every variant, writes them where they belong.

Each block of rows is one task, done by one worker from reading to writing, so that reading,
arithmetic and writing overlap and every core is busy. The stored bytes depend neither on the block
size nor on the number of workers, because in every scheme a row depends on itself only.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from smolquant.checkpoint.reader import Checkpoint, SourceTensor, row_blocks
from smolquant.checkpoint.writer import ShardWriter
from smolquant.errors import CheckpointError
from smolquant.plan import PlannedTensor, VariantPlan
from smolquant.record import FileRecord, TensorRecord
from smolquant.schemes import Quantize, Scheme

BLOCK_BYTES = 1 << 20
"""Source bytes a task: about 256 rows of a 2048-wide bfloat16 weight, which stay in the cache."""

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
) -> dict[str, Written]:
    """Read the checkpoint once and write every planned variant.

    Args:
        folders: variant -> existing folder that receives its weight files.
        advance: told the source bytes of each finished block; called from any thread.

    Raises:
        CheckpointError: a tensor that cannot be read, is not finite, or does not fit its dtype.
        OSError: a full disk.
    """
    workers = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        outputs = [_Output(plan, folders[variant], stack) for variant, plan in plans.items()]
        pool = stack.enter_context(_one_torch_thread_each(workers))
        window = stack.enter_context(_Window(pool, workers * _TASKS_AHEAD))
        for tensor in checkpoint.layout.tensors.values():
            jobs = [job for output in outputs if (job := output.begin(tensor))]
            if not jobs:
                continue
            blocks = list(row_blocks(tensor, BLOCK_BYTES))
            for job in jobs:
                job.expect(len(blocks))
            for rows in blocks:
                window.submit(_do_block, checkpoint, tensor, rows, jobs, advance)
        window.finish()
        return {
            variant: Written(output.files(), output.tensors)
            for variant, output in zip(plans, outputs, strict=True)
        }


def _do_block(
    checkpoint: Checkpoint,
    tensor: SourceTensor,
    rows: tuple[int, int],
    jobs: "list[_Job]",
    advance: Callable[[int], None],
) -> None:
    block = checkpoint.read_rows(tensor, *rows)
    _refuse_non_finite(tensor.name, block)
    for job in jobs:
        job.do(block, rows[0])
    advance(block.numel() * block.element_size())


def _refuse_non_finite(name: str, block: torch.Tensor) -> None:
    if _is_finite(block):
        return
    kind = "NaN" if bool(torch.isnan(block).any()) else "infinity"
    raise CheckpointError(
        f"The weight {name!r} holds {kind}.",
        hint="The training run went wrong there; take an earlier checkpoint.",
    )


def _is_finite(block: torch.Tensor) -> bool:
    if not block.is_floating_point():
        return True
    # A finite sum proves that every value is finite, at a fraction of the price of looking at each.
    total = block.sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(torch.isfinite(block).all())


class _Output:
    """One variant being written."""

    def __init__(self, plan: VariantPlan, folder: Path, stack: ExitStack) -> None:
        self.plan = plan
        self.tensors: dict[str, TensorRecord] = {
            tensor.source.name: tensor.record() for tensor in plan.tensors
        }
        self._planned = {tensor.source.name: tensor for tensor in plan.tensors}
        self._writers = [stack.enter_context(ShardWriter(folder, shard)) for shard in plan.shards]
        self._by_part = {
            part.name: writer for writer in self._writers for part in writer.shard.tensors
        }

    def begin(self, tensor: SourceTensor) -> "_Job | None":
        """A job for ``tensor``; None where the plan does not store it."""
        planned = self._planned[tensor.name]
        if not planned.parts:
            return None
        writer = self._by_part[next(iter(planned.parts.values())).name]
        return _Job(self.plan.scheme, planned, writer, self.tensors)

    def files(self) -> dict[str, FileRecord]:
        """Finish every shard; name -> sha256 and size."""
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(ShardWriter.finish, self._writers))
        return {
            writer.shard.name: FileRecord(digest, writer.shard.size_bytes)
            for writer, digest in zip(self._writers, digests, strict=True)
        }


@dataclass
class _Job:
    """One tensor of one variant: row blocks arrive in any order, from any worker."""

    scheme: Scheme
    planned: PlannedTensor
    writer: ShardWriter
    tensors: dict[str, TensorRecord]
    _small: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parts whose rows do not lie one after the other; held whole (a scale a group), written last."""
    _errors: dict[int, tuple[float, float]] = field(default_factory=dict)
    """First row -> squared norms of (dequantized - weight) and of the weight."""
    _left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, blocks: int) -> None:
        self._left = blocks

    def do(self, block: torch.Tensor, start: int) -> None:
        cast = block.to(self.planned.dtype)
        if cast.dtype is not block.dtype and not _is_finite(cast):
            raise CheckpointError(
                f"The weight {self.planned.source.name!r} has values too large for {cast.dtype}.",
                hint="Use --dtype bfloat16, or an earlier checkpoint.",
            )
        if isinstance(self.planned.decision, Quantize):
            self._quantize(cast, start, self.planned.decision)
        else:
            self._keep(cast, start)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _keep(self, cast: torch.Tensor, start: int) -> None:
        row_bytes = cast[0].numel() * cast.element_size() if cast.ndim else 0
        self.writer.write(self.planned.parts[""].name, cast, start * row_bytes)

    def _quantize(self, weight: torch.Tensor, start: int, decision: Quantize) -> None:
        quantized = self.scheme.quantize(weight, decision.group_size)
        for part, stored in self.planned.parts.items():
            data: torch.Tensor = getattr(quantized, part)
            if self.scheme.row_axes[part] == 0:
                row_bytes = data[0].numel() * data.element_size()
                self.writer.write(stored.name, data, start * row_bytes)
            else:
                with self._lock:
                    whole = self._small.setdefault(
                        part, torch.empty(stored.shape, dtype=stored.dtype)
                    )
                whole[:, start : start + weight.shape[0]] = data
        exact = weight.float()
        error = self.scheme.dequantize(quantized).sub_(exact)
        norms = (_squared_norm(error), _squared_norm(exact))
        with self._lock:
            self._errors[start] = norms

    def _finish(self) -> None:
        for part, whole in self._small.items():
            self.writer.write(self.planned.parts[part].name, whole)
        self._small.clear()
        if self._errors:
            # Summed in row order, so that the record does not depend on which worker was faster.
            norms = [self._errors[row] for row in sorted(self._errors)]
            error, exact = (sum(squares) for squares in zip(*norms, strict=True))
            relative = math.sqrt(error / exact) if exact else 0.0
            if not math.isfinite(relative):
                raise CheckpointError(
                    f"The weight {self.planned.source.name!r} has values too large to quantize.",
                    hint="The training run went wrong there; take an earlier checkpoint.",
                )
            record = self.planned.record(float(f"{relative:.4g}"))
            self.tensors[self.planned.source.name] = record


def _squared_norm(values: torch.Tensor) -> float:
    flat = values.view(-1)
    return float(torch.dot(flat, flat))


class _Window:
    """Submits tasks while fewer than ``size`` wait, and raises the first failure of any."""

    def __init__(self, pool: ThreadPoolExecutor, size: int) -> None:
        self._pool, self._size = pool, size
        self._pending: set[Future[None]] = set()

    def submit(self, task: Callable[..., None], *arguments: object) -> None:
        while len(self._pending) >= self._size:
            self._drain(wait(self._pending, return_when="FIRST_COMPLETED").done)
        self._pending.add(self._pool.submit(task, *arguments))

    def _drain(self, done: set[Future[None]]) -> None:
        self._pending -= done
        for future in done:
            future.result()

    def __enter__(self) -> "_Window":
        return self

    def finish(self) -> None:
        """Wait for every task."""
        while self._pending:
            self._drain(wait(self._pending, return_when=FIRST_EXCEPTION).done)

    def __exit__(self, *_: object) -> None:
        if self._pending:
            self._pool.shutdown(wait=True, cancel_futures=True)


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
