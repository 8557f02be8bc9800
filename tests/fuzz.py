"""`make fuzz`: feeds the readers of foreign files with valid files that were damaged at random.

Whatever a file holds, it is read or refused as the contract says; anything else that a reader raises is a
bug, and so is a reader that takes seconds. Every case follows from the seed, the target's name and the
case's number alone, so each can be repeated.
"""

import argparse
import faulthandler
import io
import json
import os
import random
import re
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

import models
from in_memory import InMemory
from smolquant.checkpoint.files import shard_names
from smolquant.checkpoint.reader import Checkpoint
from smolquant.errors import CheckpointError, InputError
from smolquant.model.architecture import Architecture
from smolquant.publish.front_matter import check_kinds, declared_license, readme_text
from smolquant.record import InvalidRecord, VariantRecord
from unit.report_samples import variant_record

SLOW = 10.0
"""Seconds; no reader takes a hundredth of it for such a small file on a quiet machine."""

STATE = {
    "model.embed_tokens.weight": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
    "model.norm.weight": torch.ones(3),
    "model.step": torch.tensor(7),
    "empty": torch.empty(0, 5, dtype=torch.float16),
}

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """A reader."""

    valid: Callable[[], bytes]
    """A file that it reads."""
    read: Read
    """Reads such a file, whose bytes lie in a folder if it needs one."""
    refusals: type[Exception]
    """What it may raise instead."""


def _read_all(checkpoint: Checkpoint) -> None:
    with checkpoint:
        for tensor in checkpoint.layout.tensors.values():
            checkpoint.read_rows(tensor, 0, tensor.rows)
        checkpoint.verify()


def _read_file(name: str) -> Read:
    def read(content: bytes, folder: Path) -> None:
        path = folder / name
        path.write_bytes(content)
        _read_all(Checkpoint([path]))

    return read


