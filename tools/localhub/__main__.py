"""`python -m localhub`: a Hub until Ctrl-C or SIGTERM; prints its URL, and to stderr how to use it."""

import argparse
import signal
import sys
from pathlib import Path

from localhub.access import Token
from localhub.server import LocalHub

STOP = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="localhub", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder for blobs")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--token",
        action="append",
        type=_token,
        metavar="USER=VALUE",
        help="a write token of a user; may be given more than once",
    )
    arguments = parser.parse_args()
    # Blocked before any thread starts, so that no thread but this one gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    tokens = arguments.token or []
    with LocalHub(arguments.data, tokens, host=arguments.host, port=arguments.port) as hub:
        print(hub.url, flush=True)
        token = f" HF_TOKEN={tokens[0].value}" if tokens else ""
        # It has no Xet, which the client would choose.
        print(
            f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1{token}", file=sys.stderr, flush=True
        )
        signal.sigwait(STOP)


def _token(text: str) -> Token:
    user, separator, value = text.partition("=")
    if not (user and separator and value):
        raise argparse.ArgumentTypeError("expected USER=VALUE")
    return Token(value, user)


if __name__ == "__main__":
    main()
