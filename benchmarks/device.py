"""What a device gives: correctness, seconds of network calls, and what follows for the time of each method.

    python benchmarks/device.py                   # on a GPU, 8 minutes: writes results/device-NAME-{calls,images}.csv
    python benchmarks/device.py --device cpu      # small networks and few steps, to see that it runs; prints only
    python benchmarks/device.py --table           # on any machine, from those files: writes results/device.csv

Measured, on the device. "images": the demo and Fashion-MNIST models by both methods, in each dtype, against their own
sequential samples, and the sequential samples in float32 against those of the CPU; grey levels. "calls": seconds of a
network call by the number of samples in it, for the architectures of Stable Diffusion 2, Stable Diffusion XL and FLUX
with random weights; eager, and with the repeated blocks compiled (`compile_repeated_blocks`). "runs": Stable Diffusion
2's network, eager, in the pipeline's own call, sequentially and by SRDS, to see how much the engine adds.

Computed, by --table: the time of a method over that of sequential sampling, as the sum over its ticks of c(samples in
the tick), with the ticks counted on the demo; guidance makes two samples of a state, except for FLUX's own.
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FluxTransformer2DModel, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet

import common
import diffusion
from refinement import difference
from sampler import Sampler
from settings import Settings

XL_BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SMALL = {"block_out_channels": (32, 64), "cross_attention_dim": 32, "attention_head_dim": 2, "layers_per_block": 1,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "sample_size": 8,
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
# The class, its config, that of a small one, the samples in a state's call, and those of the calls that are measured.
NETWORKS = {
    "Stable Diffusion 2, 512": (UNet, {
        "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "block_out_channels": (320, 640, 1280, 1280), "use_linear_projection": True}, SMALL, 2, (1, 2, 4, 8, 16, 32)),
    "Stable Diffusion XL, 1024": (UNet, XL | XL_BLOCKS | {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True}, SMALL | XL, 2, (1, 2, 4, 8, 16)),
    "FLUX, 1024": (FluxTransformer2DModel, {"guidance_embeds": True}, {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8), "in_channels": 16,
        "guidance_embeds": True}, 1, (1, 2, 4, 8)),
}  # fmt: skip
STEPS = (28, 50, 100)
METHODS = {
    "SRDS, k = 1": {"max_iterations": 1}, "SRDS, k = 2": {"max_iterations": 2}, "SRDS, default": {},
    "collocation, window 1, 20 nodes": {"method": "collocation", "window": 1, "nodes": 20, "max_iterations": 0},
    "collocation, default": {"method": "collocation"},
    "collocation, 100 nodes, window 32": {"method": "collocation", "nodes": 100, "window": 32},
}  # fmt: skip


# Measured


def clock(call, device, *inputs):
    """The seconds of a call until the device has finished."""
    wait = torch.accelerator.synchronize if torch.device(device).type != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    call(*inputs)
    wait()
    return time.perf_counter() - started


def images(device, dtypes, N=50, pairs=4):
    """Rows of differences, mean and worst over samples, by model, dtype and method."""
    rows, settings = [], Settings(fine_steps=N, coarse_steps=round(N**0.5))
    for model in ("demo", "fashion"):
        sampler = Sampler.from_pretrained(model, settings, device="cpu")
        exact = [sampler.sequential(text, seed).image for text, seed in common.pairs(pairs)]
        for dtype in [dtype for dtype in dtypes if (model, dtype) != ("fashion", "bfloat16")]:  # DDPMPipeline has none
            sampler = Sampler.from_pretrained(model, settings, device=device, dtype=dtype)
            found = {"sequential, to the CPU's float32": []} | {method: [] for method in ("srds", "collocation")}
            for (text, seed), image in zip(common.pairs(pairs), exact):
                truth = sampler.sequential(text, seed).image
                found["sequential, to the CPU's float32"].append(difference(image, truth))
                for method in ("srds", "collocation"):
                    found[method].append(difference(sampler.vary(method=method)(text, seed).image, truth))
            rows += [{"model": model, "dtype": dtype, "N": N, "what": what, "difference": np.mean(some),
                      "worst": max(some)} for what, some in found.items()]  # fmt: skip
    return rows


def build(name, device):
    """A network with random weights, on the device, and its arguments for one sample, by name."""
    kind, config, small, _, _ = NETWORKS[name]
    usual = torch.get_default_dtype()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16 if kind is FluxTransformer2DModel else torch.float16
    torch.set_default_dtype(dtype)
    with torch.device(device):
        network = kind(**(small if device == "cpu" else config)).eval().requires_grad_(False)
    torch.set_default_dtype(usual)
    network.to(device, dtype)
    config, numbers = network.config, lambda *shape: torch.randn(1, *shape, device=device, dtype=dtype)
    if kind is FluxTransformer2DModel:
        tokens = (16 if device == "cpu" else 4096, 512)
        ids = {"img_ids": numbers(tokens[0], 3)[0], "txt_ids": numbers(tokens[1], 3)[0]}
        texts = {"encoder_hidden_states": numbers(tokens[1], config.joint_attention_dim),
                 "pooled_projections": numbers(config.pooled_projection_dim)}  # fmt: skip
        return network, {"hidden_states": numbers(tokens[0], config.in_channels), "timestep": numbers().abs(),
                         "guidance": numbers().abs(), **texts, **ids}  # fmt: skip
    network.to(memory_format=torch.channels_last)
    inputs = {"sample": numbers(4, config.sample_size, config.sample_size), "timestep": numbers().abs(),
            "encoder_hidden_states": numbers(77, config.cross_attention_dim)}  # fmt: skip
    if config.addition_embed_type:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": numbers(width), "time_ids": numbers(6)}
    return network, inputs


def calls(device, compiled, most):
    """Yield a row of seconds for each network and number of samples in a call: the median of seven, least and most."""
    for name, (*_, batches) in NETWORKS.items():
        network, inputs = build(name, device)
        if compiled:
            network.compile_repeated_blocks(dynamic=False)
        for b in [b for b in batches if b <= most]:

            def copies(value, b=b):
                if isinstance(value, dict):
                    return {key: copies(each) for key, each in value.items()}
                return value.repeat(b, *[1] * (value.ndim - 1))

            several = {key: value if key.endswith("_ids") else copies(value) for key, value in inputs.items()}
            with torch.no_grad():
                call = lambda several=several, network=network: network(**several, return_dict=False)
                seconds = [clock(call, device) for _ in range(10)][3:]
            yield {"network": name, "mode": "compiled" if compiled else "eager", "samples": b,
                   "seconds": np.median(seconds), "least": min(seconds), "most": max(seconds)}  # fmt: skip
        del network, inputs, several
        torch.cuda.empty_cache()


def runs(device, N, repeats=3):
    """Rows of seconds of whole runs with Stable Diffusion 2's network, in turn; nothing is decoded."""
    network, _ = build("Stable Diffusion 2, 512", device)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, **kinds).to(device, network.dtype)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    missing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=network, scheduler=scheduler, **missing, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    numbers = lambda: torch.randn(1, 77, network.config.cross_attention_dim, device=device, dtype=network.dtype)
    texts = {"prompt_embeds": numbers(), "negative_prompt_embeds": numbers()}
    sampler = Sampler(pipeline, Settings(fine_steps=N, coarse_steps=round(N**0.5)), {"guidance_scale": 7.5})
    prompt = sampler.encode(None, **texts)
    loop = sampler.loop(prompt)
    own = lambda: pipeline(**texts, num_inference_steps=N, guidance_scale=7.5, output_type="latent")
    ways = {
        "the pipeline's own call": own,
        "sequential": lambda: diffusion.sequential(loop.x, loop.denoise, sampler.solver.step, range(N + 1)),
    }
    for k in (1, 2):
        ways[f"SRDS, k = {k}"] = lambda k=k: [*sampler.vary(max_iterations=k).iterates(prompt)]
    for call in ways.values():  # before anything is timed
        call()
    found = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            found[way].append(clock(call, device))
            loop.close()
    return [{"network": "Stable Diffusion 2, 512", "mode": "a run", "run": way, "N": N, "seconds": np.median(some),
             "least": min(some), "most": max(some)} for way, some in found.items()]  # fmt: skip


