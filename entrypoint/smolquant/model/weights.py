"""The parameters of a source or of a variant by name, read from its files when they are needed."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import SourceTensor, prevalent_dtype
from smolquant.model.architecture import Architecture


class Weights(ABC):
    """The parameters of one model, none of them in memory."""

    dtype: torch.dtype
    """The dtype in which the model computes."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self._checkpoint = checkpoint
        self._tied: Mapping[str, str] = architecture.ties_of_names

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether the files hold ``name`` or the parameter that it is tied to."""

    @abstractmethod
    def load(self, name: str) -> torch.Tensor:
        """The whole parameter, quantized if it is quantized in the files."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a parameter, dequantized where they are stored quantized."""

    @abstractmethod
    def size_bytes(self, name: str) -> int:
        """The bytes of a parameter in the files."""


class SourceWeights(Weights):
    """The checkpoint, in the dtype of most of its bytes, which is the one that it would be run in."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        super().__init__(checkpoint, architecture)
        self._architecture = architecture
        tensors = architecture.converted(checkpoint.layout).tensors
        self._tensors = {
            parameter.name: tensor
            for name, tensor in tensors.items()
            if (parameter := architecture.parameter(name))
        }
        self.dtype = prevalent_dtype(tensors.values())

    def has(self, name: str) -> bool:
        return self._stored(name) in self._tensors

    def load(self, name: str) -> torch.Tensor:
        tensor = self._tensors[self._stored(name)]
        return self.rows(name, 0, tensor.rows).view(tensor.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._stored(name)
        block = self._checkpoint.read_rows(self._tensors[stored], start, stop)
        if not block.is_floating_point():
            return block
        return block.to(self._architecture.stored_dtype(stored, self.dtype))

    def size_bytes(self, name: str) -> int:
        return self._tensors[self._stored(name)].size_bytes

    def _stored(self, name: str) -> str:
        return name if name in self._tensors else self._tied.get(name, name)


class VariantWeights(Weights):
    """A variant's files as stock transformers reads them: torchao's flattened tensors."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, header: Path) -> None:
        """Open a variant.

        Args:
            checkpoint: the variant's weight files.
            header: any of them; each describes the whole model.
        """
        super().__init__(checkpoint, architecture)
        with safe_open(header, framework="pt") as file:
            metadata: dict[str, str] = file.metadata()
        described = {name: metadata[name] for name in json.loads(metadata["tensor_names"])}
        self._in_files = {
            architecture.name_in_model(name): name for name in checkpoint.layout.tensors
        }
        # torchao is not told of the parameters of the model itself, whose names have no dot.
        of_root = [name for name in checkpoint.layout.tensors if "." not in name]
        self._descriptions = described | dict.fromkeys(of_root, "{}")
        plain = [name for name in self._descriptions if not self._parts(name)]
        self.dtype = prevalent_dtype(map(self._tensor, plain))

    def has(self, name: str) -> bool:
        return self._stored(name) in self._descriptions

    def load(self, name: str) -> torch.Tensor:
        stored = self._stored(name)
        return self._whole(
            stored, {part: self._read(part) for part in self._parts(stored) or [stored]}
        )

    def _whole(self, stored: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """A parameter, put together from its parts."""
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        if stored in parts:
            return parts[stored]
        description = {stored: self._descriptions[stored], "tensor_names": json.dumps([stored])}
        whole, _ = unflatten_tensor_state_dict(parts, description)
        tensor: torch.Tensor = whole[stored]
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._stored(name)
        parts = self._parts(stored)
        if not parts:
            return self._checkpoint.read_rows(self._tensor(stored), start, stop)
        # Only tables are read by rows, and --embeddings stores each of their rows by itself.
        block = {
            part: self._checkpoint.read_rows(self._tensor(part), start, stop) for part in parts
        }
        tensor: torch.Tensor = self._whole(stored, block)
        return tensor.dequantize()

    def size_bytes(self, name: str) -> int:
        stored = self._stored(name)
        return sum(self._tensor(part).size_bytes for part in self._parts(stored) or [stored])

    def _read(self, name: str) -> torch.Tensor:
        return self._checkpoint.read_whole(self._tensor(name))

    def _tensor(self, name: str) -> SourceTensor:
        return self._checkpoint.layout.tensors[self._in_files.get(name, name)]

    def _parts(self, name: str) -> list[str]:
        """The names of the tensors that a quantized parameter is stored as; none for a plain one."""
        parts = json.loads(self._descriptions[name]).get("_tensor_data_names", [])
        module, _, attribute = name.rpartition(".")
        return [f"{module}._{attribute}_{part}" for part in parts]

    def _stored(self, name: str) -> str:
        return name if name in self._descriptions else self._tied.get(name, name)
