"""What a device gives: Stable Diffusion 2's network (its architecture, random weights), sequential against SRDS.

    python benchmarks/device.py                   # cuda: writes benchmarks/results/device-NAME.{csv,png}
    python benchmarks/device.py --device cpu      # a small network, to see that the script runs; prints only

First c(b), the seconds of a network call of b samples, eager and compiled. Then, for each N, a sequential run and one
of SRDS up to refinement k = 1, 2, 3 in turn, with the median and the spread of the ratios of their seconds, beside the
bound N c(2) / (sum over ticks of c(2 lanes)), for this device and, as a prediction without communication, for 4 with a
tick's lanes split among them. "engine, %" is the same run without a network, against it. "memory, latents" is what a
run holds beyond its widest network call, in latents. Guidance makes two samples of each lane; nothing is decoded.
"""

import argparse

import numpy as np
import pandas as pd
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from matplotlib.figure import Figure

import common
import diffusion
from models.loading import compile_network
from srds import srds
from study.planning import clock, tick_widths

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


class Bench:
    """A network, and the seconds of calls and runs on it."""

    def __init__(self, device, compiled):
        self.cuda = device == "cuda"
        config = SD2 if self.cuda else SMALL
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config).to(device, torch.float16 if self.cuda else torch.float32)
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        if compiled:
            compile_network(self.unet)
        self.compiled = compiled
        self.embeddings = torch.randn(2, 77, config["cross_attention_dim"], device=device, dtype=unet.dtype)
        self.x = torch.randn(1, 4, config["sample_size"], config["sample_size"]).to(device)
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.scheduler = DDIMScheduler(**schedule, clip_sample=False)

    def seconds(self, call):
        return clock(call, self.x.device)

    def denoiser(self, times, lanes):
        """Guided outputs of up to so many lanes; compiled, a call is filled up to one of a few sizes."""
        sizes = diffusion.compiled_batches(1, lanes) if self.compiled else range(1, lanes + 1)

        @torch.no_grad()
        def denoise(x, n):
            size = next(size for size in sizes if size >= len(x))
            x, n, count = torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]), n.tolist(), len(x)
            t = times[n + n[-1:] * (size - count)].repeat(2).to(x.device, non_blocking=True)
            inputs = x.repeat(2, 1, 1, 1).to(self.unet.dtype), t, self.embeddings.repeat_interleave(size, 0)
            away, towards = self.unet(*inputs, return_dict=False)[0].float().chunk(2)
            return (away + 7.5 * (towards - away))[:count]

        return denoise

    def calls(self, most):
        """c(b) for b = 2, 4, 8, ... up to `most`: the median of five."""
        found, times = {}, diffusion.timesteps(100, 1000)
        for lanes in (2**i for i in range(12) if 2 ** (i + 1) <= most):
            denoise = self.denoiser(times, lanes)
            x, n = self.x.expand(lanes, -1, -1, -1), torch.full((lanes,), 50)
            for _ in range(3):
                denoise(x, n)
            found[2 * lanes] = float(np.median([self.seconds(lambda: denoise(x, n)) for _ in range(5)]))  # noqa: B023
        return found

    def compare(self, N, calls, repeats):
        """A row for each refinement: SRDS, with B near sqrt(N), against the sequential run."""
        B, grid, pipelined = round(N**0.5), diffusion.diffusion_grid(self.scheduler, N), "pipelined"
        solver, bounds = diffusion.Solver(grid), diffusion.boundaries(N, B)
        denoise, one = self.denoiser(grid.times, B), self.denoiser(grid.times, 1)
        for lanes in [*range(1, B + 1)] * 3:  # a CUDA graph is recorded at the second call
            denoise(self.x.expand(lanes, -1, -1, -1), torch.zeros(lanes, dtype=int))

        def run(k, denoise=denoise):
            for _ in srds(self.x, denoise, solver.step, bounds, pipelined, k, solver.damped):
                pass

        def sequential():
            diffusion.sequential(self.x, one, solver.step, range(N + 1))

        def cost(widths):
            return np.interp(np.multiply(widths, 2), list(calls), list(calls.values())).sum()

        rows = []
        for k in REFINEMENTS:
            if k > B:
                continue
            pairs = [(self.seconds(sequential), self.seconds(lambda: run(k))) for _ in range(repeats)]  # noqa: B023
            ratios, seconds = [a / b for a, b in pairs], float(np.median([b for _, b in pairs]))
            widths = tick_widths(N, B, pipelined, k, bound=k)
            bound = N * calls[2] / cost(widths)
            engine = np.median([self.seconds(lambda: run(k, lambda x, n: x)) for _ in range(5)]) / seconds  # noqa: B023
            rows.append({
                "N": N, "B": B, "k": k, "ticks": len(widths), "seconds": seconds, "speedup": np.median(ratios),
                "min": min(ratios), "max": max(ratios), "bound": bound, "of bound": np.median(ratios) / bound,
                "bound on 4, predicted": N * calls[2] / cost([-(-width // 4) for width in widths]),
                "engine, %": 100 * engine, "memory, latents": self.memory(lambda: run(k), denoise, B),  # noqa: B023
            })  # fmt: skip
        return rows

    def memory(self, run, denoise, B):
        if not self.cuda:
            return np.nan
        peaks, widest = [], (self.x.expand(B, -1, -1, -1), torch.zeros(B, dtype=int))
        for call in (lambda: denoise(*widest), run):
            torch.cuda.reset_peak_memory_stats()
            call()
            peaks.append(torch.cuda.max_memory_allocated())
        return (peaks[1] - peaks[0]) / self.x.nbytes


def plot(table, path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (k, mode), line in table.groupby(["k", "mode"]):
        k = int(k)
        style, color = ("-" if mode == "eager" else "--"), f"C{k}"
        axes.plot(line.N, line.speedup, style, marker="o", color=color, label=f"k = {k}, {mode}")
        axes.plot(line.N, line.bound, ":", color=color)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(xscale="log", xlabel="N", ylabel="sequential seconds / SRDS seconds", title="dotted: the bound")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, nargs="*", default=[25, 100, 196, 961])
    parser.add_argument("--most", type=int, default=64, help="network samples in the widest call (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each comparison (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    if args.most < 2 * round(max(args.steps) ** 0.5):
        parser.error(f"argument --most: {args.most} is less than a tick of {max(args.steps)} steps has")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    rows = []
    for mode in ("eager",) if args.eager else ("eager", "compiled"):
        bench = Bench(args.device, mode == "compiled")
        calls = bench.calls(args.most)
        shown = ", ".join(f"{b}: {1000 * c:.1f}" for b, c in calls.items())
        print(f"{name}, {mode}: milliseconds of c(b): {shown}", flush=True)
        for N in args.steps:
            rows += [{"device": name, "mode": mode, **row} for row in bench.compare(N, calls, args.repeats)]
        rows += [{"device": name, "mode": mode, "calls of": b, "seconds": c} for b, c in calls.items()]
    table = pd.DataFrame(rows)
    if args.device == "cuda":
        slug = f"device-{name.lower().replace(' ', '-')}"
        common.save(table, slug)
        plot(table.dropna(subset="k"), common.RESULTS / f"{slug}.png")
    else:
        print(table.dropna(subset="k").drop(columns="calls of").round(3).to_string(index=False))
