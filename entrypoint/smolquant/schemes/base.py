"""What a scheme is: a rule for one weight. It knows nothing of checkpoints, files or the Hub.

Names, decisions and texts are readable without torch; the functions that touch tensors import it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (32, 64, 128, 256)
"""The group sizes that the CPU and CUDA int4 kernels have."""


@dataclass(frozen=True)
class Quantize:
    """The weight is quantized; ``group_size`` is None where a row shares one scale."""

    group_size: int | None = None
    note: str = ""
    """Why this differs from what was asked for; empty where it does not."""


@dataclass(frozen=True)
class Keep:
    """The weight stays in the source precision."""

    reason: str


Decision = Quantize | Keep


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a weight as they are stored, and what rounding them cost."""

    parts: Mapping[str, "torch.Tensor"]
    """Stored part -> its rows, along :attr:`Scheme.row_axes`."""
    squared_error: float
    """Squared norm of (dequantized - weight)."""
    squared_norm: float
    """Squared norm of the weight; not finite where a value is not, or its square overflows float32."""
    without_bound: float = 0.0
    """The part of ``squared_error`` in rows or groups that are so small that the scheme has no scale for
    them, or none with enough digits: :meth:`Scheme.max_relative_error` says nothing of them."""


class Scheme(ABC):
    """One quantization type of linear weights, shape (N output features, K input features)."""

    quant_type: ClassVar[str]
    """The name on the command line and in torchao's documentation."""
    variant: ClassVar[str]
    """The name of the subfolder in the repository."""
    title: ClassVar[str]
    """One line for tables and headings."""
    best_for: ClassVar[str]
    """The use that it is best for; it claims only what holds by construction."""
    loading: ClassVar[str]
    """What is needed to load and run it."""
    stock_loads: ClassVar[bool] = True
    """Whether stock transformers with torchao runs it wherever it can run; if not, smolquant brings the
    kernel that a CPU needs, and cards and summaries load it with smolquant."""
    vllm_loads: ClassVar[bool] = False
    """Whether vLLM's torchao loader reads its weights as stored, and runs them; tried with 0.32."""
    caution: ClassVar[str] = ""
    """What cards and summaries say first where stock transformers is not enough: a sentence."""
    cuda_capability: ClassVar[tuple[int, int] | None] = None
    """The least compute capability that its kernels need of a GPU; None: no GPU is needed."""
    measured_as: ClassVar[str] = ""
    """A sentence on how it is measured where the machine lacks its kernels; empty: it runs everywhere."""
    in_both: ClassVar[bool] = False
    """Whether ``--quant-type both`` means this one too."""
    stores_tables: ClassVar[bool] = False
    """Whether ``--embeddings`` may name its variant, to have tables with a row a token stored by it."""
    stores_transposed: ClassVar[bool] = False
    """Whether it has a layout for stacks of experts that are multiplied from the right, (K, N) each."""
    keeps_orientation: ClassVar[bool] = True
    """Whether that layout is (K, N), too; else each matrix is stored as its transpose."""
    weight_dtypes: ClassVar[frozenset[str] | None] = None
    """The dtypes of weights that its kernels compute with; None: any."""
    computes_as_stored: ClassVar[bool] = False
    """Whether its kernels take activations only in the dtype that the weights had before; no other dtype
    can then be chosen when a variant is loaded."""
    layer_memory: ClassVar[float] = 1.5
    """Memory that running a layer takes, in bytes of the layer: itself, and a weight in another form."""
    row_axes: ClassVar[Mapping[str, int]]
    """Stored part -> the axis along which the weight's rows lie in it."""
    weighs_columns: bool = False
    """Whether :meth:`quantize_rows` gains from knowing how large each column's inputs are."""
    calibration_sha256: str | None = None
    """The sha256 of the text that its weights are found from, layer by layer, before they are stored; None
    where no text is used. The methods from :meth:`feedback` on are for schemes that may use one."""
    arithmetic: str
    """Schemes that share it store the same parts of the same weight, so they are computed once."""

    @property
    def output_name(self) -> str:
        """The action's output that holds the address of its variant."""
        return f"{self.variant.replace('_', '-')}-url"

    @abstractmethod
    def options(self, group_size: int) -> dict[str, int | str]:
        """Those of the run's options that decide this scheme's bytes."""

    def gentler(self, group_size: int) -> tuple[str, ...]:
        """Options, each with what it costs, that make this variant closer to its source.

        The first promises most; none where only keeping weights as they are would help.

        Args:
            group_size: the run's, as for :meth:`decide`.
        """
        return ()

    @abstractmethod
    def decide(self, rows: int, columns: int, group_size: int) -> Decision:
        """What happens to a weight of shape (rows, columns)."""

    @abstractmethod
    def torchao_config(self, group_size: int, *, transposed: bool = False) -> Any:
        """The ``AOBaseConfig`` that stock transformers finds in ``config.json``.

        Args:
            transposed: for stacks as in :meth:`quantize`.
        """

    @abstractmethod
    def quantize(
        self, weight: "torch.Tensor", group_size: int | None, *, transposed: bool = False
    ) -> "torch.Tensor":
        """Quantize whole rows of a weight.

        Args:
            weight: (n, K), or (E, n, K) for a stack of experts; bfloat16, float16 or float32, on any
                device, meta included.
            group_size: from :meth:`decide`.
            transposed: the weight is a stack (E, K, N), for a scheme that :attr:`stores_transposed`.

        Returns:
            torchao's own tensor subclass; every row depends on that row only, so a weight can be
            quantized in blocks of rows and the parts joined along :attr:`row_axes`.
        """

    @abstractmethod
    def quantize_rows(
        self,
        weight: "torch.Tensor",
        group_size: int | None,
        input_mean_squares: "torch.Tensor | None" = None,
    ) -> QuantizedRows:
        """What is stored of whole rows, and its error.

        Without ``input_mean_squares``, these are the parts of :meth:`quantize` to the bit; what streams a
        checkpoint calls this one, so it is written for speed.

        Args:
            weight: (n, K) on the CPU, not changed.
            input_mean_squares: (K,), the mean square of each column's inputs in any unit, for a scheme that
                :attr:`weighs_columns`; None where nothing is known of them.
        """

    @abstractmethod
    def max_relative_error(self, columns: int, group_size: int | None) -> float:
        """The largest relative error (Frobenius) that rounding to nearest can cause; more is a fault.

        Args:
            columns: K, of a row that shares one scale where ``group_size`` is None.
        """

    def feedback(self, moments: "torch.Tensor") -> Any:
        """What :meth:`calibrate` needs to know of a weight's inputs; the same for all weights with them.

        Args:
            moments: (K, K) float32, the sum of x x^T over the inputs x; not changed.

        Raises:
            ValueError: they are not finite.
            NotImplementedError: weights of this scheme are not found from a text.
        """
        raise NotImplementedError(f"{self.quant_type} has no calibration")

    def calibrate(
        self, weight: "torch.Tensor", group_size: int | None, feedback: Any
    ) -> "tuple[dict[str, torch.Tensor], torch.Tensor]":
        """Find a whole weight that suits its inputs.

        Args:
            weight: (N, K), on any device; not changed.
            feedback: from :meth:`feedback`.

        Returns:
            Parts whose rows are the weight's rows, one for each of :attr:`row_axes`; and the float32 (N, K)
            weight that they stand for.
        """
        raise NotImplementedError(f"{self.quant_type} has no calibration")

    def stored_rows(
        self, weight: "torch.Tensor", parts: "Mapping[str, torch.Tensor]"
    ) -> QuantizedRows:
        """Rows that :meth:`calibrate` found, as they are stored, and their error.

        Args:
            weight: (n, K), the same rows of the source.
            parts: these rows of the parts that were found.
        """
        raise NotImplementedError(f"{self.quant_type} has no calibration")

    def calibration_bytes(self, rows: int, columns: int) -> int:
        """A bound of the memory that :meth:`feedback` and :meth:`calibrate` take for one weight."""
        raise NotImplementedError(f"{self.quant_type} has no calibration")


def squared_norm(values: "torch.Tensor") -> float:
    """The squared Frobenius norm of contiguous float32 values."""
    flat = values.view(-1)
    norm = float(flat.dot(flat))
    if not norm < _LEAST_SQUARES:
        return norm
    # Squares of values below 1e-19 have no digits left in float32, or are zero; in units of the largest
    # value they have. Nothing is copied for a block of zeros.
    largest = max(float(flat.max()), -float(flat.min())) if flat.numel() else 0.0
    if not largest:
        return 0.0
    scaled = flat / largest
    return float(scaled.dot(scaled)) * largest**2


_LEAST_SQUARES = 1e-24
"""A smaller sum of squares is computed again in larger units, since squares may have vanished."""


def last_place(dtype: "torch.dtype") -> float:
    """The smallest positive number of a dtype; every number, and so every scale, is a multiple of it."""
    import torch

    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def error_of(error: "torch.Tensor", lines: "torch.Tensor") -> float:
    """The squared norm of some of the lines of a matrix of errors.

    Args:
        error: (n, K) float32.
        lines: (n,) bool.
    """
    return squared_norm(error[lines]) if bool(lines.any()) else 0.0
