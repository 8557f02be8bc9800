"""`make families`: see docs/families.md, which it writes."""

import argparse
import json
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/families.md"

_MEMORY = 6 << 30
"""Bytes; the small models take a tenth of it, but a config that is not shrunk enough may ask for more."""


def main() -> None:
    """Try what was asked for, and write the page if that was everything."""
    options = _options()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from families import page
    from families.forked import run_forked
    from families.kinds import all_kinds
    from families.prove import prove

    kinds = [kind for kind in all_kinds() if _wanted(kind.key, options.only)]
    options.results.mkdir(exist_ok=True)
    places = {kind.key: options.results / f"{kind.key.replace('/', '--')}.json" for kind in kinds}
    todo = [kind for kind in kinds if options.fresh or not places[kind.key].is_file()]
    print(f"{len(kinds)} families, {len(kinds) - len(todo)} of them done before", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        ends = run_forked(
            partial(prove, quant_types=options.schemes),
            todo,
            Path(folder),
            jobs=options.jobs,
            seconds=options.seconds,
            memory=_MEMORY,
        )
        for number, ended in enumerate(ends, 1):
            found = ended.result or {
                "key": ended.task.key,
                "class": ended.task.class_name,
                "broke": ended.failure,
                "outcomes": {},
            }
            found["seconds"] = round(ended.seconds, 1)
            places[ended.task.key].write_text(json.dumps(found, indent=1))
            print(f"{number}/{len(todo)} {_told(found)}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    results = [json.loads(place.read_text()) for place in places.values()]
    if not options.only:
        PAGE.write_text(page.text(results, options.schemes))
    if any(_is_wrong(one) for one in results):
        raise SystemExit("Some variants are not what they say they are.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="families", description=__doc__)
    parser.add_argument("only", nargs="*", help="causal/llama, or llama for both mappings")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--schemes",
        type=lambda text: text.split(","),
        default=["int8_weight_only", "int4_weight_only"],
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="the limit of a family")
    parser.add_argument(
        "--results", type=Path, default=ROOT / ".families", help="a JSON file a family"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has found")
    return parser.parse_args()


def _wanted(key: str, only: list[str]) -> bool:
    return not only or key in only or key.partition("/")[2] in only


def _is_wrong(found: dict[str, Any]) -> bool:
    return any(one["verdict"] == "wrong" for one in found["outcomes"].values())


def _told(found: dict[str, Any]) -> str:
    why = found.get("broke") or found.get("cannot_build")
    if why:
        return f"{found['key']}: {'broke' if 'broke' in found else 'cannot build'}: {why}"
    verdicts = (
        f"{name} {one['verdict']}" + (f" ({one['reason'][:160]})" if one["reason"] else "")
        for name, one in found["outcomes"].items()
    )
    return f"{found['key']}: {'; '.join(verdicts)} [{found['seconds']} s]"


if __name__ == "__main__":
    main()
