"""Collocated refinement beside its peers on the demo model and on the model of real data.

    python benchmarks/collocation.py          # writes benchmarks/results/collocation.csv

For each model, N and guidance, on the same prompts and noise: where collocation's defaults stop (the final rule at 0.1),
each of its refinements, all grid points as nodes at several windows, SRDS's refinements and where it stops, ParaDiGMS
(Shih et al., NeurIPS 2023, algorithm 1) and DDIM of fewer steps. "serial" are network calls one after the other, "total"
the states evaluated in them, "difference" is to the N-step sequential image in grey levels; means, and the worst.
ParaDiGMS is our own few lines, so that it runs on any model: a window of states, moved by the sequential sampler's steps
from their last outputs until the first ones change by less than the tolerance, as diffusers' pipeline has it.
"""

import argparse
import time

import pandas as pd
import torch

import common
from refinement import difference

TOLERANCES = (0.1, 0.02)


def paradigms(x, denoise, solver, window, tolerance):
    """The last state, network calls and evaluations of Picard iterations over a sliding window of steps."""
    N, at, serial, total = len(solver.signal) - 1, 0, 0, 0
    states = x.expand(N + 1, *x.shape[1:]).clone()
    allowed = tolerance**2 * (solver.noise[:-1] / solver.signal[:-1].clamp(min=1e-8)) ** 2
    while at < N:
        n = torch.arange(at, min(at + window, N))
        outputs = denoise(states[n], n)
        serial, total = serial + 1, total + len(n)
        moves = solver.step(states[n], outputs, n, n + 1, states[n])[0] - states[n]
        new = states[at] + moves.cumsum(0)
        error = (new - states[n + 1]).square().flatten(1).mean(1).double()
        states[n + 1] = new
        settled = (error > allowed[n]).nonzero()
        step = int(settled[0]) if len(settled) else len(n)
        step = max(step, 1)  # the first move is exact
        at += step
        states[at + 1 :] = states[at : at + 1] if not len(settled) else states[at + 1 :]
    return states[-1:], serial, total


def runs(sampler, prompt, seed):
    """Rows of every method on one prompt."""
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
    rows = refined("collocation", collocated.refine(prompt, seed))
    rows += refined("collocation 13", collocated.vary(nodes=min(13, N), max_iterations=3).refine(prompt, seed))
    for window in (8, 16, 32):
        if window <= N <= 200:
            every = collocated.vary(nodes=N, window=window, max_iterations=1)
            rows += refined(f"collocation, all nodes, window {window}", every.refine(prompt, seed), each=False)
    for B in (round(N**0.5), 2 * round(N**0.5)):
        rows += refined(f"SRDS {B}", sampler.vary(coarse_steps=B, max_iterations=4).refine(prompt, seed))
    for window in sorted({round(N**0.5), min(32, N), min(N, 200)}):
        for tolerance in TOLERANCES:
            started = time.perf_counter()
            state, *counts = paradigms(sampler.noise(seed), sampler.denoiser(prompt), sampler.solver, window, tolerance)
            seconds = time.perf_counter() - started
            rows.append(row(f"ParaDiGMS {window}, {tolerance:g}", *counts, sampler.image(state), seconds))
    for steps in (10, 20):
        fewer = sampler.vary(fine_steps=steps, coarse_steps=1).sequential(prompt, seed)
        rows.append(row(f"DDIM {steps}", steps, steps, fewer.image, fewer.seconds))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["demo", "fashion"])
    parser.add_argument("--steps", type=int, nargs="*", default=[25, 100, 200, 1000])
    parser.add_argument(
        "--guidance", type=float, nargs="*", default=[1, 2, 4, 7.5, 12], help="of the demo (%(default)s)"
    )
    parser.add_argument("--samples", type=int, default=8, help="prompts, or seeds, a cell (%(default)s)")
    args = parser.parse_args()
    path, tables = common.RESULTS / "collocation.csv", []
    old = pd.read_csv(path) if path.exists() else pd.DataFrame({"model": [], "N": [], "guidance": []})
    for model in args.models:
        loaded = common.load(model)
        guidances = args.guidance if loaded.model.family.guidance else [None]
        for N, guidance in ((N, guidance) for N in args.steps for guidance in guidances):
            sampler, rows = loaded.vary(fine_steps=N, coarse_steps=1, guidance_scale=guidance), []
            for text, seed in common.pairs(args.samples):
                rows += runs(sampler, sampler.encode(text), seed)
            groups = pd.DataFrame(rows).groupby("method", sort=False)
            table = (
                groups[["serial", "total", "difference"]]
                .mean()
                .assign(worst=groups.difference.max(), speedup=groups.speedup.median())
            )
            table = table.reset_index()
            table.insert(0, "guidance", guidance or 0.0)
            table.insert(0, "N", N)
            table.insert(0, "model", model)
            same = (old.model == model) & (old.N == N) & (old.guidance == (guidance or 0.0))
            old = pd.concat([old[~same], table])
            common.RESULTS.mkdir(exist_ok=True)
            old.to_csv(path, index=False, float_format="%.5g")
            print(table.round(3).to_string(index=False), flush=True)
