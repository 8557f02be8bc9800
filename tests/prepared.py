"""Processes that have torch and torchao imported before they begin.

These imports take most of a short run. So one process takes them once, and each run is a fork of it that
then is a process like any other: with its own arguments, environment, folder and output. It imports the
command itself, transformers and the Hub's client, which read the environment when they are imported.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_READ_BY_LIBRARIES = ("OMP_", "MKL_", "ATEN_", "TORCH_", "LD_", "PYTHON", "CUDA_")
"""What is read before a fork would see it."""


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
        connection.connect(str(_server(_of_libraries(environ))))
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


def _of_libraries(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in environ.items() if k.startswith(_READ_BY_LIBRARIES)))


@cache
def _server(read_before: tuple[tuple[str, str], ...]) -> Path:
    """The address of the process that forks, started where that has not happened yet."""
    folder = tempfile.TemporaryDirectory(prefix="prepared-")
    address = Path(folder.name) / "socket"
    others = {k: v for k, v in os.environ.items() if not k.startswith(_READ_BY_LIBRARIES)}
    process = subprocess.Popen(
        [sys.executable, __file__, str(address)],
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


def _serve(address: str) -> dict[str, Any]:
    """Import what is slow, and fork for each connection until stdin is closed.

    Returns:
        In each process that was asked for: what it was asked.
    """
    import torch
    import torchao.quantization

    assert torch
    assert torchao.quantization
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
    _become(_serve(sys.argv[1]))
