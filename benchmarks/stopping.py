"""How often a stop rule lies: where each would have stopped, and how far that is from the sequential sample.

    python benchmarks/stopping.py          # about an hour; writes benchmarks/results/stopping.{csv,png}

Rules, each with the tolerance T in grey levels:
final       the image changed by less than T
trajectory  the image and every boundary's state changed by less than T

Runs, of 100 steps and 10 blocks if nothing else is told, end after six refinements; a rule that has not stopped one by
then does so there. A stop is wrong where the image is more than one grey level off the sequential sample.
"""

import argparse
from itertools import pairwise

import pandas as pd
from matplotlib.figure import Figure

import common
from refinement import judge
from settings import STOP_RULES

SETTINGS = {  # the model, and what of its settings is not the default
    "demo default": ("demo", {}),
    "few steps": ("demo", {"fine_steps": 25, "coarse_steps": 5}),
    "strong guidance": ("demo", {"fine_steps": 50, "guidance_scale": 7.5}),
    "few steps, paper's correction": (
        "demo", {"fine_steps": 25, "coarse_steps": 5, "guidance_scale": 3.0, "correction": "paper"}
    ),
    "collocation": ("demo", {"method": "collocation"}),
    "Fashion-MNIST": ("fashion", {}),
}  # fmt: skip
TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def stop(refinements, *rule):
    """The refinement at which a rule ends a run, a row; the last where it does not."""
    stops = (later for earlier, later in pairwise([None, *refinements]) if judge(later, earlier, *rule) == "converged")
    return next(stops, refinements[-1])


def evaluate(table, name):
    """A row for each rule and tolerance, from the refinements of a setting."""
    runs, rows = [[*part.itertuples()] for _, part in table.groupby("seed")], []
    for rule in STOP_RULES:
        for tolerance in TOLERANCES:
            stops = pd.DataFrame([stop(refinements, rule, tolerance) for refinements in runs])
            rows.append({
                "setting": name,
                "pairs": len(runs),
                "rule": rule,
                "tolerance": tolerance,
                "refinements": stops.k.mean(),
                "serial evaluations": stops.serial_evaluations.mean(),
                "wrong, %": 100 * (stops.difference > 1).mean(),
                "above tolerance, %": 100 * (stops.difference > tolerance).mean(),
                "worst": stops.difference.max(),
            })  # fmt: skip
    return rows


def plot(table, path):
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (name, part) in zip(figure.subplots(2, 3).flat, table.groupby("setting", sort=False)):
        for rule, marker in zip(STOP_RULES, "osD"):
            line = part[part.rule == rule]
            axes.plot(line.refinements, line.worst.clip(lower=1e-3), marker=marker, label=rule)
        axes.axhline(1, color="0.4", linestyle="--")
        axes.set(yscale="log", xlabel="mean refinements used", ylabel="worst difference at the stop, grey levels")
        axes.set_title(name, fontsize=10)
        axes.grid(color="0.9")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="of prompt and seed (%(default)s)")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS),
                        help="only these; the results of the others stay")  # fmt: skip
    args = parser.parse_args()
    path = common.RESULTS / "stopping.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame({"setting": []})
    for name in args.settings:
        model, settings = SETTINGS[name]
        refinements = common.refinements(
            common.load(model, tolerance=0, max_iterations=6), [settings], common.pairs(args.pairs)
        )
        table = pd.concat([table[table.setting != name], pd.DataFrame(evaluate(refinements, name))])
        common.save(table, "stopping")
    plot(table, common.RESULTS / "stopping.png")
