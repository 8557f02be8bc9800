"""Planning does the same work for each tensor, however many there are."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import models
from smolquant.checkpoint.folder import FolderSource
from smolquant.model.architecture import Architecture
from smolquant.quantize import planning, trial
from smolquant.report.console import Console
from smolquant.settings import make_settings

LAYERS = 60


def test_a_deep_plan_asks_for_each_tensor_once_and_tries_only_what_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for, patterns = Counter[tuple[int, str]](), []
    rename, plan = Architecture._rename, trial._Laboratory._plan

    def counted(self: Architecture, name: str) -> Any:
        asked_for[id(self), name] += 1
        return rename(self, name)

    def noted(self: Any, full: Any, keep: Any) -> Any:
        patterns.append(len(keep))
        return plan(self, full, keep)

    monkeypatch.setattr(Architecture, "_rename", counted)
    monkeypatch.setattr(trial._Laboratory, "_plan", noted)
    folder = models.save_zeros(tmp_path / "deep", models.llama(LAYERS))
    settings = make_settings(
        model_path=str(folder), repo_name=None, save_only=True, output_dir=str(tmp_path / "out")
    )
    plans = planning.plan_variants(
        FolderSource(folder), settings, settings.quant_types, Console({}, io.StringIO())
    )
    (made,) = plans.variants.values()
    assert len(made.tensors) > 9 * LAYERS
    assert set(asked_for.values()) == {1}
    assert max(patterns) < 2 * LAYERS, "patterns are compared with every module of the small model"
