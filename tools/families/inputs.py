"""What small models are run on: a few tokens, and a picture where its tensors can be made by hand.

A family's own processor would make them, but processors come with checkpoints. So there are a few ways in
which transformers' classes take pictures, tried in turn; one holds if the logits depend on the pixels.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

_TOKENS = 24
_IMAGE_TOKENS = (
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
    "video_token_index",
)


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of a model's forward."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    has_image: bool = False

    def for_model(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The arguments, those of floating point in the model's dtype."""
        return {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in self.tensors.items()
        }


def text_inputs(model: PreTrainedModel) -> Inputs:
    """A prompt of tokens that mean nothing special to ``model``."""
    rows = model.get_input_embeddings().weight.shape[0]
    taken = {
        value
        for config in (model.config, model.config.get_text_config())
        for name, value in config.to_dict().items()
        if isinstance(value, int) and name.endswith(("token_id", "token_index"))
    }
    free = [token for token in range(3, rows) if token not in taken]
    ids = torch.tensor([[free[place % len(free)] for place in range(_TOKENS)]])
    return Inputs({"input_ids": ids})


@torch.no_grad()
def with_image(model: PreTrainedModel, text: Inputs) -> Inputs | None:
    """``text`` and a picture; None where none of the ways makes ``model`` look at one."""
    takes = set(inspect.signature(model.forward).parameters)
    for way in _WAYS:
        try:
            for tensors in way(model, takes):
                found = Inputs(_with_tokens(model, text, tensors), has_image=True)
                if found.tensors.keys() <= takes and _is_seen(model, found):
                    return found
        except Exception:
            continue
    return None


def _is_seen(model: PreTrainedModel, inputs: Inputs) -> bool:
    tensors = inputs.for_model(model)
    try:
        logits = model(**tensors).logits
        other = model(**(tensors | {"pixel_values": -tensors["pixel_values"]})).logits
    except Exception:
        return False
    return bool(torch.isfinite(logits).all()) and not torch.equal(logits, other)


Tensors = dict[str, torch.Tensor]
Way = Callable[[PreTrainedModel, set[str]], Iterator[Tensors]]


def _with_tokens(model: PreTrainedModel, text: Inputs, tensors: Tensors) -> Tensors:
    """``tensors`` with the prompt, after as many image tokens as the picture has features."""
    tensors = dict(tensors)
    n_features = int(tensors.pop("n_features", torch.tensor(0)))
    ids = text.tensors["input_ids"]
    token = _image_token(model)
    if n_features and token is not None:
        ids = torch.cat([ids[:, :3], torch.full((1, n_features), token), ids[:, 3:]], dim=1)
    takes = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes and token is not None:
            tensors[name] = (ids == token).long()
            break
    return tensors | {"input_ids": ids}


def _image_token(model: PreTrainedModel) -> int | None:
    for name in _IMAGE_TOKENS:
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None


def _vision(model: PreTrainedModel) -> Any:
    for name in ("vision_config", "vision", "vq_config"):
        if getattr(model.config, name, None) is not None:
            return getattr(model.config, name)
    return model.config