def _read_config(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    assert Architecture(folder, trust_remote_code=False).model is not None


def _read_card(content: bytes, _: Path) -> None:
    text = readme_text(content, "alice/tiny")
    check_kinds(text, "alice/tiny")
    declared_license(text)


def _pickle(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _config() -> bytes:
    text: str = models.FAMILIES["llama"]().to_json_string()
    return text.encode()


CARD = (
    b"---\nlicense: mit\ntags:\n- a\n- 'b'\nmodel-index:\n- name: x\n  results: []\n---\n# Mine\n"
)

TARGETS: Mapping[str, Target] = {
    "header": Target(
        lambda: save(STATE),
        lambda data, _: _read_all(Checkpoint([InMemory(data)])),
        CheckpointError,
    ),
    "safetensors": Target(lambda: save(STATE), _read_file("model.safetensors"), CheckpointError),
    "pickle": Target(
        lambda: _pickle(zipped=True), _read_file("pytorch_model.bin"), CheckpointError
    ),
    "old pickle": Target(
        lambda: _pickle(zipped=False), _read_file("pytorch_model.bin"), CheckpointError
    ),
    "index": Target(
        lambda: json.dumps(
            {"weight_map": dict.fromkeys(STATE, "model-00001-of-00002.safetensors")}
        ).encode(),
        lambda data, _: shard_names("model.safetensors.index.json", data),
        CheckpointError,
    ),
    "record": Target(
        lambda: variant_record("int4").to_json().encode(),
        lambda data, _: VariantRecord.from_json(data).to_json(),
        InvalidRecord,
    ),
    "config": Target(_config, _read_config, CheckpointError),
    "card": Target(lambda: CARD, _read_card, InputError),
}


# Damage

NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"2",
    b"255",
    b"65536",
    b"2147483648",
    b"9223372036854775807",
    b"1e999",
    b"0.5",
)
WORDS = (
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"\\ud800"',
    b"NaN",
    b"[[[[",
    b"\x00",
    b"\xff\xfe",
    b"../x",
    b"\n",
)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """``content`` with one to four changes; in a zip file, sometimes to one of its members instead."""
    if zipfile.is_zipfile(io.BytesIO(content)) and chance.random() < 0.5:
        return _with_damaged_member(content, chance)
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        chance.choice(DAMAGES)(changed, chance)
    return bytes(changed)


def _with_damaged_member(content: bytes, chance: random.Random) -> bytes:
    """The zip file made anew around the damage: its checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = chance.choice(old.namelist())
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, damaged(member, chance) if name == chosen else member)
    return buffer.getvalue()


def _place(content: bytearray, chance: random.Random) -> int:
    return chance.randrange(len(content) + 1)


def _flip(content: bytearray, chance: random.Random) -> None:
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _cut(content: bytearray, chance: random.Random) -> None:
    del content[_place(content, chance) :]


def _drop(content: bytearray, chance: random.Random) -> None:
    start = _place(content, chance)
    del content[start : start + chance.choice([1, 2, 8, 64])]


def _repeat(content: bytearray, chance: random.Random) -> None:
    start = _place(content, chance)
    content[start:start] = content[start : start + chance.choice([1, 8, 64])] * chance.choice(
        [1, 2, 50]
    )


def _insert(content: bytearray, chance: random.Random) -> None:
    place = _place(content, chance)
    content[place:place] = chance.choice(
        [chance.choice(WORDS), chance.randbytes(chance.randint(1, 9))]
    )


def _replace_value(content: bytearray, chance: random.Random) -> None:
    """Another number, or another kind of value, where JSON or YAML has one."""
    values = list(re.finditer(rb"-?\b\d+\b|\"[^\"]*\"|true|false|null", content))
    if values:
        value = chance.choice(values)
        content[value.start() : value.end()] = chance.choice(chance.choice([NUMBERS, WORDS]))


DAMAGES = (_flip, _cut, _drop, _repeat, _insert, _replace_value, _replace_value)


# The search


@dataclass(frozen=True)
class Finding:
    """A case in which a reader did what it must not."""

    target: str
    case: int
    content: bytes
    what: str


def case_of(target: Target, name: str, seed: int, case: int) -> bytes:
    """The file of a case, which nothing else decides."""
    return damaged(target.valid(), random.Random(f"{seed}/{name}/{case}"))


def run_case(target: Target, name: str, seed: int, case: int, folder: Path) -> Finding | None:
    """Have one file read; None where it was read, or refused as it may be."""
    content = case_of(target, name, seed, case)
    started = time.monotonic()
    try:
        target.read(content, folder)
    except target.refusals as refusal:
        if "\n" in str(refusal):
            return Finding(name, case, content, f"a refusal of several lines: {refusal}")
    except Exception as error:  # what is looked for
        return Finding(name, case, content, f"{type(error).__name__}: {error}")
    if (seconds := time.monotonic() - started) > SLOW:
        return Finding(name, case, content, f"it took {seconds:.1f} s")
    return None


def search(names: list[str], seed: int, seconds: float, folder: Path) -> tuple[int, Finding | None]:
    """Try case after case on the targets in turn, and return how many, and the first finding."""
    end, case = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for name in names:
            if found := run_case(TARGETS[name], name, seed, case, folder):
                return case, found
        case += 1
    return case, None


def main() -> int:
    """The command: 0 where nothing was found, 1 where something was."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another every time")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all, in turn")
    parser.add_argument("--case", type=int, help="only this one, to repeat it")
    asked = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # of torch, about damaged pickles
    seed = int.from_bytes(os.urandom(4)) if asked.seed is None else asked.seed
    names = asked.target or list(TARGETS)
    print(f"seed {seed}: {', '.join(names)}, for {asked.seconds:g} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="smolquant-fuzz-") as folder:
        if asked.case is not None:
            cases, found = 1, run_case(TARGETS[names[0]], names[0], seed, asked.case, Path(folder))
        else:
            cases, found = search(names, seed, asked.seconds, Path(folder))
    if found is None:
        print(f"{cases} cases of each, and nothing found")
        return 0
    kept = Path(tempfile.mkdtemp(prefix="smolquant-found-")) / "content"
    kept.write_bytes(found.content)
    print(f"{found.target}, case {found.case}: {found.what}\nThe file is {kept}. To repeat it:")
    print(f"make fuzz SEED={seed} TARGET='{found.target}' CASE={found.case}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
