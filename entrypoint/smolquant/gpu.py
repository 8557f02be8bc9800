"""Runs in a sibling container of the CUDA image where the host has a GPU.

GitHub's runner gives an action's container no GPU, but it does give it the Docker socket of the host.
Over it this container starts a copy of itself that has the GPU: the CUDA image, with the same folders
(except for the socket), network, environment, arguments and working directory. The copy does the whole
run and reports on it; this container passes on what the copy writes, incoming signals, and its exit code.

The host is tried first with the image that is here already, so that gigabytes of CUDA are pulled only
onto a machine with a GPU.
"""

import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from smolquant.environment import RUN, child_environment
from smolquant.errors import Cancelled, MachineError
from smolquant.report.console import Console
from smolquant.report.files import append_lines
from smolquant.settings import Settings

SOCKET = Path("/var/run/docker.sock")
"""The path at which the runner mounts its Docker engine's socket."""

PARENT_LABEL = "smolquant.sibling-of"
"""The label, on every container that this module creates, with the id of the container that created it."""

CUDA_IMAGE_LABEL = "smolquant.cuda-image"
"""The label, on a released image, with the name of the CUDA image of the same version."""

STATE = "gpu_parent"
"""The name of the state that tells the post step whose siblings to remove."""

GRACE_SECONDS = 4.0
"""The time that a cancelled sibling may take; it is less than this container's own, see supervise.py."""

_PARENT_VARIABLE = "SMOLQUANT_SIBLING_OF"
_SECRET_OPTIONS = {"--token": "INPUT_HF-TOKEN", "--trackio-url": "INPUT_TRACKIO-URL"}
"""Options whose values may hold a token, and the inputs that set them too."""

_GPU = {"Count": -1, "Capabilities": [["gpu"]]}
_NO_CUDA = (
    64  # the exit code of a sibling without CUDA, which has neither done nor reported anything
)
_REPORTED = {0, 1, 2, 3, 4, 5, 6, 130, 143}  # the exit codes of a run that has reported its own end

_TOOLKIT = (
    "Install the NVIDIA Container Toolkit on the runner's host (`nvidia-ctk runtime configure "
    "--runtime=docker`, with `--set-as-default` where needed) and restart Docker, or run the job in "
    "the CUDA image itself: `container: {image: …-cuda, options: --gpus all}`."
)


