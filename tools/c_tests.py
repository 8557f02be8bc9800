"""Compiles the C code with its tests, tests/c/, and runs them: for this CPU, with sanitizers, for ARM.

``python tools/c_tests.py WAY...``; it needs a compiler, and of Python the standard library alone. The
options that decide what the code computes are those of its release, from pyproject.toml.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests/c"

MODULES: Mapping[str, str] = {
    "cpu_linear": "smolquant.runtime._cpu_linear",
    "int4_search": "smolquant.schemes._int4_search",
}
"""What is tested, by the file NAME_test.c -> the extension module that is made of it."""

_SANITIZERS = ("-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Way:
    """One way to compile and run a test."""

    compiler: str = "gcc"
    options: Sequence[str] = ()
    """After the release's own."""
    emulator: Sequence[str] = ()
    modules: Sequence[str] = tuple(MODULES)
    missing: str = ""
    """What to do where the compiler or the emulator is not installed."""


WAYS: Mapping[str, Way] = {
    "native": Way(
        options=("-O2",)
    ),  # half the compiler's time; the release's -O3 is tested from Python
    "sanitized": Way(options=_SANITIZERS),
    "avx512-in-plain-c": Way(
        options=(*_SANITIZERS, "-include", str(TESTS / "avx512_in_plain_c.h")),
        modules=("cpu_linear",),
    ),
    "arm": Way(
        compiler="aarch64-linux-gnu-gcc",
        options=("-static",),
        emulator=("qemu-aarch64",),
        missing="apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user",
    ),
}


class CannotRun(Exception):
    """A tool is missing; says which, and what to do."""


def run(module: str, way: Way, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile the test of ``module`` into ``folder`` and run it.

    Returns:
        The run, or the compiler's where that failed: its exit code and what it printed.

    Raises:
        CannotRun: the compiler or the emulator is not installed.
    """
    for tool in (way.compiler, *way.emulator):
        if shutil.which(tool) is None:
            advice = f" On Debian or Ubuntu: {way.missing}" if way.missing else ""
            raise CannotRun(f"{tool} is not installed.{advice}")
    source, options = _extension(MODULES[module])
    program = folder / module
    command = [
        *(way.compiler, *options, "-Wall", "-Wextra", "-Werror", *way.options),
        *(f"-I{source.parent}", str(TESTS / f"{module}_test.c")),
        *("-o", str(program), "-lm", "-pthread"),
    ]
    compiled = _output(command)
    return compiled if compiled.returncode else _output([*way.emulator, str(program)])


def _output(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def _extension(name: str) -> tuple[Path, list[str]]:
    """The source of an extension module, and the options that it is released with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    modules = project["tool"]["setuptools"]["ext-modules"]
    (module,) = (module for module in modules if module["name"] == name)
    (source,) = module["sources"]
    return ROOT / source, module["extra-compile-args"]


def main(names: Sequence[str]) -> int:
    """Run the tests in the ways that are named, and print what they print; 0 where all passed."""
    faults = 0
    for name in names:
        for module in WAYS[name].modules:
            print(f"{module}, {name}:", flush=True)
            with tempfile.TemporaryDirectory(prefix="smolquant-c-") as folder:
                try:
                    done = run(module, WAYS[name], Path(folder))
                except CannotRun as reason:
                    raise SystemExit(str(reason)) from None
            print(done.stdout, flush=True)
            faults += done.returncode != 0
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(WAYS)))