def _first(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return default


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _features(model: PreTrainedModel, tensors: Tensors) -> int:
    """How many tokens a picture takes, as the model's own code computes its features."""
    own = inspect.signature(model.get_image_features).parameters
    given = Inputs({name: value for name, value in tensors.items() if name in own})
    found = model.get_image_features(**given.for_model(model))
    found = getattr(found, "pooler_output", found)
    width = _first(model.config.get_text_config(), "hidden_size", "d_model", default=1)
    return sum(tensor.numel() for tensor in _tensors(found)) // width


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _tensors(item)


def _counted(model: PreTrainedModel, tensors: Tensors) -> Tensors:
    return tensors | {"n_features": torch.tensor(_features(model, tensors))}


def _pixels(model: PreTrainedModel) -> torch.Tensor:
    vision = _vision(model)
    size = _first(vision, "image_size", "img_size", "input_size", default=4 * _patch(vision))
    return _noise(1, _channels(vision), size, size)


def _patch(vision: Any) -> int:
    return _first(vision, "patch_size", "spatial_patch_size", default=14)


def _channels(vision: Any) -> int:
    return _first(vision, "num_channels", "in_channels", "in_chans", default=3)


def _one_picture(model: PreTrainedModel, takes: set[str]) -> Iterator[Tensors]:
    """(1, C, S, S), in place of image tokens, as LLaVA."""
    pixels = _pixels(model)
    yield _counted(model, {"pixel_values": pixels})
    if "image_sizes" in takes:
        sizes = torch.tensor([pixels.shape[-2:]])
        yield _counted(model, {"pixel_values": pixels, "image_sizes": sizes})


def _tiles(model: PreTrainedModel, takes: set[str]) -> Iterator[Tensors]:
    """(1, tiles, C, S, S), as LLaVA-NeXT and Idefics."""
    pixels = _pixels(model)
    sizes = {"image_sizes": torch.tensor([pixels.shape[-2:]])} if "image_sizes" in takes else {}
    for tiles in (1, 2, 3, 5):
        several = pixels.unsqueeze(1).repeat(1, tiles, 1, 1, 1)
        for extra in (sizes, {}):
            try:
                yield _counted(model, {"pixel_values": several} | extra)
            except Exception:
                continue


def _patches(model: PreTrainedModel, takes: set[str]) -> Iterator[Tensors]:
    """Patches of a grid in one row each, as Qwen-VL."""
    vision = _vision(model)
    width = _channels(vision) * _patch(vision) ** 2
    grids = [name for name in ("image_grid_thw", "image_grid_hws", "grid_thws") if name in takes]
    side = 2 * _first(vision, "spatial_merge_size", "merge_size", default=2)
    for grid in grids:
        for frames in (_first(vision, "temporal_patch_size", default=1), 1):
            shape = [1, side, side] if grid.endswith("thw") or grid == "grid_thws" else [side, side]
            tensors = {
                "pixel_values": _noise(side * side, width * frames),
                grid: torch.tensor([shape]),
            }
            try:
                yield _counted(model, tensors)
            except Exception:
                continue
        tensors = {
            "pixel_values": _noise(side * side, _channels(vision), _patch(vision), _patch(vision)),
            grid: torch.tensor([[1, side, side]]),
        }
        yield _counted(model, tensors)


def _masked_patches(model: PreTrainedModel, takes: set[str]) -> Iterator[Tensors]:
    """(1, patches, C P P) with the shape of the grid, as SigLIP 2."""
    vision = _vision(model)
    side = 4
    yield _counted(
        model,
        {
            "pixel_values": _noise(1, side * side, _channels(vision) * _patch(vision) ** 2),
            "spatial_shapes": torch.tensor([[side, side]]),
            "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.int64),
        },
    )


def _beside_text(model: PreTrainedModel, takes: set[str]) -> Iterator[Tensors]:
    """(1, C, S, S) beside the text and not in place of tokens, as BLIP and GIT."""
    pixels = _pixels(model)
    yield {"pixel_values": pixels}
    several = pixels.unsqueeze(1)
    yield {"pixel_values": several}
    if "qformer_input_ids" in takes:
        question = {"qformer_input_ids": torch.arange(3, 9).unsqueeze(0)}
        tokens = {"n_features": torch.tensor(model.config.num_query_tokens)}
        yield {"pixel_values": pixels} | question | tokens
        yield {"pixel_values": several} | question | tokens
    if "image_attention_mask" in takes:
        yield {
            "pixel_values": several,
            "image_attention_mask": torch.ones(1, _TOKENS, 1, dtype=torch.int64),
        }


def _crossed(model: PreTrainedModel, takes: set[str]) -> Iterator[Tensors]:
    """Tiles that the text attends to, as Mllama."""
    tiles = _first(_vision(model), "max_num_tiles", default=4)
    yield {
        "pixel_values": _pixels(model)[:, None, None].repeat(1, 1, tiles, 1, 1, 1),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.int64),
        "cross_attention_mask": torch.ones(1, _TOKENS, 1, tiles, dtype=torch.int64),
    }


_WAYS: tuple[Way, ...] = (
    _one_picture,
    _patches,
    _tiles,
    _masked_patches,
    _crossed,
    _beside_text,
)
