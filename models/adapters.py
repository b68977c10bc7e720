"""Load LoRA weights and textual inversion embeddings, from files or the hub, into a new pipeline."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts
from huggingface_hub import snapshot_download
from safetensors import safe_open

from settings import SettingError, in_one_line, out_of_memory, split_scale

ENCODERS = {"clip_l": "", "clip_g": "_2", "t5": "_2"}  # suffix of the encoder and tokenizer, by key
OTHERS = {"DoRA": "dora_scale", "LoKr": "lokr_", "LoHa": "hada_", "OFT": "oft_"}  # by a part of their keys


class Adapter(NamedTuple):
    """LoRA weights or embeddings on disk. how: the scale of a LoRA, or the name of an embedding in prompts."""

    given: str
    path: Path
    how: float | str


def find_adapters(loading):
    """Return the `Adapter`s that a `settings.Loading` names, a list by setting; those on the hub are downloaded.

    Raises SettingError for one that does not exist.
    """
    loras = [(given, *split_scale(given)) for given in loading.lora]
    embeddings = [(given, given, Path(given).stem) for given in loading.textual_inversion]
    known = {"lora": loras, "textual_inversion": embeddings}
    return {setting: [Adapter(given, _on_disk(setting, given, name), how) for given, name, how in some]
            for setting, some in known.items()}  # fmt: skip


def _on_disk(setting, given, name):
    if os.path.exists(name):
        return Path(name)
    if name.endswith(".safetensors") or name.startswith((".", "/", "~")):
        raise SettingError(setting, given, "is neither a file nor a folder here; give one, or a hub id")
    with _refusing(setting, given):
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def load_loras(pipeline, loras):
    """Load LoRA weights (Hu et al., 2021), a list of `Adapter`s, and use them at their scales.

    Raises SettingError for one that cannot be read or does not fit the model.
    """
    for i, lora in enumerate(loras):
        name, files = f"lora_{i}", [lora.path] if lora.path.is_file() else lora.path.glob("*.safetensors")
        with _refusing("lora", lora.given):
            keys = [key for file in files for key in safe_open(file, "pt").keys()]  # noqa: SIM118
            other = next((kind for kind, mark in OTHERS.items() if any(mark in key for key in keys)), None)
            if other:
                raise SettingError("lora", lora.given, f"is {other}, which is not supported; give plain LoRA weights")
            found = pipeline.lora_state_dict(str(lora.path), use_safetensors=True)
            weights = found[0] if isinstance(found, tuple) else found  # some pipelines also return their scales
            pipeline.load_lora_weights(str(lora.path), adapter_name=name, use_safetensors=True)
        # diffusers only warns about weights for which it finds no place.
        tensors = sum("lora" in key and not key.endswith("alpha") for key in weights)
        modules = [part for part in pipeline.components.values() if hasattr(part, "named_parameters")]
        loaded = [tensor for part in modules for key, tensor in part.named_parameters() if f".{name}." in f"{key}."]
        empty = sum(tensor.is_meta for tensor in loaded)
        if empty or len(loaded) < max(tensors, 1):
            what = f"does not fit the model, which has room for {len(loaded) - empty} of its {tensors} tensors"
            raise SettingError("lora", lora.given, f"{what}; give one made for it")
    if loras:
        pipeline.set_adapters([f"lora_{i}" for i in range(len(loras))], [lora.how for lora in loras])


def load_textual_inversions(pipeline, embeddings):
    """Load textual inversion embeddings (Gal et al., 2022), a list of `Adapter`s.

    Prompts name one by the token in its file or, if it has none (several text encoders), by the file's name.
    Raises SettingError for one that cannot be read or does not fit the model.
    """
    for embedding in embeddings:
        with _refusing("textual_inversion", embedding.given):
            (weights,) = load_textual_inversion_state_dicts([str(embedding.path)], use_safetensors=True)
            token = embedding.how if weights.keys() & {*ENCODERS, "emb_params"} else None
            parts = {end: {token: weights[name]} for name, end in ENCODERS.items() if name in weights} or {"": weights}
            present = {end for end in ENCODERS.values() if getattr(pipeline, f"text_encoder{end}", None) is not None}
            if parts.keys() != present:
                raise ValueError(f"it is for {len(parts)} text encoders, but the model has {len(present)}")
            for end, part in parts.items():
                places = {name: getattr(pipeline, name + end) for name in ("text_encoder", "tokenizer")}
                pipeline.load_textual_inversion(part, token=token, **places)


@contextlib.contextmanager
def _refusing(setting, value):
    """Turn the libraries' errors about a file into a SettingError."""
    try:
        yield
    except Exception as error:  # errors of torch, peft, diffusers and the libraries that read files
        if isinstance(error, SettingError) or out_of_memory(error):
            raise
        why = f"cannot be read, or does not fit the model ({in_one_line(error)})"
        raise SettingError(setting, value, f"{why}; give a .safetensors file, a folder or a hub id") from error
