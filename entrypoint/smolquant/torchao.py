"""Importing this gives stock ``from_pretrained`` models smolquant's kernels on a CPU, int4 and int8::

    import smolquant.torchao
    model = AutoModelForCausalLM.from_pretrained(repo, subfolder="int4", device_map="cpu")

They compute with the weights as they are stored. A model that :func:`smolquant.load` has loaded has the
same kernels, and calls them without torchao's dispatch in between, which costs as much as a small layer.
"""

import smolquant.runtime.dispatch
import smolquant.runtime.quantizer  # noqa: F401 - reads the weights quickly, and lets them be saved
