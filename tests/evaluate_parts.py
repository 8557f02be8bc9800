"""What the evaluation's tests share: variants made in one call, for any small checkpoint."""

from pathlib import Path

from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.reader import Checkpoint
from smolquant.model.architecture import Architecture
from smolquant.quantize.engine import quantize_checkpoint
from smolquant.quantize.plan import make_plan
from smolquant.quantize.variant import finish_variant, write_record
from smolquant.schemes import SCHEMES


def quantize_folder(
    source: Path, output: Path, *, group_size: int = 32, max_shard_size: int = 10**9
) -> dict[str, Path]:
    """Every variant of a checkpoint folder, complete as it would be published; name -> folder."""
    origin = FolderSource(source)
    architecture = Architecture(source, trust_remote_code=False)
    plans = make_plan(
        origin.layout(),
        architecture,
        list(SCHEMES.values()),
        group_size=group_size,
        dtype="auto",
        max_shard_size=max_shard_size,
        skip=(),
    )
    folders = {variant: output / variant for variant in plans}
    for folder in folders.values():
        folder.mkdir(parents=True)
    with Checkpoint(origin.fetch_weights()) as checkpoint:
        written = quantize_checkpoint(checkpoint, plans, folders, advance=lambda n_bytes: None)
    for variant, plan in plans.items():
        record = finish_variant(
            folders[variant],
            plan,
            written[variant],
            source=origin,
            config=architecture.config_dict,
            options={},
            source_bytes=1,
        )
        write_record(folders[variant], record)
    return folders
