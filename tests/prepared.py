"""Processes that have imported what takes most of a short run before they begin.

One process imports it once, and each run is a fork of it that then is a process like any other: with its
own arguments, environment, folder and output. The command itself is imported by each run.

torch and torchao are the same for all. transformers and the Hub's client read the environment when they are
imported, so a process that has them as well serves runs alone whose environment is the same to them. It is
worth its start where there are several such runs.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

_READ_BY_LIBRARIES = ("OMP_", "MKL_", "ATEN_", "TORCH_", "LD_", "PYTHON", "CUDA_")
"""What is read before a fork would see it, by torch and what it is made of."""

_READ_BY_CLIENTS = ("HF_", "HUGGING", "TRANSFORMERS_", "USE_", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
_READ_WHEN_USED = ("HF_TOKEN", "HF_OIDC_RESOURCE")
"""What transformers and the Hub's client read when they are imported, and what of that they do not."""

_OF_A_RUN = (
    "accelerate",
    "huggingface_hub.hf_api",
    "jinja2",
    "torchao.prototype.mx_formats.kernels",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.models.smollm3.modeling_smollm3",
    "yaml",
)
"""What a run imports besides torch and torchao, with what these import: nothing of the command itself."""

_WORTH_IT_AFTER = 3
"""Runs of one environment until a process with everything is started for the next."""

_Variables = tuple[tuple[str, str], ...]

_runs: Counter[_Variables] = Counter()


def run(
    arguments: Sequence[str],
    folder: Path,
    environ: Mapping[str, str],
    *,
    script: str | None,
    timeout: float,
) -> tuple[int, str]:
    """``smolquant``, or a script that runs it, as a process of its own.

    Args:
        environ: all of the process's environment.
        script: Python that runs the command after a change to its parts.
        timeout: in seconds.

    Returns:
        Its exit code, negative for a signal's number; and stdout and stderr together.

    Raises:
        TimeoutError: it took too long, and was killed.
    """
    request = {
        "arguments": list(arguments),
        "folder": str(folder),
        "environ": dict(environ),
        "script": script,
    }
    with tempfile.TemporaryFile() as log, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(_fitting_server(environ)))
        connection.settimeout(timeout)
        socket.send_fds(connection, [b"\0"], [log.fileno()])
        with connection.makefile("rw", encoding="utf-8") as stream:
            stream.write(json.dumps(request) + "\n")
            stream.flush()
            pid = int(stream.readline())
            try:
                exit_code = int(stream.readline())
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise
        log.seek(0)
        return exit_code, log.read().decode("utf-8", "replace")


def _fitting_server(environ: Mapping[str, str]) -> Path:
    """The address of the process to fork for a run, with as much imported as serves it."""
    of_torch, of_clients = (
        tuple(sorted((k, v) for k, v in environ.items() if k.startswith(readers)))
        for readers in (_READ_BY_LIBRARIES, _READ_BY_CLIENTS)
    )
    of_both = of_torch + tuple((k, v) for k, v in of_clients if k not in _READ_WHEN_USED)
    _runs[of_both] += 1
    if _runs[of_both] > _WORTH_IT_AFTER:
        return _server(of_both, "everything")
    return _server(of_torch, "torch")


@cache
def _server(read_before: _Variables, imported: str) -> Path:
    """The address of the process that forks, started where that has not happened yet."""
    folder = tempfile.TemporaryDirectory(prefix="prepared-")
    address = Path(folder.name) / "socket"
    readers = (*_READ_BY_LIBRARIES, *_READ_BY_CLIENTS)
    others = {k: v for k, v in os.environ.items() if not k.startswith(readers)}
    process = subprocess.Popen(
        [sys.executable, __file__, str(address), imported],
        env={**others, **dict(read_before)},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,  # it ends when this is closed, which happens however the tests end
    )
    assert process.stdin is not None
    assert process.stdout is not None
    atexit.register(folder.cleanup)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    with process.stdout as ready:
        assert ready.readline(), "the imports failed"
    return address


def _import(imported: str) -> None:
    for library in ("torch", "torchao.quantization"):
        import_module(library)
    if imported == "everything":
        from smolquant.remarks import quiet_libraries

        quiet_libraries()  # as the command does before it imports them
        for library in _OF_A_RUN:
            import_module(library)
    gc.collect()
    gc.freeze()  # no fork looks through all of this for garbage


def _serve(address: str, imported: str) -> dict[str, Any]:
    """Import what is slow, and fork for each connection until stdin is closed.

    Returns:
        In each process that was asked for: what it was asked.
    """
    _import(imported)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready", flush=True)
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            with connection:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return _asked(connection)
    raise SystemExit


def _asked(connection: socket.socket) -> dict[str, Any]:
    """Fork once more, and wait for that process to tell how it ended.

    Returns:
        In that process: what it was asked.
    """
    _, (log, *_), _, _ = socket.recv_fds(connection, 1, 1)
    with connection.makefile("rw", encoding="utf-8") as stream:
        request: dict[str, Any] = json.loads(stream.readline())
        pid = os.fork()
        if pid:
            stream.write(f"{pid}\n")
            stream.flush()
            stream.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
            stream.flush()
            os._exit(0)
    for given, number in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(given, number)
    return request


def _become(request: Mapping[str, Any]) -> None:
    """Run what was asked for, as the interpreter would; it ends this process as it ends."""
    os.closerange(3, 1024)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.path[0] = request["folder"]
    if request["script"] is None:
        sys.argv[1:] = request["arguments"]
        runpy.run_module("smolquant", run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *request["arguments"]]
        exec(request["script"], {"__name__": "__main__"})


if __name__ == "__main__":
    _become(_serve(*sys.argv[1:]))
