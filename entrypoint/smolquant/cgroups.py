"""The control groups that limit this process: where the kernel tells of their limits."""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def folders(controller: str, root: Path = ROOT, own: Path = OWN) -> list[Path]:
    """The folders of the groups that limit this process; a container sees its own at the root.

    Args:
        controller: ``memory`` or ``cpu``, which has a tree of its own in version 1.
        root: where control groups are mounted.
        own: the file that names this process's groups (cgroups(7)).
    """
    found: list[Path] = []
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / name.lstrip("/")
        found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]