# Computed


def widths(model, N, how, guidance, pairs=4):
    """For each of a few samples, the states in each of its ticks."""
    sampler, found = common.load(model, fine_steps=N, guidance_scale=guidance, coarse_steps=round(N**0.5), **how), []
    for text, seed in common.pairs(pairs):
        found.append([])
        for _ in sampler.refine(text, seed, on_tick=found[-1].append):
            pass
    return found


def table(files):
    """Rows of the time of each method over sequential sampling's, by device, network, mode and N: computed."""
    rows = []
    counted = {(N, method): widths("demo", N, how, 2.0) for N in STEPS for method, how in METHODS.items()}
    for file in files:
        seconds = pd.read_csv(file).query("mode != 'a run'")
        device = file.stem.removeprefix("device-").removesuffix("-calls")
        for (network, mode), part in seconds.groupby(["network", "mode"], sort=False):
            each = NETWORKS[network][3]
            cost = lambda lanes: np.interp(np.multiply(lanes, each), part.samples, part.seconds)  # noqa: B023
            # Beyond the largest call that was measured, several such calls.
            most = part.samples.max() // each
            tick = lambda lanes: (lanes // most) * cost(most) + (cost(lanes % most) if lanes % most else 0)  # noqa: B023
            for (N, method), samples in counted.items():
                ratios = [sum(map(tick, lanes)) / (N * tick(1)) for lanes in samples]
                rows.append({"device": device, "network": network, "mode": mode, "N": N, "method": method,
                             "serial": np.mean([*map(len, samples)]), "total": np.mean([*map(sum, samples)]),
                             "time over sequential": np.mean(ratios)})  # fmt: skip
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--table", action="store_true", help="compute the times of methods from what was measured")
    args = parser.parse_args()
    if args.table:
        common.save(table(sorted(common.RESULTS.glob("device-*-calls.csv"))), "device")
        raise SystemExit
    on_cpu, rows = args.device == "cpu", []
    name = "device-" + ("cpu" if on_cpu else torch.cuda.get_device_name().lower().replace(" ", "-"))
    keep = (lambda rows, name: print(pd.DataFrame(rows).to_string())) if on_cpu else (
        lambda rows, name: common.save(pd.DataFrame(rows), name))  # fmt: skip
    dtypes, N, pairs = (("bfloat16",), 8, 1) if on_cpu else (("float32", "float16", "bfloat16"), 50, 4)
    keep(images(args.device, dtypes, N, pairs), f"{name}-images")
    for compiled in (False, True):
        for row in calls(args.device, compiled, 2 if on_cpu else 32):
            rows.append(row)
            keep(rows, f"{name}-calls")  # after each, as a machine may be lent for minutes
        if not compiled:
            rows += runs(args.device, N)
            keep(rows, f"{name}-calls")