class _NoGpuError(Exception):
    """The reason why this run gets no GPU: an error if a GPU was demanded; otherwise the CPU is used."""

    def __init__(
        self, reason: str, hint: str = _TOOLKIT, *, level: Literal["info", "notice", "warning"]
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.level = level


def run_in_sibling(
    settings: Settings, arguments: Sequence[str], console: Console, environ: Mapping[str, str]
) -> int | None:
    """Have a sibling that has the GPU do the whole run, where a GPU is wanted and available.

    Args:
        arguments: the command's own arguments, for the sibling to repeat.

    Returns:
        The exit code of the sibling, which has reported on its run; None if the run goes on here.

    Raises:
        MachineError: a GPU was demanded and is not available, or the sibling died.
        Cancelled: the run was cancelled, and the sibling did not end in time.
    """
    if _PARENT_VARIABLE in environ:
        return None if _cuda_works() else _NO_CUDA
    if settings.device == "cpu" or settings.dry_run or _gpu_is_here():
        return None
    own_id = container_id(Path("/proc/self/mountinfo").read_text(), environ)
    if own_id is None:
        return None
    try:
        return _run(settings, own_id, arguments, console, environ)
    except _NoGpuError as refusal:
        if settings.device == "cuda":
            raise MachineError(
                f"--device cuda was asked for, and {refusal.reason}.", hint=refusal.hint
            ) from refusal
        _report(console, refusal)
        return None


def _run(
    settings: Settings,
    own_id: str,
    arguments: Sequence[str],
    console: Console,
    environ: Mapping[str, str],
) -> int | None:
    if not SOCKET.exists():
        if settings.device == "auto":
            return None  # a `docker run` on a laptop, where a missing GPU is no news
        raise _NoGpuError("this container has neither a GPU nor a Docker socket", level="info")
    with closing(_connect()) as engine:
        parent = _inspect(engine, own_id)
        _check_folders(parent, settings)
        _save_state(environ, parent["Id"])
        _probe(engine, parent)
        image = _cuda_image(engine, parent, settings.cuda_image, console)
        console.info(f"The run goes on in {image}, which has the host's GPU.")
        shown, hidden = _split_secrets(arguments)
        config = sibling_config(parent, image, shown, {**environ, **hidden})
        try:
            end = _run_to_end(engine, config)
        except OSError as error:
            raise _NoGpuError(
                f"{image} cannot be started: {_explained(error)}", level="warning"
            ) from error
    return _exit_code(end)


def _report(console: Console, refusal: _NoGpuError) -> None:
    text = f"{refusal.reason[0].upper()}{refusal.reason[1:]}. The run goes on with the CPU."
    match refusal.level:
        case "info":
            console.info(text)
        case "notice":
            console.notice("No GPU used", f"{text}\n{refusal.hint}")
        case "warning":
            console.warning("No GPU used", f"{text}\n{refusal.hint}")


def _gpu_is_here() -> bool:
    return any(Path("/dev").glob("nvidia*"))


def _cuda_works() -> bool:
    import torch

    return torch.cuda.is_available()


def container_id(mountinfo: str, environ: Mapping[str, str]) -> str | None:
    """The id of the container that this process is in, found by the engine's mounts; None outside of one.

    Args:
        mountinfo: text of ``/proc/self/mountinfo``; proc(5) gives its fields.
    """
    for line in mountinfo.splitlines():
        root, mount_point = line.split(" ")[3:5]
        found = re.search(r"/containers/([0-9a-f]{64})/hostname$", root)
        if found and mount_point == "/etc/hostname":
            return found[1]
    # An engine that keeps its files elsewhere still names the host after the container.
    hostname = environ.get("HOSTNAME", "")
    in_container = Path("/.dockerenv").exists()
    return hostname if in_container and re.fullmatch(r"[0-9a-f]{12,64}", hostname) else None


def _connect() -> Any:
    """The engine's API client; all errors that it raises later are OSErrors (the base of requests')."""
    try:
        import docker
    except ImportError as error:
        raise _NoGpuError(
            "the Python package docker is missing",
            "Install `smolquant[action]`.",
            level="warning",
        ) from error
    try:
        return docker.DockerClient(base_url=f"unix://{SOCKET}", version="auto").api
    except docker.errors.DockerException as error:
        raise _NoGpuError(f"the Docker engine does not answer: {error}", level="warning") from error


def _inspect(engine: Any, own_id: str) -> dict[str, Any]:
    try:
        parent: dict[str, Any] = engine.inspect_container(own_id)
    except OSError as error:
        raise _NoGpuError(
            f"the engine behind {SOCKET} does not run this container: {_explained(error)}",
            level="warning",
        ) from error
    return parent


def _check_folders(parent: Mapping[str, Any], settings: Settings) -> None:
    """Make sure that a sibling sees the run's folders, which must not be in this container alone."""
    shared = [Path(mount["Destination"]) for mount in parent["Mounts"]]
    needed = [settings.output_dir]
    if settings.model_is_folder:
        needed.append(Path(settings.model))
    needed += [text for text in (settings.eval_text, settings.calibration_text) if text is not None]
    for path in needed:
        if not any(path.resolve().is_relative_to(mount) for mount in shared):
            raise _NoGpuError(
                f"{path} is in this container alone, and a container with a GPU would not see it",
                "Use a folder that is mounted from the host, such as one of the workspace.",
                level="warning",
            )


def _probe(engine: Any, parent: Mapping[str, Any]) -> None:
    """Start this very image with a GPU, to do nothing.

    Raises:
        _NoGpuError: that did not work; the reason quotes the engine.
    """
    config = {
        "Image": parent["Image"],
        "Entrypoint": [sys.executable, "-I", "-c", ""],
        "Labels": {PARENT_LABEL: parent["Id"]},
        "HostConfig": {"DeviceRequests": [_GPU], "NetworkMode": "none"},
    }
    try:
        end = _run_to_end(engine, config)
    except OSError as error:
        raise _NoGpuError(
            f"the host's Docker engine provides no GPU: {_explained(error)}", level="info"
        ) from error
    if end.exit_code != 0:
        raise _NoGpuError(
            f"a test container with the host's GPU ended with exit code {end.exit_code}",
            level="warning",
        )


def _cuda_image(
    engine: Any, parent: Mapping[str, Any], asked_for: str | None, console: Console
) -> str:
    """The image for the sibling, pulled if the engine does not have it."""
    image = asked_for or (parent["Config"]["Labels"] or {}).get(CUDA_IMAGE_LABEL)
    if not image:
        raise _NoGpuError(
            "this build of smolquant was never released and has no CUDA image of its own",
            "Name an image with `cuda-image`.",
            level="notice",
        )
    try:
        engine.inspect_image(image)
    except OSError:
        console.info(
            f"The host has a GPU. Its Docker engine pulls {image}, which happens only once."
        )
        try:
            _pull(engine, image)
        except OSError as error:
            raise _NoGpuError(
                f"the CUDA image {image} cannot be pulled: {_explained(error)}",
                "Check its name, or pull it on the runner's host beforehand.",
                level="warning",
            ) from error
    return str(image)


def _pull(engine: Any, image: str) -> None:
    for event in engine.pull(image, stream=True, decode=True):
        if "error" in event:  # the answer's status was sent before the pull could fail
            raise OSError(event["error"])


def _split_secrets(arguments: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments that a list of processes may show, and those that may hold a token, as inputs."""
    shown, hidden, words = list[str](), dict[str, str](), iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in _SECRET_OPTIONS:
            hidden[_SECRET_OPTIONS[option]] = value if equals else next(words, "")
        else:
            shown.append(word)
    return shown, hidden


def sibling_config(
    parent: Mapping[str, Any], image: str, arguments: Iterable[str], environ: Mapping[str, str]
) -> dict[str, Any]:
    """The configuration of the sibling: this container (``parent``, as inspected) again, with the GPU.

    The variables that a run needs come from ``environ`` rather than from the parent's configuration,
    because in a job's own container a step's variables are given to the process alone.
    """
    own = child_environment(environ, RUN)
    host = parent["HostConfig"]
    return {
        "Image": image,
        "Cmd": list(arguments),
        "Env": [
            f"{name}={value}" for name, value in (own | {_PARENT_VARIABLE: parent["Id"]}).items()
        ],
        "WorkingDir": str(Path.cwd()),
        "User": parent["Config"]["User"],
        "Labels": {PARENT_LABEL: parent["Id"]},
        "AttachStdout": True,
        "AttachStderr": True,
        # Limits, name servers and the like hold for the sibling as well.
        "HostConfig": host
        | {
            "Binds": [bind for bind in host["Binds"] or [] if not _is_socket(bind.split(":")[1])],
            "Mounts": [
                mount for mount in host.get("Mounts") or [] if not _is_socket(mount["Target"])
            ],
            "DeviceRequests": [_GPU],
            "AutoRemove": False,  # it must still be there to be asked how it ended
            "PortBindings": {},
            "PublishAllPorts": False,
            "ContainerIDFile": "",
        },
    }


def _is_socket(target: str) -> bool:
    return Path(target).resolve() == SOCKET.resolve()


@dataclass(frozen=True)
class _End:
    """The way in which a container ended."""

    exit_code: int
    out_of_memory: bool


def _run_to_end(engine: Any, config: Mapping[str, Any]) -> _End:
    """Run a container, pass on what it writes and the signals that come in, and remove it.

    Raises:
        OSError: it could not be created or started.
        Cancelled: the run was cancelled, and the container did not end within ``GRACE_SECONDS``.
    """
    container = engine.create_container_from_config(config)["Id"]
    try:
        output = engine.attach(container, stdout=True, stderr=True, stream=True, demux=True)
        streams = (sys.stdout.buffer, sys.stderr.buffer)
        pump = threading.Thread(target=_pass_on, args=(output, streams), daemon=True)
        pump.start()
        engine.start(container)
        exit_code = _wait(engine, container)
        pump.join(timeout=GRACE_SECONDS)
        return _End(exit_code, _was_out_of_memory(engine, container))
    finally:
        with suppress(OSError):  # someone else removed it
            engine.remove_container(container, force=True, v=True)


def _pass_on(
    output: Iterable[tuple[bytes | None, bytes | None]], streams: tuple[BinaryIO, BinaryIO]
) -> None:
    """Pass on bytes as they are: the sibling's lines are commands to the runner, and already cleaned."""
    for chunks in output:
        for chunk, stream in zip(chunks, streams, strict=True):
            if chunk:
                with suppress(OSError, ValueError):  # nobody reads it any more; the run goes on
                    stream.write(chunk)
                    stream.flush()


def _wait(engine: Any, container: str) -> int:
    try:
        return int(engine.wait(container)["StatusCode"])
    except Cancelled as cancelled:
        with suppress(OSError):  # it has just ended
            engine.kill(container, signal=cancelled.exit_code - 128)
        try:
            return int(engine.wait(container, timeout=GRACE_SECONDS)["StatusCode"])
        except OSError:
            raise cancelled from None
    except OSError as error:
        raise MachineError(
            f"The Docker engine was lost while the container with the GPU ran: {_explained(error)}.",
            hint="Run again; what is already published is not made again.",
        ) from error


def _was_out_of_memory(engine: Any, container: str) -> bool:
    try:
        return bool(engine.inspect_container(container)["State"]["OOMKilled"])
    except OSError:  # someone else removed it
        return False


def _exit_code(end: _End) -> int:
    """The sibling's exit code, if its run has reported its own end."""
    if end.exit_code == _NO_CUDA:
        raise _NoGpuError("torch sees no CUDA in a container with the host's GPU", level="warning")
    if end.exit_code in _REPORTED:
        return end.exit_code
    if end.out_of_memory:
        raise MachineError(
            "The container with the GPU ran out of memory and was killed (the host's memory, not the "
            "GPU's).",
            hint="Use a runner with more memory, raise the container's limit, or set evaluate: never.",
        )
    raise MachineError(
        f"The container with the GPU ended with exit code {end.exit_code} before its run was over.",
        hint="Its output is above. Use device: cpu if the GPU is at fault.",
    )


def _explained(error: Exception) -> str:
    """The engine's own words, without the address that they came from."""
    return str(getattr(error, "explanation", None) or error).strip().rstrip(".")


def _save_state(environ: Mapping[str, str], own_id: str) -> None:
    """Tell the action's post step whose siblings to remove, should this container be killed."""
    path = environ.get("GITHUB_STATE")
    if path:
        append_lines(Path(path), f"{STATE}={own_id}\n")


def remove_siblings(environ: Mapping[str, str], console: Console) -> None:
    """The action's post step: remove what a killed run left behind. It never fails a job."""
    parent = environ.get(f"STATE_{STATE}")
    if not parent:
        return
    with suppress(_NoGpuError, OSError), closing(_connect()) as engine:
        for left in engine.containers(all=True, filters={"label": f"{PARENT_LABEL}={parent}"}):
            engine.remove_container(left["Id"], force=True, v=True)
            console.info(f"Removed the container {left['Id'][:12]}, left behind by a killed run.")
