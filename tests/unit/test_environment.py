"""A process that only computes gets what it works with, and no secret under whatever name."""

import pytest

from smolquant.environment import child_environment


@pytest.mark.fault(
    "secret",
    "A process that only computes is started",
    "It gets what it works with by name, and no token or key.",
)
def test_variables_are_let_through_by_name() -> None:
    works_with = {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/cuda",
        "PYTHONPATH": "/src",
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "2",
        "HF_HOME": "/cache",
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": "http://proxy",
        "LC_ALL": "C.UTF-8",
    }
    secrets = {
        "HF_TOKEN": "a",
        "HUGGING_FACE_HUB_TOKEN": "b",
        "INPUT_HF-TOKEN": "c",
        "TRACKIO_WRITE_TOKEN": "d",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "e",
        "GITHUB_TOKEN": "f",
        "MY_DEPLOY_KEY": "g",
        "PATHS_OF_MINE": "h",
    }
    assert child_environment(works_with | secrets) == works_with
