"""What quantizing a mixture of experts costs beside a dense model of the same bytes, as whole processes.

``python bench/experts.py`` (or ``make bench-experts``) builds both and prints a table. The mixture is
shaped like Qwen3-MoE, with 128 experts a layer, one matrix each in its files. ROUNDS says how often each is
measured; the cases take turns, and medians are reported.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from perf import ROOT, WORK, medians, ours, start


def built(name: str) -> Path:
    """A checkpoint of mixture.py's, made once."""
    folder = WORK / f"input-{name}"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if start([str(ROOT / "bench/mixture.py"), name, str(folder)]).wait():
            raise SystemExit(f"The input could not be built, see {WORK / 'log'}")
    return folder


def main() -> None:
    """Measure and print."""
    WORK.mkdir(exist_ok=True)
    inputs = {name: built(name) for name in ("dense", "mixture")}
    sizes = {
        name: sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for name, folder in inputs.items()
    }
    cases = {
        (name, asked): replace(ours(folder, asked), name=f"{name}, {asked}")
        for asked in ("int8_weight_only", "int4_weight_only")
        for name, folder in inputs.items()
    }
    found = medians(list(cases.values()), int(os.environ.get("ROUNDS", "3")))
    print("| | source | wall | CPU | source a second | peak memory |\n|---|--:|--:|--:|--:|--:|")
    for (name, _), case in cases.items():
        sample = found[case.name]
        print(
            f"| {case.name} | {sizes[name] / 1e9:.2f} GB | {sample.seconds:.1f} s "
            f"| {sample.cpu_seconds:.1f} s | {sizes[name] / sample.seconds / 1e9:.2f} GB/s "
            f"| {sample.peak_bytes / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    main()
