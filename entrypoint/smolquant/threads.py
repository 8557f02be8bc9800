"""How many threads compute: no more than the container or the job may have CPUs at a time.

torch starts a thread for each core that this process may be scheduled on. It asks for the affinity, but
not for the CPU quota of a control group: where a container may use 2 CPUs of a host's 64, its 64 threads
use up the time of each tenth of a second at once, and then all of them stand still.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

from smolquant import cgroups

_THREADS_ARE_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables in which a user says how many threads there are; torch reads them."""


def allowed_cpus(
    cpus: int | None = None, root: Path = cgroups.ROOT, own: Path = cgroups.OWN
) -> int:
    """How many CPUs this process may use at a time; part of one counts as one.

    Args:
        cpus: how many it may be scheduled on; by default the kernel says so.
        root, own: as for :func:`smolquant.cgroups.folders`.
    """
    affinity = cpus if cpus is not None else len(os.sched_getaffinity(0))
    try:
        groups = cgroups.folders("cpu", root, own)
    except (OSError, ValueError):  # no such file, or none of control groups
        groups = []
    quotas = [quota for folder in groups if (quota := quota_of(folder)) is not None]
    return max(1, min([affinity, *map(math.ceil, quotas)]))


def quota_of(group: Path) -> float | None:
    """CPUs that a control group, version 2 or 1, may use on average; None where it has no limit."""
    try:
        if (file := group / "cpu.max").is_file():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        limited = quota not in ("max", "-1") and int(period) > 0
        return int(quota) / int(period) if limited else None
    except (OSError, ValueError):
        return None


def use_allowed_threads(environ: Mapping[str, str] = os.environ) -> int:
    """Have torch use no more threads than this process may have CPUs, for a process of this product's.

    A number that the user has chosen, in ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS``, stays; so does a
    lower one of torch's own, which counts no core twice. Call it after a fork: it may start threads.

    Returns:
        The number of threads in use.
    """
    import torch

    if not any(environ.get(name) for name in _THREADS_ARE_CHOSEN):
        torch.set_num_threads(min(torch.get_num_threads(), allowed_cpus()))
    return torch.get_num_threads()
