"""Check that a model is complete: its scheduler's config, its weights, its tokenizers."""

import importlib
import json
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


# The numbers of a scheduler's config that this program reads, and what each lies between.
BETWEEN = {
    "num_train_timesteps": (0, 10**5), "beta_start": (0, 1), "beta_end": (0, 1), "shift": (0, 1000),
    "clip_sample_range": (0, 10**6), "base_shift": (-100, 100), "max_shift": (-100, 100),
    "base_image_seq_len": (0, 10**7), "max_image_seq_len": (0, 10**7),
}  # fmt: skip


def _is_between(value, low, high):
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low < value < high


def check_scheduler(name, config):
    """Raise ModelError unless the values in a scheduler's config are valid."""
    for key, (low, high) in BETWEEN.items():
        if key in config and not _is_between(config[key], low, high):
            what = f"{key} {str(config[key])[:80]!r} in its scheduler's config"
            raise ModelError(f"{name} has {what}; it must be between {low} and {high}")
    if config.get("base_image_seq_len", 256) == config.get("max_image_seq_len", 4096):
        raise ModelError(f"{name} has a base_image_seq_len that equals its max_image_seq_len")
    if config.get("beta_start", 0) > config.get("beta_end", 1):
        raise ModelError(f"{name} has a beta_start above its beta_end")
    betas, steps = config.get("trained_betas") or [], config.get("num_train_timesteps", 1000)
    if betas and not (len(betas) == steps and all(_is_between(beta, 0, 1) for beta in betas)):
        raise ModelError(f"{name} has trained_betas that are not {steps} numbers between 0 and 1")


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
    parts, hints = {}, typing.get_type_hints(kind.__init__)
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
            raise ModelError(f"{name}: its {part} is a {its_class}, which a {kind.__name__} does not take")
        place = folder / part if (folder / part).is_dir() else folder  # old models of one network
        weights = list(place.glob("*.safetensors"))
        how = {"dtype" if library == "transformers" else "torch_dtype": dtype, "use_safetensors": bool(weights)}
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
            raise ModelError(f"{name}: its {part} is a {type(network).__name__}, which a {kind.__name__} does not take")
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
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise ModelError(f"{name}: its {part} has no vocabulary, and would read all prompts alike")
        places, length = getattr(encoder.config, "max_position_embeddings", None), tokenizer.model_max_length
        if places and not length <= HIGHEST:  # or it is no number
            tokenizer.model_max_length = places
        elif places and length > places or length < 2:
            raise ModelError(f"{name}: its {part} has model_max_length {length}, its text encoder {places} positions")
