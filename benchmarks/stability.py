"""Whether refinements ever make the image worse: the paper's correction against the damped one.

    python benchmarks/stability.py          # about 25 minutes; writes benchmarks/results/stability.{csv,png}

Image error to the sequential sample, in grey levels, over model, guidance, N and B: after each refinement the worst
prompt and the mean. "excess" is by how much a refinement's image is worse than the initialisation's, at worst. "ticks"
are the mean serial evaluations until the image stays within 1 grey level, and "never" counts the prompts that the
refinements that were run do not bring there (then there is no mean).
"""

import argparse

import numpy as np
import pandas as pd
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

import common

GUIDANCE = {"demo": (1.0, 3.0, 5.0, 7.5, 12.0), "fashion": (None,)}
GRID = ((25, 5), (25, 8), (25, 10), (50, 7), (50, 10), (50, 14), (100, 10), (100, 14), (100, 20))


def ticks_within(error, ticks, limit=1):
    """Ticks of the first refinement from which on the error stays within the limit; nan where the run is too short."""
    outside = np.flatnonzero(error > limit)
    first = outside[-1] + 1 if len(outside) else 0
    return ticks[first] if first < len(ticks) else np.nan


def measure(model, count, most):
    sampler, rows = common.load(model), []
    for guidance in GUIDANCE[model]:
        for N in sorted({N for N, _ in GRID}):
            varied = sampler.vary(guidance_scale=guidance, fine_steps=N)
            pairs = [(varied.encode(text), seed) for text, seed in common.pairs(count)]
            truths = [(*pair, varied.sequential(*pair).image) for pair in pairs]
            for B in (B for n, B in GRID if n == N):
                for correction in ("paper", "damped"):
                    blocks = varied.vary(coarse_steps=B, correction=correction, max_iterations=most)
                    runs = [common.errors(blocks, *truth) for truth in truths]
                    error = np.array([run[0] for run in runs])
                    within = [ticks_within(*run) for run in runs]
                    rows.append({"model": model, "guidance": guidance or 0.0, "N": N, "B": B, "correction": correction})
                    rows[-1] |= {"excess": (error[:, 1:] - error[:, :1]).max(), "ticks": np.mean(within)}
                    rows[-1]["never"] = np.isnan(within).sum()
                    for name, values in (("worst", error.max(0)), ("mean", error.mean(0))):
                        rows[-1] |= {f"{name} k={k}": value for k, value in enumerate(values)}
                    print(*rows[-1].values(), flush=True)
    return pd.DataFrame(rows)


def plot(table, path):
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    shown = None
    for axes, correction, title in zip(
        figure.subplots(1, 2), ("paper", "damped"), ("the paper's correction", "damped correction (default)")
    ):
        part = table[table.correction == correction]
        values = part.pivot_table(index=["model", "guidance"], columns=["N", "B"], values="excess")
        shown = axes.imshow(values, cmap="RdBu_r", norm=SymLogNorm(0.5, vmin=-100, vmax=100), aspect="auto")
        for (row, column), value in np.ndenumerate(values.to_numpy()):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if value > 10 else "black")
        axes.set_xticks(range(len(values.columns)), [f"{N}, {B}" for N, B in values.columns], rotation=45)
        names = [f"{model}, {guidance:g}" if guidance else model for model, guidance in values.index]
        axes.set_yticks(range(len(values)), names)
        axes.set(xlabel="N, B", ylabel="model, guidance", title=title)
    label = "largest image error of a refinement\nabove that of the initialisation, grey levels"
    figure.colorbar(shown, label=label, ticks=(-10, -1, 0, 1, 10, 100), format="%g")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(GUIDANCE), default=list(GUIDANCE),
                        help="only these; the results of the others stay")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--refinements", type=int, default=8, help="at most, of each run (%(default)s)")
    args = parser.parse_args()
    path = common.RESULTS / "stability.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame({"model": []})
    for model in args.models:
        table = pd.concat([table[table.model != model], measure(model, args.prompts, args.refinements)])
        common.save(table, "stability")
    plot(table, common.RESULTS / "stability.png")
