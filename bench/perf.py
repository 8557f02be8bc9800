"""What quantizing costs, measured as whole processes, against stock transformers and the machine's limits.

``python bench/perf.py`` (or ``make bench``) builds its own input and writes docs/performance.md. SIZE
picks another input, ROUNDS how often each is measured. The cases take turns, so that what else the
machine does meets all of them; medians are reported.
"""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".bench"
REPORT = ROOT / "docs/performance.md"

SIZES: Mapping[str, Mapping[str, int]] = {
    "0.1": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "0.3": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
    },
    "1": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 10,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
    },
    "3": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
    },
}
"""Billions of parameters -> shape: SmolLM2-135M, SmolLM2-360M, ten layers of SmolLM3-3B, SmolLM3-3B."""

OURS: Sequence[Sequence[str]] = (
    ("int8_weight_only",),
    ("int8_dynamic",),
    ("float8_weight_only",),
    ("int4_weight_only", "--int4-method", "rtn"),
    ("both", "--int4-method", "rtn"),
    ("int4_weight_only",),
    ("both",),
)
"""A quantization type, and options."""

BUILD = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, SmolLM3Config
from smolquant.checkpoint.tensors import StoredTensor
from smolquant.checkpoint.writer import ShardWriter, index_text, lay_out

folder, shape = Path(sys.argv[1]), dict(pair.split("=") for pair in sys.argv[2:])
sizes = {name: int(size) for name, size in shape.items()}
config = SmolLM3Config(**sizes, tie_word_embeddings=True, pad_token_id=0)
config.architectures, config.dtype = ["SmolLM3ForCausalLM"], "bfloat16"
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
tensors = [StoredTensor(n, p.dtype, tuple(p.shape)) for n, p in model.named_parameters()]
torch.manual_seed(0)
shards = lay_out([[tensor] for tensor in tensors], {"format": "pt"}, 2 * 10**9)
for shard in shards:
    with ShardWriter(folder, shard) as writer:
        for tensor in shard.tensors:
            is_norm = len(tensor.shape) == 1
            values = torch.empty(tensor.shape, dtype=tensor.dtype)
            writer.write(tensor.name, values.fill_(1) if is_norm else values.normal_(0, 0.02))
if (index := index_text(shards)) is not None:
    (folder / "model.safetensors.index.json").write_text(index)
config.save_pretrained(folder)
"""

STOCK = """
import sys
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype="auto", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
)
model.save_pretrained(sys.argv[2])
"""

READ = """
import sys
from pathlib import Path

buffer = bytearray(8 << 20)
for path in Path(sys.argv[1]).glob("*.safetensors"):
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""

WRITE = """
import os, sys
from pathlib import Path

folder, left = Path(sys.argv[2]), int(sys.argv[1])
folder.mkdir()
block = os.urandom(8 << 20)
with (folder / "data").open("wb", buffering=0) as file:
    while left > 0:
        left -= file.write(block[:left])
    os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Sample:
    """One process, from start to end."""

    seconds: float
    cpu_seconds: float
    """User and system time, which tells more than the wall where other work shares the machine."""
    peak_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Case:
    """Something to measure: arguments of a Python interpreter, given the output folder."""

    name: str
    source: Path
    arguments: Callable[[Path], Sequence[str]]

    def measure(self) -> Sample:
        """Run it once; what it wrote is removed."""
        output = WORK / "output"
        shutil.rmtree(output, ignore_errors=True)
        # What the case before has left to write, or pushed out of the cache, is not this one's cost.
        os.sync()
        start(["-c", READ, str(self.source)]).wait()
        started = time.monotonic()
        process = start(self.arguments(output))
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{self.name} failed, see {WORK / 'log'}")
        written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        shutil.rmtree(output, ignore_errors=True)
        # The peak of the process, and of no parent: this one never holds more than a few megabytes.
        return Sample(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, written)


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """A Python process whose output goes to the log."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "entrypoint"),
        "HF_HUB_OFFLINE": "1",
        "TRACKIO_DIR": str(WORK / "trackio"),
    }
    with (WORK / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, *arguments], env=environ, stdout=log, stderr=log)


