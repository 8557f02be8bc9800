"""A weight file that is nowhere but in memory."""


class InMemory:
    """The bytes of ``model.safetensors``, as the reader takes them from a file or from the Hub."""

    name = "model.safetensors"

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)

    def read_into(self, view: memoryview, offset: int, *, sequential: bool = True) -> int:
        piece = self.content[offset : offset + len(view)]
        view[: len(piece)] = piece
        return len(piece)

    def verify(self) -> None: ...

    def close(self) -> None: ...

    @classmethod
    def of(cls, header: bytes, data: bytes) -> "InMemory":
        """A file in the safetensors format with this header, whatever it holds."""
        return cls(len(header).to_bytes(8, "little") + header + data)
