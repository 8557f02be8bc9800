"""Settings that must stand before the Hub client is imported, and the parts that tests share."""

import os
import random
import tempfile

os.environ["HF_HUB_DISABLE_XET"] = "1"  # the local Hub speaks LFS
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="smolquant-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for leaked in [name for name in os.environ if name.startswith(("INPUT_", "GITHUB_"))] + [
    "HF_TOKEN",
    "HF_ENDPOINT",
]:
    os.environ.pop(leaked, None)

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

import models
from command import Run, run_smolquant
from localhub import LocalHub, Token
from smollm2 import make_checkpoint
from smolquant import secrecy


@pytest.fixture(autouse=True)
def http_client_of_its_own() -> Iterator[None]:
    """No test inherits the HTTP client of another's Hub, which tells its token to that Hub only."""
    yield
    set_client_factory(default_client_factory)


# The same examples every time, so that nothing but a change makes a test fail. To look for others:
# pytest tests/unit --hypothesis-profile=wander
hypothesis.settings.register_profile(
    "steady", derandomize=True, max_examples=60, deadline=None, database=None
)
hypothesis.settings.register_profile("wander", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("steady")

WRITE = Token("hf_alice_writes", "alice")
READ = Token("hf_alice_reads", "alice", role="read")
OTHER = Token("hf_bob_writes", "bob")


@pytest.fixture(autouse=True)
def _no_secrets() -> None:
    """Each test begins without the secrets that another has given this process."""
    secrecy._given.clear()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real trained model, SmolLM2-135M-Instruct, as a checkpoint folder; only to be read."""
    cached = os.environ.get("SMOLQUANT_TEST_CHECKPOINT")
    return make_checkpoint(Path(cached) if cached else tmp_path_factory.mktemp("model") / "smollm2")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small SmolLM3 with a tokenizer, in a folder of its own."""
    return models.save_with_tokenizer(tmp_path / "checkpoint", models.FAMILIES["smollm3"]())


@pytest.fixture(scope="session")
def make_hub() -> Callable[..., LocalHub]:
    """Makes a local Hub, where that is possible at the address that the last one had: see prepared.py.

    No connection gets a port of its own from so low.
    """
    port = random.SystemRandom().randrange(20_000, 32_000)

    def make(folder: Path, tokens: Sequence[Token]) -> LocalHub:
        try:
            return LocalHub(folder, tokens, port=port)
        except OSError:  # another program has the port, or another Hub of the test
            return LocalHub(folder, tokens)

    return make


@pytest.fixture
def hub(tmp_path: Path, make_hub: Callable[..., LocalHub]) -> Iterator[LocalHub]:
    """An empty local Hub that knows alice (read and write) and bob."""
    with make_hub(tmp_path / "hub", [WRITE, READ, OTHER]) as server:
        yield server


@pytest.fixture
def smolquant(tmp_path: Path) -> Callable[..., Run]:
    """Runs the command as a user would, in a process of its own and a folder of its own."""

    def run(*arguments: str | Path, **options: object) -> Run:
        return run_smolquant(*arguments, folder=tmp_path, **options)  # type: ignore[arg-type]

    return run
