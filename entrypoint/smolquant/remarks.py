"""Remarks of libraries that nobody who uses smolquant can act on, left out of the log.

A program that loads a variant misses only what they say of themselves when they are imported; the command
misses all of their remarks.
"""

import logging
import os

_REMARKS = {
    "torchao": ("Failed to load ",),  # kernels of GPUs that this machine or this torch lacks
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
}
"""Logger -> parts of the messages that are left out."""


def leave_out_remarks() -> None:
    """Leave these out from now on; calling it again changes nothing."""
    for name in _REMARKS:
        logging.getLogger(name).addFilter(_matters)  # a logger takes a filter once only


def quiet_libraries() -> None:
    """Let the libraries say nothing more below an error.

    What they say would also carry text of a model's repository past the console, which takes workflow
    commands out of it.
    """
    for library in _REMARKS:
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _matters(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in _REMARKS[record.name])
