"""What planning costs for checkpoints of unusual shapes: very deep, in many files, of many tensors.

``python bench/scale.py`` (or ``make bench-scale``) makes each, plans it in a dry run, a process of its own,
and prints seconds of computing, which show where work grows faster than the checkpoint.
"""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from transformers import LlamaConfig  # noqa: E402

import models  # noqa: E402

NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
BIASED = {"attention_bias": True, "mlp_bias": True}

CASES: Mapping[str, tuple[Mapping[str, object], str | None]] = {
    "2,000 layers": ({"num_hidden_layers": 2_000}, None),
    "60,000 tensors": ({**NARROW, **BIASED, "num_hidden_layers": 3_750}, None),
    "430 shards": ({"num_hidden_layers": 60}, "10KB"),
}
"""Name -> what differs from a small Llama, and the size of its shards; None for one file of zeros."""


def main() -> None:
    """Plan each case, and print what it took."""
    for name, (shape, shard_size) in CASES.items():
        config = LlamaConfig(**models.SIZES | dict(shape))
        with tempfile.TemporaryDirectory(prefix="smolquant-scale-") as place:
            folder = Path(place) / "model"
            if shard_size is None:
                models.save_zeros(folder, config)
            else:
                models.save(folder, config, max_shard_size=shard_size)
            print(f"{name}: {_seconds(folder):.1f} s of computing", flush=True)


def _seconds(folder: Path) -> float:
    """Seconds of computing that a dry run takes, imports included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        "-m",
        "smolquant",
        "quantize",
        str(folder),
        "--save-only",
        "--dry-run",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
