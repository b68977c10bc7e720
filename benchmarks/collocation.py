"""Collocated refinement beside its peers on the demo model and on the model of real data.

    python benchmarks/collocation.py            # hours; writes benchmarks/results/collocation.{csv,png}
    python benchmarks/collocation.py --own      # collocation's rows alone; the others stay as they were
    python benchmarks/collocation.py --brief    # minutes, on a quiet machine; writes benchmarks/results/seconds.csv

For each model, N and guidance, on the same prompts and noise: where collocation's defaults stop (the final rule at
0.1), each of its refinements, all grid points as nodes at several windows, first solutions of other nodes and windows,
SRDS's refinements and where it stops, ParaDiGMS (Shih et al., NeurIPS 2023, algorithm 1), DDIM and DPM-Solver++ of
fewer steps. "serial" are network calls one after the other, "total" the states evaluated in them, "difference" is to
the N-step sequential image in grey levels; means, and the worst. "speedup" is the sequential run's seconds over the
method's: median, least and most. Printed last: how many of the peers' rows are `beaten`.
ParaDiGMS is a few lines of our own, after diffusers' pipeline, so that it runs on pixels too.
"""

import argparse
import time
from itertools import islice

import pandas as pd
from matplotlib.figure import Figure

import common
from refinement import difference

TOLERANCES = (0.1, 0.02, 0.01)
EVERY = (None, 8, 16, 32)  # windows where every grid point is a node; None is the method's own
FIRST = ((7, 8), (13, 4), (25, 6), (25, 16), (50, 32), (100, 32), (100, 100))  # nodes and windows of a first solution


def runs(sampler, prompt, seed, brief, own):
    """Rows of every method, or of collocation alone, on one prompt; or of each one's fastest way."""
    N = sampler.settings.fine_steps
    truth = sampler.sequential(prompt, seed)

    def row(method, serial, total, image, seconds):
        error = difference(image, truth.image)
        return {
            "method": method,
            "serial": serial,
            "total": total,
            "difference": error,
            "speedup": truth.seconds / seconds,
        }

    def refined(name, refinements, each=True):
        rows, last = [], None
        for last in refinements:
            counts = last.serial_evaluations, last.total_evaluations
            rows.append(row(f"{name}, k={last.k}", *counts, last.image, last.seconds))
        return [*(rows if each else []), {**rows[-1], "method": f"{name}, stopped"}]

    collocated = sampler.vary(method="collocation", coarse_steps=1)
    rows, root = refined("collocation", collocated.refine(prompt, seed)), round(N**0.5)
    rows += refined("collocation 13", collocated.vary(nodes=13, max_iterations=3).refine(prompt, seed))
    if not brief:
        if N > 200:
            rows += refined("collocation 100", collocated.vary(nodes=100, max_iterations=3).refine(prompt, seed))
        for window in EVERY:
            if (window or 0) <= N <= 200:
                every, shown = collocated.vary(nodes=N, window=window), f", window {window}" if window else ""
                rows += refined(f"collocation, all nodes{shown}", every.refine(prompt, seed), each=False)
        for nodes, window in FIRST:
            if nodes < N or nodes == N and window not in EVERY:
                first = islice(collocated.vary(nodes=nodes, window=window).refine(prompt, seed), 1)
                rows += refined(f"collocation, {nodes} nodes, window {window}", first)[:1]
    if own:
        return rows
    for B in (root,) if brief else (root, 2 * root):
        rows += refined(f"SRDS {B}", sampler.vary(coarse_steps=B, max_iterations=4).refine(prompt, seed))
    for window in (root,) if brief else sorted({root, min(32, N), min(N, 200)}):
        for tolerance in TOLERANCES:
            started = time.perf_counter()
            state, *counts = common.paradigms(sampler, prompt, seed, window, tolerance)
            image = sampler.image(state)
            rows.append(row(f"ParaDiGMS {window}, {tolerance:g}", *counts, image, time.perf_counter() - started))
    for steps in (10, 20):
        for name, solver in (("DDIM", "ddim"), ("DPM-Solver++", "dpmsolver++")):
            fewer = sampler.vary(fine_steps=steps, coarse_steps=1, solver=solver).sequential(prompt, seed)
            rows.append(row(f"{name} {steps}", steps, steps, fewer.image, fewer.seconds))
    return rows


def beaten(peer, own):
    """Whether a row of collocation's has no more of either count than a peer's, a fifth fewer of one, and 0.02 more
    difference at most."""
    fewer = (own.serial <= peer.serial) & (own.total <= peer.total) & (own.difference <= peer.difference + 0.02)
    return bool((fewer & ((own.serial <= 0.8 * peer.serial) | (own.total <= 0.8 * peer.total))).any())


