"""How good the demo model is, and how SRDS behaves on it.

    python benchmarks/demo_model.py          # writes models/samples.png and benchmarks/results/demo_model.{csv,png}

Prompt adherence: 100-step DDIM at the demo's default guidance on 400 prompts, read back by `models/scenes.py`.
SRDS: the command's defaults on `prompts.txt` and on 100 other prompts, each with a seed of its own. A prompt
counts as good if no refinement's difference exceeds the initialisation's by more than 0.5 grey level and
the third refinement's is at most 1.
"""

import argparse

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

import common
import diffusion
from models import scenes, train
from settings import SEED


def sample(sampler, texts, x):
    """Sequential images of a batch of prompts from noise x, (L, C, H, W)."""
    pipeline, scale = sampler.pipeline, sampler.arguments["guidance_scale"]
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(texts, "cpu", 1, True, [""] * len(texts))
    embeddings = torch.cat([negative, positive])

    def denoise(x, n):
        pair = pipeline.unet(
            x.repeat(2, 1, 1, 1), sampler.solver.grid.times[n], encoder_hidden_states=embeddings
        ).sample
        away, towards = pair.chunk(2)
        return away + scale * (towards - away)

    states = diffusion.sequential(x, denoise, sampler.solver.step, range(sampler.settings.fine_steps + 1))
    return [sampler.image(state[None]) for state in states]


def adherence(sampler, count, batch=20):
    """Share of images whose attributes are read back as asked, by attribute and for all; and the images."""
    texts, asked = common.prompts(np.random.default_rng(2026), count)
    generator, images = torch.Generator().manual_seed(0), []
    for start in range(0, count, batch):
        part = texts[start : start + batch]
        images += sample(sampler, part, torch.randn(len(part), *sampler.shape, generator=generator))
    read = [scenes.read(image) for image in images]
    right = pd.DataFrame([{name: want[name] == got[name] for name in want} for want, got in zip(asked, read)])
    return {**right.mean(), "all": right.all(axis=1).mean()}, images


def plot(table, path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    errors = table.filter(like="k=").clip(lower=1e-3)
    axes.plot(range(errors.shape[1]), errors.T, color="0.75", linewidth=0.7)
    axes.plot(range(errors.shape[1]), errors.median(), color="black", marker="o", label="median")
    axes.axhline(1, color="0.4", linestyle="--", label="1 grey level")
    axes.set(yscale="log", xlabel="refinement k", ylabel="difference, grey levels", xticks=range(errors.shape[1]))
    axes.set_title(f"{len(errors)} prompts on the demo model")
    axes.legend()
    figure.savefig(path, dpi=120)


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", type=int, default=400, help="images for prompt adherence, 0 for none (%(default)s)"
    )
    parser.add_argument("--others", type=int, default=100, help="prompts beside prompts.txt (%(default)s)")
    parser.add_argument("--refinements", type=int, default=5, help="refinements of each (%(default)s)")
    args = parser.parse_args()
    sampler = common.load(max_iterations=args.refinements)

    print(f"autoencoder error: {train.autoencoder_error(sampler.pipeline.vae):.2f} grey levels")
    if args.samples:
        shares, images = adherence(sampler, args.samples)
        print(f"adherence over {args.samples} prompts:", ", ".join(f"{k} {100 * v:.1f} %" for k, v in shares.items()))
        rows = [np.hstack(images[start : start + 8]) for start in range(0, min(64, args.samples) // 8 * 8, 8)]
        picture = Image.fromarray(np.vstack(rows))
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC).save(
            common.ROOT / "models/samples.png"
        )

    named = len(common.TEXTS)
    texts = common.TEXTS + common.prompts(np.random.default_rng(7), args.others)[0]
    pairs = list(zip(texts, [SEED] * named + list(range(args.others))))
    refinements = common.refinements(sampler, [{"tolerance": 0}], pairs)
    errors = refinements.pivot(index=["prompt", "seed"], columns="k", values="difference")
    errors = errors.loc[pairs].to_numpy()
    table = pd.DataFrame(errors, columns=[f"k={k}" for k in range(errors.shape[1])])
    table.insert(0, "prompt", texts)
    table["good"] = (errors.max(1) <= errors[:, 0] + 0.5) & (errors[:, :4][:, -1] <= 1)
    print(table.filter(like="k=").describe(percentiles=[0.5, 0.9]).loc[["50%", "90%", "max"]].round(3).to_string())
    good = table.good
    print(f"good: {good[:named].sum()} of {named} in prompts.txt, {good[named:].sum()} of {args.others} others")
    common.RESULTS.mkdir(exist_ok=True)
    table.to_csv(common.RESULTS / "demo_model.csv", index=False, float_format="%.4f")
    plot(table, common.RESULTS / "demo_model.png")


if __name__ == "__main__":
    benchmark()
