"""The C code by its own tests, tests/c/, as CI's machine can run them; `make test-arm` runs them for ARM.

They compare with plain arithmetic, or with recorded bytes, and need no torch. What Python makes of the code
is tested beside its modules.
"""

import shutil
from pathlib import Path

import pytest

from c_tests import MODULES, WAYS, CannotRun, Way, run

HERE = [(name, module) for name, way in WAYS.items() if name != "arm" for module in way.modules]


@pytest.mark.parametrize(("name", "module"), HERE)
def test_it_computes_what_it_should_with_every_vector_of_this_cpu(
    name: str, module: str, tmp_path: Path
) -> None:
    done = run(module, WAYS[name], tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("\n0 faults\n")


@pytest.mark.skipif("fma" not in Path("/proc/cpuinfo").read_text().split(), reason="no such CPU")
def test_a_build_that_gives_other_bytes_is_told(tmp_path: Path) -> None:
    """One that fuses products and sums, as compilers do where the release's options are lost."""
    fused = Way(options=("-mfma", "-ffp-contract=fast", "-DEVERY_CPU="))
    done = run("int4_search", fused, tmp_path)
    assert done.returncode == 1
    assert "other bytes than those recorded" in done.stdout


def test_what_is_missing_for_another_cpu_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(CannotRun, match=r"aarch64-linux-gnu-gcc is not installed.*apt-get install"):
        run(next(iter(MODULES)), WAYS["arm"], tmp_path)
