"""Importing this lets stock ``from_pretrained`` models with int4 weights run on a CPU::

    import smolquant.torchao
    model = AutoModelForCausalLM.from_pretrained(repo, subfolder="int4", device_map="cpu")

Each weight is repacked for this CPU at its first use. :func:`smolquant.load` does that while loading and
frees the plain copy, so it needs half the memory.
"""

import smolquant.runtime.dispatch  # noqa: F401 - importing it is what registers the kernels
