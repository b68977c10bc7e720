"""Check that a model is complete: the config values that this program uses, its weights, its tokenizers."""

import importlib
import json
import math
import numbers
import re
import typing

import diffusers
import torch
from safetensors import safe_open

from settings import Failure

STAND_INS = {"vae": ("AutoencoderTiny", "AsymmetricAutoencoderKL")}  # pipelines take these, too
# Unused weights that models on the hub contain: those of PixArt's training and of whole CLIP models.
SPARE = re.compile(
    r"caption_projection\.y_embedding|(vision_model|visual_projection|text_projection)\.|logit_scale"
    r"|.*(position_ids|num_batches_tracked)$"
)
HIGHEST = 10**9  # the default length of a tokenizer without one is far above


class ModelError(Failure):
    """A model that cannot be loaded or sampled, in one line."""


def _list_of(check):
    return lambda value: isinstance(value, (list, tuple)) and bool(value) and all(map(check, value))


def _none_or(check):
    return lambda value: value is None or check(value)


_number = lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
_whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 10**7
_above_zero = lambda value: _number(value) and value > 0
_share = lambda value: _number(value) and 0 < value < 1
_side = lambda value: _whole(value) or (_list_of(_whole)(value) and len(value) == 2)
COUNT = _whole, "a whole number from 1 up"
COUNTS = _list_of(_whole), "whole numbers from 1 up"
SHARE = _share, "a number between 0 and 1"
SHIFT = lambda value: _number(value) and abs(value) <= 100, "a number from -100 to 100"
HEADS = _none_or(lambda value: _whole(value) or _list_of(_whole)(value)), "null or whole numbers"

# The config values that this program itself reads, by part and name: a check, and what the value must be. The
# libraries check all others.
VALUES = {
    "scheduler": {
        "num_train_timesteps": (lambda value: _whole(value) and value <= 10**5, "a whole number from 1 to 100000"),
        **dict.fromkeys(("beta_start", "beta_end"), SHARE),
        "trained_betas": (_none_or(_list_of(_share)), "null, or numbers between 0 and 1"),
        "shift": (lambda value: _above_zero(value) and value <= 1000, "a number above 0, at most 1000"),
        "clip_sample_range": (_above_zero, "a number above 0"),
        **dict.fromkeys(("base_shift", "max_shift"), SHIFT),
        **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), COUNT),
    },
    "network": {
        **dict.fromkeys(("in_channels", "pos_embed_max_size"), COUNT),
        "sample_size": (_none_or(_side), "a whole number from 1 up, or two"),
        "block_out_channels": COUNTS,
        **dict.fromkeys(("attention_head_dim", "num_attention_heads"), HEADS),
        "down_block_types": (_none_or(_list_of(lambda value: isinstance(value, str))), "null or names of blocks"),
    },
    "vae": {
        "scaling_factor": (_above_zero, "a number above 0"),
        "shift_factor": (_none_or(_number), "null or a number"),
        **dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), COUNTS),
        "latents_mean": (_none_or(_list_of(_number)), "null or numbers"),
        "latents_std": (_none_or(_list_of(_above_zero)), "null or numbers above 0"),
    },
}


def check_values(name, part, config):
    """Raise ModelError unless the values in a model's config are valid; `part` is a key of VALUES."""
    for key, (will_do, wanted) in VALUES[part].items():
        if key in config and not will_do(config[key]):
            raise ModelError(f"{name} has {key} {str(config[key])[:80]!r} in its {part}'s config; it must be {wanted}")
    if config.get("base_image_seq_len", 256) == config.get("max_image_seq_len", 4096):
        raise ModelError(f"{name} has a base_image_seq_len that equals its max_image_seq_len")
    betas, steps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if part == "scheduler" and config.get("beta_start", 0) > config.get("beta_end", 1):
        raise ModelError(f"{name} has a beta_start above its beta_end")
    if part == "scheduler" and betas is not None and len(betas) != steps:
        raise ModelError(f"{name} has {len(betas)} trained_betas for {steps} training timesteps")


def check_files(name, folder):
    """Raise ModelError if a folder holds something that is neither a file nor a folder, such as a pipe."""
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise ModelError(f"{name}: {path.relative_to(folder)} is neither a file nor a folder")


