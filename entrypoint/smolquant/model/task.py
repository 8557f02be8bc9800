"""The task of a checkpoint, as its own ``architectures`` tells it, and the class that loads it.

An auto class can be talked into building a text generator of nearly anything: of a reward model without its
score head, of a speech model without its encoder. So the class that the config names decides, by
transformers' own tables of which class is for what.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from smolquant.errors import CheckpointError
from smolquant.names import shown
from smolquant.record import IMAGE_TEXT_TO_TEXT, TEXT_GENERATION, Task

_TEXT = "MODEL_FOR_CAUSAL_LM"
_IMAGES = "MODEL_FOR_IMAGE_TEXT_TO_TEXT"

_ENCODERS = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": "turning one text into another, which an encoder reads",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ": "writing down speech, which an encoder hears",
}
_OTHER_TASKS = {
    **_ENCODERS,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": "judging whole texts, as classifiers and reward models do",
    "MODEL_FOR_TOKEN_CLASSIFICATION": "classifying tokens",
    "MODEL_FOR_QUESTION_ANSWERING": "marking answers in a text",
    "MODEL_FOR_MULTIPLE_CHOICE": "choosing between answers",
    "MODEL_FOR_MASKED_LM": "filling in masked words from both sides",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION": "telling whether sentences follow each other",
    "MODEL_FOR_MULTIMODAL_LM": "answering about sound or other media beside pictures",
    "MODEL_FOR_PRETRAINING": "several objectives of pretraining at once",
    "MODEL": "computing hidden states, as embedders do",
}
"""What the classes in each table of transformers are for; a class counts for the first that has it."""

_EMBEDDERS = {"modules.json", "config_sentence_transformers.json"}
"""The files by which sentence-transformers knows its models."""


_ONLY_GENERATORS = "smolquant quantizes models that generate text."


def task_of(config: Mapping[str, Any]) -> Task:
    """What the model of a config.json is for.

    Raises:
        CheckpointError: something other than generating text, with pictures or without.
    """
    named, own = named_class(config), _own_auto_classes(config)
    if named is None:
        by_code = "AutoModelForImageTextToText" in own and "AutoModelForCausalLM" not in own
        by_type = config.get("model_type") in _table(_IMAGES)
        return IMAGE_TEXT_TO_TEXT if by_code or by_type else TEXT_GENERATION
    if named in _classes(_IMAGES):
        return IMAGE_TEXT_TO_TEXT
    if named.lower() in {name.lower() for name in _classes(_TEXT)}:
        return TEXT_GENERATION
    words = next((words for table, words in _OTHER_TASKS.items() if named in _classes(table)), None)
    if words is None and "AutoModelForCausalLM" in own:
        return TEXT_GENERATION
    if words is None and "AutoModelForImageTextToText" in own:
        return IMAGE_TEXT_TO_TEXT
    raise _other_task(named, words, config)


def auto_class(config: Any) -> Any:
    """The auto class of transformers that loads a model, by its config.json or its transformers config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    fields = config if isinstance(config, Mapping) else config.to_dict()
    of_images = task_of(fields) == IMAGE_TEXT_TO_TEXT
    return AutoModelForImageTextToText if of_images else AutoModelForCausalLM


