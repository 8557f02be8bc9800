"""What a GPU sibling may do, as its one argument says, or as SMOLQUANT_STAND_IN says."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def ends(code: int) -> None:
    """Tell what was given to us, on both streams, and end like a run."""
    given = {
        "arguments": sys.argv[1:],
        "environ": dict(os.environ),
        "folder": str(Path.cwd()),
        "socket": Path("/var/run/docker.sock").exists(),
    }
    Path("given.json").write_text(json.dumps(given))
    print("::notice title=From the sibling::a line that stays a command")
    print("and one of stderr", file=sys.stderr)
    sys.exit(code)


def waits(*, stubborn: bool) -> None:
    """Run until a signal comes, and end as a cancelled run does, or not at all."""

    def cancelled(number: int, _frame: object) -> None:
        print(f"the sibling got signal {number}")
        if not stubborn:
            sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, cancelled)
    Path("waits").touch()
    while True:
        time.sleep(0.1)


def eats() -> None:
    """Take memory until the kernel puts an end to it."""
    eaten = []
    while True:
        eaten.append(os.urandom(1 << 24))


match os.environ["SMOLQUANT_STAND_IN"]:
    case "ends":
        ends(5)
    case "waits":
        waits(stubborn=False)
    case "is stubborn":
        waits(stubborn=True)
    case "eats":
        eats()
    case "crashes":
        os._exit(139)
