"""A variant beside its model's own code, as it will be once it is published."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def beside_its_code(folder: Path, code: Path | None) -> Iterator[Path]:
    """``folder`` in a form in which its model's own code is found, before it is published.

    A variant's config names code at the root of a repository, which need not be there yet.
    """
    config = folder / "config.json"
    own = (
        json.loads(config.read_text("utf-8")).get("auto_map") if code and config.is_file() else None
    )
    if code is None or not own or code == folder:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="smolquant-speed-") as name:
        place = Path(name)
        for path in [*code.glob("*.py"), *folder.iterdir()]:
            if not (place / path.name).exists():
                (place / path.name).symlink_to(path.resolve())
        for path in place.glob("*config.json"):
            entries = json.loads(path.read_text("utf-8"))
            if isinstance(entries.get("auto_map"), dict):
                entries["auto_map"] = _local(entries["auto_map"])
                path.unlink()
                path.write_text(json.dumps(entries), encoding="utf-8")
        yield place


def _local(code: Any) -> Any:
    """References to code without the repository that they name."""
    if isinstance(code, dict):
        return {auto: _local(item) for auto, item in code.items()}
    if isinstance(code, list):
        return [_local(item) for item in code]
    return code.rpartition("--")[2] if isinstance(code, str) else code
