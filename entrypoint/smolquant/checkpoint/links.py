"""Links in a checkpoint folder: which may be followed, so that nothing is published that lies elsewhere.

A folder may come from anywhere, and a link in it may name a token, a key or a file of /proc. Links inside
the folder, and those of a snapshot in the Hub's cache to its own blobs, are followed.
"""

from collections.abc import Iterable
from pathlib import Path

from smolquant.checkpoint.files import is_auxiliary, is_weights
from smolquant.errors import CheckpointError


def leads_out(folder: Path, path: Path) -> bool:
    """Whether ``path``, seen through all links, lies outside ``folder`` and the cache around it."""
    root, real = folder.resolve(), path.resolve()
    places = [root]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    return not any(map(real.is_relative_to, places))


def refuse_links_out(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that are links out of the folder, by name.

    Raises:
        CheckpointError: naming one, and how to take the file itself along.
    """
    for name in names:
        if leads_out(folder, folder / name):
            raise CheckpointError(
                f"{name} is a link out of the checkpoint folder, and what it leads to would be published.",
                hint=f"If the file belongs to the model, replace the link by it: `cp -L` {name} to a new "
                "name and move that in its place. Otherwise remove the link.",
            )


def refuse_what_is_no_file(folder: Path) -> None:
    """Refuse what has the name of a model's file and cannot be read as one, by name.

    Raises:
        CheckpointError: naming one: a link to nothing, a device, a pipe or a socket.
    """
    for path in sorted(folder.iterdir()):
        is_named_so = is_auxiliary(path.name) or is_weights(path.name)
        if is_named_so and not path.is_file() and not path.is_dir():
            what = "a device, a pipe or a socket" if path.exists() else "a link to nothing"
            raise CheckpointError(
                f"{path.name} is {what}, and the model has a file of that name.",
                hint="Put the file itself there, or remove what is in its place.",
            )


def linked_weights(folder: Path, names: Iterable[str]) -> list[str]:
    """Those weight files that are links out of the folder, as to another disk: plain weights, and no more.

    Raises:
        CheckpointError: one is anything but a file in the safetensors format.
    """
    from safetensors import SafetensorError, safe_open

    linked = [name for name in names if leads_out(folder, folder / name)]
    refuse_links_out(folder, [name for name in linked if not name.endswith(".safetensors")])
    for name in linked:
        try:
            with safe_open(folder / name, framework="numpy"):
                pass  # checks the header against the file's length
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{name} is a link out of the checkpoint folder to something other than weights: {error}.",
                hint="Replace the link by the weight file (`cp -L`), or remove it.",
            ) from error
    return linked