def load_networks(name, folder, kind, index, given, dtype, variant):
    """Load and return the parts of a pipeline that have weights, by name, each checked to be complete.

    folder: the model's. kind: its class in diffusers. index: its model_index.json. given: the arguments for its
    from_pretrained, including parts that are given or not wanted. Raises ModelError, and what the libraries raise.
    """
    parts, hints = {}, typing.get_type_hints(getattr(diffusers, kind).__init__)
    for part, source in index.items():
        hint = hints.get(part)
        wanted = tuple(each for each in typing.get_args(hint) or [hint] if _has_weights(each))
        library, its_class = source if isinstance(source, list) and len(source) == 2 else (None, None)
        if part in given or not wanted or library not in ("diffusers", "transformers"):
            continue
        found = getattr(importlib.import_module(library), str(its_class), None)
        wanted += tuple(getattr(diffusers, name) for name in STAND_INS.get(part, ()))
        # PixArt's first models name Transformer2DModel, from which its own class was split off; the library loads that.
        if not _has_weights(found) or not issubclass(found, (*wanted, diffusers.Transformer2DModel)):
            raise ModelError(f"{name}: its {part} is a {its_class}, which a {kind} does not take")
        place = folder / part if (folder / part).is_dir() else folder  # old models of one network
        weights = list(place.glob("*.safetensors"))
        safe = bool(given.get("use_safetensors") or weights)
        how = {"dtype" if library == "transformers" else "torch_dtype": dtype, "use_safetensors": safe}
        how |= {"variant": variant} if any(f".{variant}." in path.name for path in place.iterdir()) else {}
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        if not config.get("quantization_config"):
            _check_types(name, part, weights or place.glob("*.bin"))
        network, report = found.from_pretrained(place, output_loading_info=True, **how)
        extra = [key for key in map(str, report["unexpected_keys"]) if not SPARE.match(key)]
        for words, keys in (("lack", map(str, report["missing_keys"])), ("have, beyond its config,", extra)):
            if keys := sorted(keys):
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise ModelError(f"{name}: the weights of its {part} {words} {', '.join(keys[:3])}{more}")
        if not isinstance(network, wanted):
            raise ModelError(f"{name}: its {part} is a {type(network).__name__}, which a {kind} does not take")
        parts[part] = network
    return parts


def _has_weights(kind):
    return isinstance(kind, type) and issubclass(kind, torch.nn.Module)


def _check_types(name, part, files):
    """Raise ModelError if weights are not in floating point; the libraries would misread them."""
    for file in files:
        if file.suffix == ".bin":
            tensors = torch.load(file, map_location="meta", weights_only=True)
            kinds = {key: "F" if tensor.is_floating_point() else str(tensor.dtype) for key, tensor in tensors.items()}
        else:
            with safe_open(file, "pt") as weights:
                kinds = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
        for key, kind in kinds.items():
            if not kind.startswith(("F", "BF")) and not key.endswith(("position_ids", "num_batches_tracked")):
                raise ModelError(f"{name}: the weights of its {part} have {key} as {kind}, not in floating point")


def check_tokenizers(name, pipeline):
    """Raise ModelError if a tokenizer cannot belong to its encoder; one without a length gets the encoder's."""
    for part, tokenizer in pipeline.components.items():
        encoder = getattr(pipeline, part.replace("tokenizer", "text_encoder"), None)
        if not part.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        ids, rows = tokenizer.get_vocab().values(), encoder.get_input_embeddings().num_embeddings
        if len(set(ids)) <= len(tokenizer.all_special_tokens):
            raise ModelError(f"{name}: its {part} has no vocabulary, and would read all prompts alike")
        if max(ids) >= rows:
            raise ModelError(f"{name}: its {part} has ids up to {max(ids)}, but its text encoder {rows} embeddings")
        places, length = getattr(encoder.config, "max_position_embeddings", None), tokenizer.model_max_length
        if places and not length <= HIGHEST:  # or it is no number
            tokenizer.model_max_length = places
        elif places and length > places or length < 2:
            raise ModelError(f"{name}: its {part} has model_max_length {length}, its text encoder {places} positions")