def ahead(table):
    """Of each model, N and guidance: how many of the peers' rows there are, and how many are `beaten`."""
    rows = []
    for cell, part in table.groupby(["model", "N", "guidance"]):
        own = part[part.method.str.startswith("collocation")]
        peers = part[part.method.str.startswith(("SRDS", "ParaDiGMS"))]
        rows.append((*cell, len(peers), sum(beaten(peer, own) for peer in peers.itertuples())))
    return pd.DataFrame(rows, columns=["model", "N", "guidance", "peers", "beaten"])


# Methods as the picture has them: label, which rows, their marker and colour, and whether a line joins them.
SHOWN = (
    ("ParaDiGMS", r"ParaDiGMS", "x", "0.45", False),
    ("SRDS, its refinements", r"SRDS 10, k=", "s", "tab:orange", True),
    ("collocation of 13 nodes, its refinements", r"collocation 13, k=", "o", "tab:green", True),
    ("collocation of 100 nodes, by window", r"all nodes.*stopped", "v", "tab:blue", True),
    ("collocation, default", r"collocation, stopped", "*", "tab:red", False),
)


def plot(table, path):
    """Difference against either count, for N = 100 of each model."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for row, (model, guidance) in zip(figure.subplots(2, 2, sharey="row"), (("demo", 2.0), ("fashion", 0.0))):
        cell = table[(table.model == model) & (table.N == 100) & (table.guidance == guidance)]
        for axes, count in zip(row, ("serial", "total")):
            for label, pattern, marker, colour, joined in SHOWN:
                part = cell[cell.method.str.contains(pattern)].sort_values(count)
                part = part[part.difference > 2e-4]
                how = {"ms": 15, "zorder": 3} if marker == "*" else {}
                line = "-" if joined else "none"
                axes.plot(part[count], part.difference, linestyle=line, marker=marker, color=colour, label=label, **how)
                for window, *point in zip(part.method.str.extract("window ([0-9]+)")[0], part[count], part.difference):
                    if isinstance(window, str):
                        axes.annotate(
                            window, point, xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour
                        )
            axes.axvline(100, color="0.6", linestyle=":", label="sequential")
            axes.set(xscale="log", yscale="log", xlabel=f"{count} evaluations", title=f"{model}, 100 steps")
            ticks = [10, 20, 50, 100] if count == "serial" else [40, 100, 200, 400, 700]
            axes.set_xticks(ticks, ticks)
            axes.set_xticks([], minor=True)
        row[0].set_ylabel("difference, grey levels")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["demo", "fashion"])
    parser.add_argument("--steps", type=int, nargs="*", default=[25, 100, 200, 1000])
    parser.add_argument(
        "--guidance", type=float, nargs="*", default=[1, 2, 4, 7.5, 12], help="of the demo (%(default)s)"
    )
    parser.add_argument("--samples", type=int, default=8, help="prompts, or seeds, a cell (%(default)s)")
    parser.add_argument("--own", action="store_true", help="collocation's rows alone; the others stay")
    parser.add_argument("--brief", action="store_true", help="each method's fastest way, for its seconds")
    args = parser.parse_args()
    path = common.RESULTS / ("seconds.csv" if args.brief else "collocation.csv")
    for model in args.models:
        loaded = common.load(model)
        guidances = args.guidance if "guidance_scale" in loaded.arguments else [None]
        for N, guidance in ((N, guidance) for N in args.steps for guidance in guidances):
            sampler, rows = loaded.vary(fine_steps=N, coarse_steps=1, guidance_scale=guidance), []
            for text, seed in common.pairs(args.samples):
                rows += runs(sampler, sampler.encode(text), seed, args.brief, args.own)
            groups = pd.DataFrame(rows).groupby("method", sort=False)
            table = (
                groups[["serial", "total", "difference"]]
                .mean()
                .assign(worst=groups.difference.max(), speedup=groups.speedup.median())
                .assign(least=groups.speedup.min(), most=groups.speedup.max())
            )
            table = table.reset_index()
            table.insert(0, "guidance", guidance or 0.0)
            table.insert(0, "N", N)
            table.insert(0, "model", model)
            old = pd.read_csv(path) if path.exists() else table[:0]
            same = (old.model == model) & (old.N == N) & (old.guidance == (guidance or 0.0))
            same &= old.method.str.startswith("collocation") if args.own else True
            common.RESULTS.mkdir(exist_ok=True)
            pd.concat([old[~same], table]).to_csv(path, index=False, float_format="%.5g")
            print(table.round(3).to_string(index=False), flush=True)
    if not args.brief:
        print(ahead(pd.read_csv(path)).to_string(index=False))
        plot(pd.read_csv(path), common.RESULTS / "collocation.png")
