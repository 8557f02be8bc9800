"""The first lines of a run: what was asked for, and what would be lost of it."""

from pathlib import Path

from smolquant import __version__
from smolquant.places import is_docker_run, is_on_mount
from smolquant.report.console import Console
from smolquant.schemes import SCHEMES
from smolquant.settings import Settings


def tell_beginning(settings: Settings, console: Console) -> None:
    """Say what will happen, and warn of an output folder that goes with its container."""
    variants = ", ".join(SCHEMES[name].variant for name in settings.quant_types)
    console.info(f"smolquant {__version__}: {settings.model} as {variants}, {_end(settings)}")
    if settings.dry_run or not is_docker_run():
        return
    mounts = Path("/proc/self/mountinfo").read_text("utf-8", "replace")
    if not is_on_mount(settings.output_dir, mounts):
        console.warning("The output folder is inside the container", what_is_lost(settings))


def what_is_lost(settings: Settings) -> str:
    """What goes with the container, and how it would be kept."""
    lost = "The variants are" if settings.save_only else "report.json is"
    folder = settings.output_dir.absolute()
    return (
        f"{lost} lost with it. To keep what is written to {folder}, mount a folder of yours there: "
        f'`docker run -v "$PWD/quantized:{folder}" ...`.'
    )


def _end(settings: Settings) -> str:
    if settings.dry_run:
        return "planned only"
    if settings.save_only:
        return f"saved in {settings.output_dir}"
    return f"published to {settings.repo}"