def build(size: str) -> Path:
    """The checkpoint of ``size`` billion parameters, made once."""
    folder = WORK / f"input-{size}"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shape = [f"{name}={value}" for name, value in SIZES[size].items()]
        if start(["-c", BUILD, str(folder), *shape]).wait():
            raise SystemExit(f"The input could not be built, see {WORK / 'log'}")
    return folder


def ours(source: Path, *asked: str) -> Case:
    """The command as a user runs it, with a quantization type and options."""
    options = ["--save-only", "--evaluate", "never", "--quant-type", *asked, "--output-dir"]
    command = ["-m", "smolquant", "quantize", str(source), *options]
    return Case(f"smolquant, {' '.join(asked)}", source, lambda output: [*command, str(output)])


def medians(cases: Sequence[Case], rounds: int) -> dict[str, Sample]:
    """By name; the cases take turns."""
    samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
    for number in range(1, rounds + 1):
        for case in cases:
            sample = case.measure()
            samples[case.name].append(sample)
            print(f"round {number}: {case.name}: {sample.seconds:.1f} s", flush=True)
    return {
        name: Sample(
            statistics.median(sample.seconds for sample in taken),
            statistics.median(sample.cpu_seconds for sample in taken),
            int(statistics.median(sample.peak_bytes for sample in taken)),
            taken[0].written_bytes,
        )
        for name, taken in samples.items()
    }


def compare(size: str, rounds: int) -> str:
    """The table of all cases on one input."""
    source = build(size)
    first = ours(source, "int8_weight_only").measure()
    stock = Case(
        "stock transformers + torchao, int8",
        source,
        lambda output: ["-c", STOCK, str(source), str(output)],
    )
    read = Case("limit: reading the source once", source, lambda output: ["-c", READ, str(source)])
    write = Case(
        "limit: writing the int8 output once, with fsync",
        source,
        lambda output: ["-c", WRITE, str(first.written_bytes), str(output)],
    )
    found = medians([stock, *(ours(source, *asked) for asked in OURS), read, write], rounds)
    limit = found[read.name].seconds + found[write.name].seconds
    rows = [
        f"| {name} | {sample.seconds:.1f} s | {sample.cpu_seconds:.1f} s "
        f"| {found[stock.name].seconds / sample.seconds:.1f} x | {sample.seconds / limit:.1f} x "
        f"| {sample.peak_bytes / 1e9:.2f} GB "
        f"| {sample.written_bytes / 1e9:.2f} GB |"
        for name, sample in found.items()
    ]
    header = "| | wall | CPU | faster than stock | of reading + writing | peak memory | written |"
    return "\n".join([header, "|---|--:|--:|--:|--:|--:|--:|", *rows])


def growth(sizes: Sequence[str], rounds: int) -> str:
    """The table of what int8_weight_only costs as the model grows."""
    rows = []
    for size in sizes:
        source = build(size)
        read_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        case = ours(source, "int8_weight_only")
        sample = medians([case], rounds)[case.name]
        rows.append(
            f"| {size} B | {read_bytes / 1e9:.2f} GB | {sample.seconds:.1f} s "
            f"| {sample.cpu_seconds:.1f} s | {sample.peak_bytes / 1e9:.2f} GB |"
        )
    return "\n".join(
        ["| parameters | source | wall | CPU | peak memory |", "|--:|--:|--:|--:|--:|", *rows]
    )


def main() -> None:
    """Measure, print and write the report."""
    size, rounds = os.environ.get("SIZE", "3"), int(os.environ.get("ROUNDS", "3"))
    if size not in SIZES:
        raise SystemExit(f"SIZE={size} is not one of {', '.join(SIZES)}.")
    WORK.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchao", "transformers"))
    cores = len(os.sched_getaffinity(0))
    report = f"""# Performance

Made by `make bench`: whole processes, imports included, taking turns, medians of {rounds}, with
`--save-only --evaluate never`; the input is in the page cache. {platform.machine()}, {cores} cores,
load {load:.1f} at the start; {stack}.

## SmolLM3-shaped, {size} B parameters, random bfloat16 weights

{compare(size, rounds)}

## How the cost grows

{growth([name for name in SIZES if float(name) <= float(size)], rounds)}
"""
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
