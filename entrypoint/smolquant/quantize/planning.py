"""Planning the variants of a source: what its files hold, a plan for each, and the trial of it.

Everything that can be known before a weight is read is decided here, for a run and a dry run alike.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch.nn import Linear

from smolquant.checkpoint.source import Source
from smolquant.errors import CheckpointError, InputError
from smolquant.machine import require_room_for
from smolquant.memory import give_back_garbage
from smolquant.model.architecture import Architecture
from smolquant.model.task import refuse_embedder
from smolquant.names import shown
from smolquant.quantize.plan import make_plan
from smolquant.quantize.planned import VariantPlan
from smolquant.quantize.sound_layout import sound_layout
from smolquant.quantize.tables import stored_tables
from smolquant.quantize.trial import SECONDS, Trial, try_variants
from smolquant.report.console import Console
from smolquant.report.run_report import PlannedVariant
from smolquant.schemes import Keep
from smolquant.settings import Settings
from smolquant.text import did_you_mean


@dataclass(frozen=True)
class Plans:
    """What will become of a source, before a weight of it is read."""

    architecture: Architecture
    variants: Mapping[str, VariantPlan]

    @property
    def remarks(self) -> list[str]:
        """What users should know of how the checkpoint was understood, in sentences."""
        return [*self.architecture.remarks, *remarks_of(next(iter(self.variants.values())))]


def plan_variants(
    source: Source,
    settings: Settings,
    quant_types: Sequence[str],
    console: Console,
    *,
    trial_seconds: float = SECONDS,
) -> Plans:
    """Plan every variant, before a weight is read, and try the plans on a small model.

    Args:
        trial_seconds: what is not tried by then is not tried.

    Raises:
        CheckpointError: weights are missing or do not fit, the scheme would leave most as they are, or the
            model's own code does not run with quantized weights.
        MachineError: a pickle has to be fetched to be planned, and does not fit on the disk.
    """
    refuse_embedder(source.all_files)
    architecture = Architecture(source.folder, trust_remote_code=settings.trust_remote_code)
    refuse_idle_patterns(settings.skip, architecture)
    if not source.can_stream:  # a pickle has to be here before it tells what it holds
        require_room_for(source.to_fetch())
    layout = sound_layout(source, architecture, console.notice)
    plan = partial(
        make_plan,
        layout,
        architecture,
        [settings.scheme(quant_type) for quant_type in quant_types],
        group_size=settings.group_size,
        dtype=settings.dtype,
        max_shard_size=settings.max_shard_size,
        skip=settings.skip,
        embeddings=settings.embeddings,
        tables=stored_tables(source, layout, architecture),
    )
    variants = plan()
    trials = try_variants(
        architecture,
        variants,
        source.folder,
        skip=settings.skip,
        embeddings=settings.embeddings,
        trust_remote_code=settings.trust_remote_code,
        seconds=trial_seconds,
    )
    give_back_garbage()  # small models, whose modules refer to each other
    for variant, trial in trials.items():
        if trial.refusal:
            raise CheckpointError(f"{variant}: {trial.refusal}", hint=trial.hint)
    if keep := {variant: trial.keep for variant, trial in trials.items() if trial.keep}:
        variants = plan(keep=keep)
    _tell_of(trials, console)
    plans = Plans(architecture, variants)
    for remark in plans.remarks:
        console.notice("How the checkpoint is understood", remark)
    return plans


def refuse_idle_patterns(patterns: Sequence[str], architecture: Architecture) -> None:
    """Refuse a pattern of --skip that no module's name matches: what it meant to keep would be quantized.

    Raises:
        InputError: with names of the model's modules.
    """
    modules = {name: module for name, module in architecture.model.named_modules() if name}
    for pattern in patterns:
        if any(re.search(pattern, name) for name in modules):
            continue
        linears = [name for name, module in modules.items() if isinstance(module, Linear)]
        parts = {part for name in modules for part in name.split(".") if part not in pattern}
        raise InputError(
            f"--skip {pattern} matches the name of no module, so that it would keep nothing as it is.",
            hint=f"{did_you_mean(pattern, parts)}Modules of this model: {shown(linears, most=8)}.",
        )


def _tell_of(trials: Mapping[str, Trial], console: Console) -> None:
    """Each kind of module that has to be kept, once, and what could not be tried."""
    untried, kept = defaultdict[str, list[str]](list), defaultdict[tuple[str, str], list[str]](list)
    for variant, trial in trials.items():
        if trial.untried:
            untried[trial.untried].append(variant)
        for pattern, reason in trial.keep.items():
            kept[pattern, reason].append(variant)
    for (pattern, reason), variants in kept.items():
        name = pattern.replace(r"\d+", "*").replace("\\", "")
        console.notice(f"Kept as it is in {', '.join(variants)}: {name}", f"{reason}.")
    for why, variants in untried.items():
        console.notice(f"Not all tried on a small model first: {', '.join(variants)}", f"{why}.")


def preview_variants(
    source: Source, settings: Settings, quant_types: Sequence[str], console: Console
) -> dict[str, PlannedVariant]:
    """What a dry run tells of each variant; nothing for no types.

    Raises:
        CheckpointError, MachineError: as :func:`plan_variants`.
    """
    if not quant_types:
        return {}
    return {
        variant: PlannedVariant(
            plan.scheme.quant_type,
            {tensor.source.name: tensor.record() for tensor in plan.tensors},
            plan.size_bytes,
        )
        for variant, plan in plan_variants(source, settings, quant_types, console).variants.items()
    }


def remarks_of(plan: VariantPlan) -> list[str]:
    """What a plan does to tensors that the model has no place for, and to tied tables, in sentences."""
    unplaced: dict[tuple[bool, str], list[str]] = {}
    for tensor in plan.tensors:
        if tensor.unplaced and isinstance(tensor.decision, Keep):
            unplaced.setdefault((tensor.dropped, tensor.decision.reason), []).append(tensor.name)
    remarks = [
        f"{len(names)} tensors are {'left out' if dropped else 'carried along unquantized'}, such as "
        f"{names[0]}: {reason}."
        for (dropped, reason), names in unplaced.items()
    ]
    if plan.untied:
        remarks.append(
            "config.json ties the embedding and the output head, but their tensors differ. They are "
            "stored as two, as stock transformers loads them, and the variants' config unties them."
        )
    return remarks