def named_class(config: Mapping[str, Any]) -> str | None:
    """The class that ``architectures`` names; None where it names none."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and first else None


def runs_own_code(model: Any) -> bool:
    """Whether a model was built by code that its repository brings along."""
    return type(model).__module__.startswith("transformers_modules.")


def check_built(config: Mapping[str, Any], model: Any) -> list[str]:
    """Make sure that what transformers has built is what the config names, and that it generates text.

    Returns:
        What users should know of how the class was chosen, in sentences.

    Raises:
        CheckpointError: it is another class, has an encoder, or reads both sides of a word.
    """
    named, built = named_class(config), type(model).__name__
    if _has_encoder(model.config):
        raise _other_task(built, "answering an input that an encoder reads", config)
    if _looks_ahead(model.config):
        raise _other_task(
            built, "filling in masked words from both sides: its config has no is_decoder", config
        )
    if runs_own_code(model):
        return [f"The model is built by the repository's own code: {built}, which auto_map names."]
    if named is None:
        return [
            f"config.json names no class (`architectures`); it is taken for {built} by its model type, "
            f"{config.get('model_type')}."
        ]
    if named.lower() == built.lower():
        return []
    if _own_auto_classes(config):
        raise CheckpointError(
            f"config.json names {named}, which is code of the repository's own, and transformers would "
            f"build {built} in its place.",
            hint="Read the code that the repository brings along; if you trust it, add "
            "--trust-remote-code.",
        )
    raise CheckpointError(
        f"config.json names {named}, but transformers builds {built} from its model type "
        f"{config.get('model_type')!r}.",
        hint="Save the model with the class that it was trained as.",
    )


def refuse_embedder(names: Collection[str]) -> None:
    """Refuse what lies in the folder or repository with the files of sentence-transformers.

    Args:
        names: the names of the files there.

    Raises:
        CheckpointError: it is an embedder.
    """
    found = sorted(_EMBEDDERS.intersection(names))
    if found:
        raise CheckpointError(
            f"This is an embedder of sentence-transformers ({' and '.join(found)} "
            f"{'say' if len(found) > 1 else 'says'} so), and {_ONLY_GENERATORS} A variant would lose "
            "its pooling and whatever else follows the transformer.",
            hint="Quantize the model that generates text, or load this one with sentence-transformers.",
        )


def _other_task(named: str, words: str | None, config: Mapping[str, Any]) -> CheckpointError:
    """The error for a class that is for something other than generating text."""
    purpose = f"is made for {words}" if words else "is no class that transformers knows"
    lost = _lost_tensors(named, config)
    losing = ""
    if lost:
        names = shown(lost, most=3)
        losing = f" A text generator made of it would lack {len(lost)} of its tensors: {names}."
    elif words is None:
        losing = " Nobody can tell what a text generator made of it would lack."
    else:
        losing = " A text generator made of it would be another model, which nobody has trained."
    return CheckpointError(
        f"The model is a {named}, which {purpose}, and {_ONLY_GENERATORS}{losing}",
        hint="Quantize a model that AutoModelForCausalLM or AutoModelForImageTextToText is for.",
    )


def _lost_tensors(named: str, config: Mapping[str, Any]) -> Sequence[str]:
    """The tensors that the named class has and a text generator made of it lacks; none if unknown."""
    import torch
    import transformers

    itself = getattr(transformers, named, None)
    try:
        built = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            whole = itself._from_config(built).state_dict()  # type: ignore[union-attr]
            generator = transformers.AutoModelForCausalLM.from_config(built).state_dict()
    except (
        Exception
    ):  # a config can make transformers raise anything, and this is a detail of an error
        return []
    return [name for name in whole if name not in generator]


def _has_encoder(config: Any) -> bool:
    return any(
        getattr(one, "is_encoder_decoder", False) for one in (config, config.get_text_config())
    )


def _looks_ahead(config: Any) -> bool:
    """Whether the model reads the words after a gap too, as an encoder does, and so cannot generate."""
    if getattr(config, "causal", True) is False:
        return True
    is_encoder = getattr(config, "model_type", None) in _table("MODEL_FOR_MASKED_LM")
    return is_encoder and getattr(config, "is_decoder", True) is False


def _own_auto_classes(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``auto_map``: auto class -> the repository's own code for it."""
    own = config.get("auto_map")
    return own if isinstance(own, Mapping) else {}


def _table(name: str) -> Mapping[str, Any]:
    """transformers' table of a task: model type -> class, or several."""
    from transformers.models.auto import modeling_auto

    table: Mapping[str, Any] = getattr(modeling_auto, f"{name}_MAPPING_NAMES")
    return table


def _classes(table: str) -> set[str]:
    return {
        name
        for names in _table(table).values()
        for name in ([names] if isinstance(names, str) else names)
    }
