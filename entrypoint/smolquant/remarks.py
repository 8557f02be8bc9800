"""Remarks that libraries make when they are imported, and that nobody who uses smolquant can act on.

Only these are taken out of the log: whatever else the libraries say still reaches the program that loads
a variant.
"""

import logging

_REMARKS = {
    "torchao": ("Failed to load ",),  # kernels of GPUs that this machine or this torch lacks
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
}
"""Logger -> parts of the messages that are left out."""


def leave_out_remarks() -> None:
    """Leave them out from now on; calling it again changes nothing."""
    for name in _REMARKS:
        logging.getLogger(name).addFilter(_matters)  # a logger takes a filter once only


def _matters(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in _REMARKS[record.name])
