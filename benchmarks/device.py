"""What a device gives: Stable Diffusion 2's network (its architecture, random weights), sequential against SRDS.

    python benchmarks/device.py                   # cuda: writes benchmarks/results/device-NAME.{csv,png}
    python benchmarks/device.py --device cpu      # a small network, to see that the script runs; prints only

First c(b), the seconds of a network call of b samples, eager and compiled. Then, for each N, in turn: the pipeline's
own call, a sequential run, and runs of SRDS bounded to k = 1, 2, 3 refinements. Speedups are the sequential run's
seconds over those of the others, beside those that c(b) predicts, N c(2) / (sum over ticks of c(2 lanes)), for this
device and, without communication, for 4 with a tick's lanes split among them. "engine" is what a run takes with a
network that returns its input at once. B is the power of two nearest to sqrt(N), so that few batch sizes are
compiled. Guidance makes two samples of each lane; nothing is decoded. Runs of more than 500 steps are made once.
"""

import argparse
from functools import partial
from unittest import mock

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from matplotlib.figure import Figure

import common
import diffusion
from models.loading import compile_network
from sampler import Sampler
from settings import Settings

SD2 = {
    "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "block_out_channels": (320, 640, 1280, 1280), "use_linear_projection": True,
}  # fmt: skip
SMALL = {
    "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "block_out_channels": (32, 64),
    "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
REFINEMENTS = (1, 2, 3)


def build(device, compiled):
    """A pipeline of the network and an autoencoder that is never called."""
    config, dtype = (SD2, torch.float16) if device == "cuda" else (SMALL, torch.float32)
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    ends = {"steps_offset": 1, "clip_sample": False}
    parts = {
        "unet": UNet2DConditionModel(**config).to(device, dtype, memory_format=torch.channels_last).eval(),
        "vae": AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, **kinds).to(device, dtype),
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **ends),
    }  # fmt: skip
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipeline = StableDiffusionPipeline(**parts, **dict.fromkeys(names), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        compile_network(pipeline.unet)
    return pipeline


class Bench:
    """A pipeline, a prompt's embeddings, and the seconds of calls and runs."""

    def __init__(self, device, compiled):
        self.pipeline, self.device = build(device, compiled), device
        shape, how = (1, 77, self.pipeline.unet.config.cross_attention_dim), {"dtype": self.pipeline.unet.dtype}
        names = ("prompt_embeds", "negative_prompt_embeds")
        self.embeddings = {name: torch.randn(shape).to(device, **how) for name in names}

    def sampler(self, N, k):
        """A sampler of N steps to refinement k, ready to be timed, and its prompt."""
        B = 2 ** round(np.log2(N) / 2)
        settings = Settings(fine_steps=N, coarse_steps=B, max_iterations=k)
        sampler = Sampler(self.pipeline, settings, {"guidance_scale": 7.5})
        return sampler, sampler.encode(None, **self.embeddings)

    def seconds(self, call):
        return common.clock(call, self.device)

    def calls(self, most):
        """c(b) for b = 2, 4, 8, ... up to `most`: the median of five."""
        found = {}
        for lanes in reversed([2**i for i in range(12) if 2 ** (i + 1) <= most]):
            sampler, prompt = self.sampler(min(max(100, lanes**2), 961), 1)
            loop = sampler.loop(prompt)
            x, n = loop.x.expand(lanes, -1, -1, -1), torch.zeros(lanes, dtype=int)
            for _ in range(3):  # a CUDA graph is recorded at the second call
                loop.denoise(x, n)
            found[2 * lanes] = float(np.median([self.seconds(lambda: loop.denoise(x, n)) for _ in range(5)]))  # noqa: B023
            loop.close()
        return dict(sorted(found.items()))

    def compare(self, N, calls, repeats):
        """A row for each refinement against the sequential run, and one for the pipeline's own call."""
        made = {k: self.sampler(N, k) for k in REFINEMENTS}
        loops = {k: sampler.loop(prompt) for k, (sampler, prompt) in made.items()}
        B, one = made[1][0].settings.coarse_steps, loops[1]

        def run(k):
            for _ in made[k][0].iterates(made[k][1]):
                pass
            loops[k].close()

        def sequential():
            diffusion.sequential(one.x, one.denoise, made[1][0].solver.step, range(N + 1))
            one.close()

        def own():
            self.pipeline(**self.embeddings, num_inference_steps=N, guidance_scale=7.5, output_type="latent")

        run(1)  # before anything is timed
        self.pipeline(**self.embeddings, num_inference_steps=3)
        rounds = []
        for _ in range(repeats if N <= 500 else 1):
            rounds.append([self.seconds(call) for call in (own, sequential, *(partial(run, k) for k in REFINEMENTS))])
        rounds = np.array(rounds)

        def cost(widths):
            return np.interp(np.multiply(widths, 2), list(calls), list(calls.values())).sum()

        ratios = rounds[:, 1:2] / rounds
        rows = [{"N": N, "run": "the pipeline's own call", "ticks": N}]
        rows += [{"N": N, "run": "sequential", "ticks": N}]
        for k in REFINEMENTS:
            widths = common.tick_widths(N, B, "pipelined", k, bound=k)
            rows.append({
                "N": N, "run": "SRDS", "B": B, "k": k, "ticks": len(widths), "predicted": N * calls[2] / cost(widths),
                "predicted on 4": N * calls[2] / cost([-(-width // 4) for width in widths]),
            })  # fmt: skip
        for i, row in enumerate(rows):
            row |= {"seconds": np.median(rounds[:, i]), "speedup": np.median(ratios[:, i])}
            row |= {"least": ratios[:, i].min(), "most": ratios[:, i].max()}
            if row["run"] == "SRDS":
                engine, _ = self.engine(*made[row["k"]])
                row["engine, %"] = 100 * engine / row["seconds"]
        return rows

    def collocated(self, N, nodes):
        """A row of the engine's milliseconds a tick, for collocation's first solution and refinement."""
        settings = Settings(method="collocation", fine_steps=N, nodes=nodes, max_iterations=1)
        sampler = Sampler(self.pipeline, settings)
        seconds, ticks = self.engine(sampler, sampler.encode(None, **self.embeddings))
        run = f"collocation, {nodes} nodes"
        return {"N": N, "run": run, "ticks": ticks, "engine, ms a tick": 1000 * seconds / ticks}

    def engine(self, sampler, prompt):
        """Seconds of a run with a network that returns its input at once, the median of three, and its ticks."""
        unet, found, ticks = self.pipeline.unet, [], []
        at_once = {"forward": lambda x, *_, **__: (x,), "_compiled_call_impl": None}
        with mock.patch.multiple(unet, **at_once):
            for _ in range(4):
                found.append(self.seconds(lambda: ticks.append([*sampler.iterates(prompt)][-1].ticks)))
                sampler.loop(prompt).close()
        return float(np.median(found[1:])), ticks[-1]


def plot(table, path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (k, mode), line in table[table.run == "SRDS"].groupby(["k", "mode"]):
        k = int(k)
        style, color = ("-" if mode == "eager" else "--"), f"C{k}"
        axes.plot(line.N, line.speedup, style, marker="o", color=color, label=f"k = {k}, {mode}")
        axes.plot(line.N, line.predicted, ":", color=color)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="N",
        ylabel="sequential seconds / SRDS seconds",
        title="SRDS on Stable Diffusion 2's network; dotted: predicted from c(b)",
    )
    axes.set_xticks(sorted(table.N.dropna().unique()), [f"{N:g}" for N in sorted(table.N.dropna().unique())])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, nargs="*", default=[25, 100, 196, 961])
    parser.add_argument("--repeats", type=int, default=3, help="of each comparison (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    rows = []
    for mode in ("eager",) if args.eager else ("eager", "compiled"):
        bench = Bench(args.device, mode == "compiled")
        calls = bench.calls(2 * 2 ** round(np.log2(max(args.steps)) / 2))
        print(f"{name}, {mode}: ms of c(b):", *(f"{b}: {1000 * c:.1f}" for b, c in calls.items()), flush=True)
        rows += [{"device": name, "mode": mode, "run": f"c({b})", "seconds": c} for b, c in calls.items()]
        for N in args.steps:
            found = bench.compare(N, calls, args.repeats) + [bench.collocated(N, nodes) for nodes in (13, 100)]
            rows += [{"device": name, "mode": mode, **row} for row in found]
            table = pd.DataFrame(rows)
            if args.device == "cuda":  # after each N, as a machine may be lent for minutes
                slug = f"device-{name.lower().replace(' ', '-')}"
                common.save(table, slug)
                plot(table, common.RESULTS / f"{slug}.png")
    if args.device == "cpu":
        print(table[table.N.notna()].round(3).to_string(index=False))
