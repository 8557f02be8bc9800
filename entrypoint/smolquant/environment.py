"""What of this process's environment another process gets: what it works with, and never a secret.

Variables are let through by name, so that a secret under a name of the workflow's own stays here.
"""

import re
from collections.abc import Mapping

_MACHINE = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TEMP|TMP|XDG_\w+"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|MALLOC_\w+|GLIBC_TUNABLES"
    r"|PYTHON\w+|VIRTUAL_ENV"
    r"|(?:HTTPS?|ALL|NO)_PROXY|(?:https?|all|no)_proxy"
    r"|SSL_CERT_(?:FILE|DIR)|(?:REQUESTS|CURL)_CA_BUNDLE"
    r"|OMP_\w+|KMP_\w+|GOMP_\w+|MKL_\w+|OPENBLAS_\w+|ATEN_\w+|ONEDNN_\w+|DNNL_\w+"
    r"|HIP_\w+|HSA_\w+|ROCR_\w+|CUDA_\w+|CUBLAS\w*|CUDNN_\w+|NVIDIA_\w+|NCCL_\w+|TRITON_\w+"
    r"|TORCH\w*|PYTORCH_\w+|TRANSFORMERS_\w+|TOKENIZERS_PARALLELISM|SAFETENSORS_\w+"
    r"|HF_(?:HOME|ENDPOINT|HUB_\w+|XET_\w+|DEBUG|MODULES_CACHE|ASSETS_CACHE)"
    r"|SMOLQUANT_\w+"
)
"""What any process of ours may need of the machine, of its libraries, and of the way to the network."""

RUN = re.compile(
    r"INPUT_.+|CI|GITHUB_(?!TOKEN$)\w+|RUNNER_\w+|TRACKIO_\w+|HF_\w+|HUGGING_FACE_HUB_TOKEN"
    r"|ACTIONS_ID_TOKEN_REQUEST_(?:TOKEN|URL)"
)
"""What a process needs besides that does the whole run: its inputs, its tokens, and the runner's files."""


def child_environment(environ: Mapping[str, str], *also: re.Pattern[str]) -> dict[str, str]:
    """The variables of ``environ`` that another process gets.

    Args:
        also: what is let through besides what any process may need: patterns of whole names.
    """
    return {
        name: value
        for name, value in environ.items()
        if any(one.fullmatch(name) for one in (_MACHINE, *also))
    }
