"""Quantize Hugging Face language models with torchao and publish the variants.

Importing this package imports no torch; ``smolquant.load`` brings it in when it is first used.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolquant.runtime.load import load as load

try:
    __version__ = version("smolquant")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from smolquant.remarks import leave_out_remarks

        leave_out_remarks()
        from smolquant.runtime.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
