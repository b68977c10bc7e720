"""Whether refinements ever make the image worse: the paper's correction against the damped one.

    python benchmarks/stability.py          # about 25 minutes; writes benchmarks/results/stability.{csv,png}

Difference to the sequential image, in grey levels, over model, guidance, N and B: after each refinement the worst
prompt and the mean. "excess" is by how much a refinement's image is worse than the initialisation's, at worst. "ticks"
are the mean serial evaluations until the image stays within 1 grey level, and "never" counts the prompts that the
refinements that were run do not bring there (then there is no mean).
"""

import argparse
import itertools

import numpy as np
import pandas as pd
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

import common

GUIDANCE = {"demo": (1.0, 3.0, 5.0, 7.5, 12.0), "fashion": (None,)}
LIMIT = 1  # grey levels
GRID = ((25, 5), (25, 8), (25, 10), (50, 7), (50, 10), (50, 14), (100, 10), (100, 14), (100, 20))


def measure(model, count, most):
    """A row for each guidance, N, B and correction."""
    varied = itertools.product(GUIDANCE[model], GRID, ("paper", "damped"))
    names = "guidance_scale", "fine_steps", "coarse_steps", "correction"
    settings = [dict(zip(names, (guidance, *grid, correction))) for guidance, grid, correction in varied]
    sampler = common.load(model, tolerance=0, max_iterations=most)
    rows = common.refinements(sampler, settings, common.pairs(count)).fillna({"guidance_scale": 0.0})
    return pd.DataFrame([summary(model, key, part) for key, part in rows.groupby([*names], sort=False)])


def summary(model, key, part):
    """One setting's row, of its samples' refinements."""
    error, ticks = (part.pivot(index="seed", columns="k", values=name) for name in ("difference", "serial_evaluations"))
    outside = (error > LIMIT).iloc[:, ::-1].cummax(axis=1).iloc[:, ::-1]
    within = ticks.mask(outside).min(axis=1)  # nan where the refinements that were run do not come there
    row = dict(zip(("model", "guidance", "N", "B", "correction"), (model, *key)))
    row |= {"excess": error.drop(columns=0).sub(error[0], axis=0).max(axis=None), "ticks": within.mean(skipna=False)}
    row["never"] = within.isna().sum()
    for name, values in (("worst", error.max()), ("mean", error.mean())):
        row |= {f"{name} k={k}": value for k, value in values.items()}
    return row


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
    label = "largest difference of a refinement\nabove that of the initialisation, grey levels"
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
