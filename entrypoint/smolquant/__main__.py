"""``python -m smolquant``, and the command ``smolquant``."""

import signal

# A signal that comes before there is somebody to take it waits for them: see cancellation.py.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

from smolquant.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
