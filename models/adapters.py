"""LoRA weights and textual inversion embeddings, from files or the hub into a pipeline just loaded."""

import contextlib
from pathlib import Path

from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

from settings import SettingError, in_one_line, out_of_memory, split_scale

# Which text encoder an embedding is for, where a file has several.
ENCODERS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_2", "tokenizer_2"),
}


def load_loras(pipeline, loras):
    """Load LoRA weights (Hu et al., 2021), each a path or hub id with ":SCALE" where that is not 1, and use them.

    Raises SettingError for one that cannot be read or that does not fit the model.
    """
    names, scales = [], []
    for i, lora in enumerate(loras):
        path, scale = split_scale(lora)
        name = f"lora_{i}"
        with _refusing("lora", lora):
            weights = _lora_weights(pipeline, path)
            pipeline.load_lora_weights(path, adapter_name=name, use_safetensors=True)
        # diffusers only warns of weights that it finds no place for.
        tensors = sum("lora" in key and not key.endswith("alpha") for key in weights)
        modules = [part for part in pipeline.components.values() if hasattr(part, "named_parameters")]
        placed = sum(f".{name}." in f"{key}." for part in modules for key, _ in part.named_parameters())
        if placed < max(tensors, 1):
            remedy = f"does not fit the model, which has places for {placed} of its {tensors} tensors"
            raise SettingError("lora", lora, f"{remedy}; give one that was made for it")
        names.append(name)
        scales.append(scale)
    if names:
        pipeline.set_adapters(names, scales)


def _lora_weights(pipeline, path):
    found = pipeline.lora_state_dict(path, use_safetensors=True)
    return found[0] if isinstance(found, tuple) else found  # some pipelines return what scales them as well


def load_textual_inversions(pipeline, embeddings):
    """Load textual inversion embeddings (Gal et al., 2022), each a path or hub id.

    Prompts name one by the token in its file or, where that has none (several text encoders), by the file's name.
    Raises SettingError for one that cannot be read or that does not fit the model.
    """
    for path in embeddings:
        with _refusing("textual_inversion", path):
            (weights,) = load_textual_inversion_state_dicts([path], use_safetensors=True)
            token = Path(path).stem if weights.keys() & {*ENCODERS, "emb_params"} else None
            parts = {encoder: {token: weights[name]} for name, encoder in ENCODERS.items() if name in weights}
            parts = parts or {ENCODERS["clip_l"]: weights}
            present = {part for part in ENCODERS.values() if getattr(pipeline, part[0], None) is not None}
            if parts.keys() != present:
                raise ValueError(f"it is for {len(parts)} text encoders, where the model has {len(present)}")
            for (encoder, tokenizer), part in parts.items():
                places = {"text_encoder": getattr(pipeline, encoder), "tokenizer": getattr(pipeline, tokenizer)}
                pipeline.load_textual_inversion(part, token=token, **places)


@contextlib.contextmanager
def _refusing(setting, value):
    """Whatever the libraries say of a file, as SettingError."""
    try:
        yield
    except Exception as error:  # of torch, peft, diffusers and what they read files with, each with its own
        if out_of_memory(error):
            raise
        unreadable = type(error).__module__.startswith(("huggingface_hub", "httpx", "safetensors"))
        if unreadable or isinstance(error, OSError):
            remedy = f"cannot be read ({in_one_line(error)}); give a .safetensors file, a folder or a hub id"
        else:
            remedy = f"does not fit the model ({in_one_line(error)}); give one that was made for it"
        raise SettingError(setting, value, remedy) from error
