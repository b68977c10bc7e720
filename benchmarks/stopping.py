"""How often a stop rule lies: where each would have stopped, and how far that is from the sequential sample.

    python benchmarks/stopping.py          # about 30 minutes; writes benchmarks/results/stopping.{csv,png}

Rules, each with the tolerance T in grey levels:
final       the image changed by less than T
trajectory  the image and every boundary's state changed by less than T
predicted   the image's change times its ratio to the one before, which foretells the next change, is less than T

Runs end after six refinements; a rule that has not stopped one by then does so there. A stop is wrong where
the image is more than one grey level off the sequential sample.
"""

import argparse

import common
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import main

SETTINGS = {  # N, B, guidance, correction
    "demo default": (100, 10, 2.0, "damped"),
    "few steps": (25, 5, 2.0, "damped"),
    "strong guidance": (50, 10, 7.5, "damped"),
    "few steps, paper's correction": (25, 5, 3.0, "paper"),
}
TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def trace(problem, text):
    """What the stop rules watch, with the image error and the ticks, after each refinement."""
    denoise = problem.denoiser(text)
    truth = problem.image(common.sequential(problem, denoise))
    for iterate, image, history in main.watched(problem, problem.iterates(denoise)):
        history[-1] |= {"k": iterate.k, "ticks": iterate.ticks, "error": main.difference(image, truth)}
    return history


def stop(history, rule, tolerance):
    """The refinement at which a rule ends a run; the last where it does not."""
    stops = (k for k in range(len(history)) if main.judge(history[: k + 1], rule, tolerance) == "converged")
    return history[next(stops, -1)]


def evaluate(runs, name):
    rows = []
    for rule in main.STOP_RULES:
        for tolerance in TOLERANCES:
            stops = [stop(run, rule, tolerance) for run in runs]
            error = np.array([at["error"] for at in stops])
            rows.append({
                "setting": name,
                "pairs": len(runs),
                "rule": rule,
                "tolerance": tolerance,
                "refinements": np.mean([at["k"] for at in stops]),
                "serial evaluations": np.mean([at["ticks"] for at in stops]),
                "wrong, %": 100 * (error > 1).mean(),
                "above tolerance, %": 100 * (error > tolerance).mean(),
                "worst": error.max(),
            })  # fmt: skip
    return rows


def plot(table, path):
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, part) in zip(figure.subplots(2, 2).flat, table.groupby("setting", sort=False)):
        for rule, marker in zip(main.STOP_RULES, "osD"):
            line = part[part.rule == rule]
            axes.plot(line.refinements, line.worst.clip(lower=1e-3), marker=marker, label=rule)
        axes.axhline(1, color="0.4", linestyle="--")
        N, B, guidance, correction = SETTINGS[name]
        axes.set(yscale="log", xlabel="mean refinements used", ylabel="worst error at the stop, grey levels")
        axes.set_title(f"{name}: N = {N}, B = {B}, guidance {guidance:g}, {correction}", fontsize=10)
        axes.grid(color="0.9")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="of prompt and seed (%(default)s)")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS),
                        help="only these; the results of the others stay")  # fmt: skip
    args = parser.parse_args()
    problem, path = common.load(), common.RESULTS / "stopping.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame({"setting": []})
    for name in args.settings:
        N, B, guidance, correction = SETTINGS[name]
        runs = []
        for text, seed in common.pairs(problem, args.pairs):
            settings = {"fine_steps": N, "coarse_steps": B, "guidance_scale": guidance, "correction": correction}
            runs.append(trace(problem.vary(seed=seed, max_iterations=6, **settings), text))
        table = pd.concat([table[table.setting != name], pd.DataFrame(evaluate(runs, name))])
        common.save(table, "stopping")
    plot(table, common.RESULTS / "stopping.png")
