"""All methods beside what people use instead, on the same prompts and noise: how far from the image of N steps of DDIM.

    python benchmarks/methods.py                     # hours; writes results/methods.{csv,png}
    python benchmarks/methods.py --models fashion --steps 1000   # some cells; the results of the others stay
    python benchmarks/methods.py --show              # the tables and the picture, from results/methods.csv

By as many network passes M: the first solution of collocation with M nodes and a window of 1; M steps of DDIM,
DPM-Solver++ (2M, 3M), UniPC and DEIS by diffusers' own pipelines; and N steps of which M have a pass and the others'
outputs are forecast, by TaylorSeer's rule (arXiv 2503.06923; orders 1 and 2) or Spectrum's (arXiv 2603.01623; a ridge
regression on Chebyshev polynomials), here applied to the network's outputs. By their own counts: nodes chosen with the
default tolerance, and, without guidance and at that of PARALLEL_AT, SRDS, ParaDiGMS (Shih et al., NeurIPS 2023,
algorithm 1) and collocation with wider windows. "serial": passes one after the other, "total": states in them;
"difference" and "worst" in grey levels, PSNR in dB, "time": seconds over the sequential run's, the median, with the
least and the most.

DDIM's few steps and the other solvers aim at the exact solution of the ODE, not at N steps of DDIM, so that a part of
their difference is what N steps of DDIM miss of it.
"""

import argparse
import copy
import math
import re
import time

import numpy as np
import pandas as pd
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from matplotlib.figure import Figure
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import common
from collocation import spread
from refinement import difference
from utils import COLORS

PASSES = (10, 13, 16, 20, 25)
SOLVERS = {
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "DPM-Solver++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "UniPC": (UniPCMultistepScheduler, {}), "DEIS": (DEISMultistepScheduler, {}),
}  # fmt: skip
PARALLEL = {
    "collocation, default": {"method": "collocation"},
    "collocation, window 32": {"method": "collocation", "nodes": 100, "window": 32},
    "SRDS, default": {},
    "SRDS, k = 1": {"max_iterations": 1},
}
PARALLEL_AT = (None, 2)


def few_steps(sampler, text, seed, solver, steps):
    """The image of a pipeline's own call with another scheduler, uint8."""
    kind, more = SOLVERS[solver]
    scheduler = kind.from_config(sampler.pipeline.scheduler.config, timestep_spacing="trailing", **more)
    pipeline, step = copy.copy(sampler.pipeline), scheduler.step
    # Not every scheduler takes the generator that a pipeline without guidance hands on.
    scheduler.step = lambda output, t, x, return_dict=True, **_: step(output, t, x, return_dict=return_dict)
    vars(pipeline)["scheduler"] = scheduler
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": text} if sampler.model.prompted else {}
    given |= sampler.arguments | {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": steps}
    image = pipeline(**given, output_type="np").images[0]
    return np.broadcast_to((image * 255).round().astype(np.uint8), (*image.shape[:2], 3))


def taylor(n, outputs, j, N, order):
    """The forecast of TaylorSeer at grid point j: backward differences in place of derivatives."""
    forecast, term = outputs[-1], 1.0
    differences, points = outputs[-order - 1 :], n[-order - 1 :]
    for i in range(1, len(points)):
        differences = [(new - old) / (points[k + i] - points[k + i - 1])
                       for k, (old, new) in enumerate(zip(differences, differences[1:]))]  # fmt: skip
        term *= (j - n[-1]) / i
        forecast = forecast + term * differences[-1]
    return forecast


def spectrum(n, outputs, j, N, degree=4, ridge=0.1):
    """The forecast of Spectrum at grid point j: a fit of Chebyshev polynomials, halved with a linear forecast."""
    at = lambda points: np.polynomial.chebyshev.chebvander(2 * np.asarray(points) / (N - 1) - 1, degree)
    known = at(n)
    weights = at([j]) @ np.linalg.solve(known.T @ known + ridge * np.eye(degree + 1), known.T)
    fit = sum(float(weight) * output for weight, output in zip(weights[0], outputs))
    return (fit + taylor(n, outputs, j, N, 1)) / 2 if len(n) > 1 else outputs[-1]


FORECASTS = {
    "TaylorSeer 1": lambda *known: taylor(*known, 1), "TaylorSeer 2": lambda *known: taylor(*known, 2),
    "Spectrum": spectrum,
}  # fmt: skip


def forecast(loop, solver, rule, passes):
    """The last state of N steps, of which so many, evenly spaced, have a pass; other outputs are forecast."""
    x, n, outputs, real = loop.x, [], [], {*spread(loop.N, passes).tolist()}
    for j in range(loop.N):
        at = torch.tensor([j])
        if j in real:
            n, outputs = [*n, j], [*outputs, loop.denoise(x, at)]
        output = outputs[-1] if j in real else FORECASTS[rule](n, outputs, j, loop.N)
        x, _ = solver.step(x, output.to(x), at, at + 1, x)
    loop.close()
    return x


def paradigms(sampler, prompt, seed, window, tolerance):
    """The last state, network calls and evaluations of Picard iterations over a sliding window of steps."""
    denoise, (signal, noise), step = sampler.loop(prompt).denoise, sampler.solver.grid[1:3], sampler.solver.step
    N, x, begin, end, serial, total = sampler.settings.fine_steps, sampler.loop("", seed).x, 0, 0, 0, 0
    # What a state may change by, squared: so many of the variances of ancestral sampling, of the step that follows.
    variance = (noise[1:] / noise[:-1]) ** 2 * (1 - (signal[:-1] / signal[1:]) ** 2)
    allowed = tolerance**2 * torch.cat([variance[1:], torch.full((1,), math.inf, dtype=torch.float64)])
    states = x.expand(N + 1, *x.shape[1:]).clone()
    while begin < N:
        states[end + 1 :] = states[end]  # those that the window has not reached start as the last that it has
        end = min(begin + window, N)
        n = torch.arange(begin, end)
        moves = step(states[n], denoise(states[n], n), n, n + 1, states[n])[0] - states[n]
        new = states[begin] + moves.cumsum(0)
        moved = (new - states[n + 1]).square().flatten(1).mean(1).double() > allowed[n]
        states[n + 1] = new
        serial, total = serial + 1, total + len(n)
        begin += min(1 + int(moved.nonzero()[0]), len(n)) if moved.any() else len(n)
    return states[-1:], serial, total


def runs(sampler, text, seed, parallel, few):
    """Rows of one prompt and seed. few: images of few steps, by solver and steps, kept from one N to the next."""
    prompt, N = sampler.encode(text), sampler.settings.fine_steps
    truth, rows = sampler.sequential(prompt, seed), []
    loop, solver = sampler.loop(prompt, seed), sampler.solver.with_seed(seed)

    def row(method, serial, total, image, seconds, passes=None):
        exact = np.array_equal(image, truth.image)
        rows.append({
            "method": method, "passes": passes, "serial": serial, "total": total,
            "difference": difference(image, truth.image), "time": seconds / truth.seconds,
            "psnr": np.nan if exact else peak_signal_noise_ratio(truth.image, image),
            "ssim": structural_similarity(truth.image, image, channel_axis=2),
        })  # fmt: skip

    def refined(name, how, passes=None):
        *_, last = sampler.vary(**how).refine(prompt, seed)
        row(name, last.serial_evaluations, last.total_evaluations, last.image, last.seconds, passes)

    row("sequential", N, N, truth.image, truth.seconds)
    one = {"method": "collocation", "window": 1, "max_iterations": 0}
    refined("collocation, window 1, nodes chosen", one)
    for M in [M for M in PASSES if M < N]:
        refined("collocation, window 1", one | {"nodes": M}, M)
        for rule in FORECASTS:
            started = time.perf_counter()
            image = sampler.image(forecast(loop, solver, rule, M), prompt, seed)
            row(rule, M, M, image, time.perf_counter() - started, M)
        for name in ("DDIM", *SOLVERS):
            if (name, M) not in few:
                started = time.perf_counter()
                fewer = sampler.vary(fine_steps=M, coarse_steps=1)
                image = fewer.sequential(text, seed).image if name == "DDIM" else few_steps(fewer, text, seed, name, M)
                few[name, M] = image, time.perf_counter() - started
            row(name, M, M, *few[name, M], M)
    for method, how in PARALLEL.items() if parallel else ():
        refined(method, {"coarse_steps": round(N**0.5)} | how)
    for window, tolerance in ((32, 0.1), (32, 0.02), (200, 0.1)) if parallel else ():
        started = time.perf_counter()
        state, *counts = paradigms(sampler, prompt, seed, min(window, N), tolerance)
        image = sampler.image(state, prompt, seed)
        row(f"ParaDiGMS, window {window}, {tolerance:g}", *counts, image, time.perf_counter() - started)
    return rows


def measure(model, guidance, steps, samples):
    """Yield for each N the means and worst of each method over samples, half as many above N = 200: a DataFrame."""
    loaded, few = common.load(model, guidance_scale=guidance), {}
    for N in steps:
        sampler, rows = loaded.vary(fine_steps=N, coarse_steps=1), []
        for i, (text, seed) in enumerate(common.held_out(samples if N <= 200 else samples // 2)):
            rows += runs(sampler, text, seed, guidance in PARALLEL_AT, few.setdefault(i, {}))
        groups = pd.DataFrame(rows).groupby(["method", "passes"], sort=False, dropna=False)
        table = groups[["serial", "total", "difference", "psnr", "ssim"]].mean().assign(worst=groups.difference.max())
        table = table.assign(time=groups.time.median(), least=groups.time.min(), most=groups.time.max()).reset_index()
        for place, (name, value) in enumerate({"model": model, "guidance": guidance or 0.0, "N": N}.items()):
            table.insert(place, name, value)
        yield table


def few_passes(table):
    """Differences by model, guidance and N: collocation's with a window of 1, the best solver's, the best forecast's.

    Bold: at most half of the best solver's. !: above the best of all.
    """
    rows = []
    for cell, part in table[table.passes.notna()].groupby(["model", "guidance", "N"]):
        row = dict(zip(("model", "guidance", "N"), cell))
        for M, found in part.groupby("passes"):
            found = found.set_index("method").difference
            ours, solvers, forecasts = found["collocation, window 1"], found[["DDIM", *SOLVERS]], found[[*FORECASTS]]
            best = solvers.min(), forecasts.min()
            text = f"**{ours:.2f}**" if ours <= best[0] / 2 else f"{ours:.2f}"
            row[int(M)] = f"{text}{'!' if ours > min(best) else ''}/{best[0]:.2f}/{best[1]:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def all_methods(table, N, passes=(13, 20)):
    """A row for each method by its own counts, and for those in the plot by so many passes, for both models."""
    columns = {}
    for model, guidance in (("demo", 2), ("fashion", 0)):
        part = table[(table.model == model) & (table.guidance == guidance) & (table.N == N)]
        part = part[part.passes.isna() | part.passes.isin(passes) & part.method.isin(LINES)]
        part = part.set_index(part.method + part.passes.map(", {:.0f}".format).where(part.passes.notna(), ""))
        texts = {name: part[name].map(form.format) for name, form in DIGITS.items()}
        texts["difference"] += " (" + texts.pop("worst") + ")"
        texts["time"] += " (" + texts.pop("least") + "-" + texts.pop("most") + ")"
        columns |= {f"{model}: {name}": text for name, text in texts.items()}
    return pd.DataFrame(columns).rename_axis("method").reset_index()


COLOURS = {"collocation": COLORS["collocation"], "SRDS": COLORS["srds"], "DDIM": COLORS["sequential"],
           "ParaDiGMS": "C5", "DPM-Solver++": "C1", "UniPC": "C2", "TaylorSeer": "C4"}  # fmt: skip
DIGITS = {"serial": "{:.0f}", "total": "{:.0f}", "difference": "{:.2f}", "worst": "{:.2f}", "psnr": "{:.1f}",
          "ssim": "{:.4f}", "time": "{:.2f}", "least": "{:.2f}", "most": "{:.2f}"}  # fmt: skip
LINES = ("collocation, window 1", "DDIM", "DPM-Solver++ 2M", "UniPC", "TaylorSeer 1")
POINTS = (*PARALLEL, "ParaDiGMS, window 32, 0.1", "ParaDiGMS, window 32, 0.02")


def plot(table, path, N=50):
    """Difference against passes in all, for one device, and against serial evaluations, for room for batches."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    cells = (("demo", 2.0, "demo, guidance 2"), ("fashion", 0.0, "Fashion-MNIST"))
    for row, (model, guidance, title) in zip(figure.subplots(2, 2, sharey="row"), cells):
        cell = table[(table.model == model) & (table.guidance == guidance) & (table.N == N)]
        for axes, count in zip(row, ("total", "serial")):
            axes.set(xscale="log", yscale="log", title=f"{title}, N = {N}")
            labels = []
            for method in (*(LINES if count == "total" else ()), *POINTS):
                part = cell[cell.method == method].sort_values("total")
                colour = COLOURS[re.match(r"[\w+-]+", method)[0]]
                axes.plot(part[count], part.difference, "o-" if method in LINES else "D", color=colour, markersize=5)
                labels.append((part[count].max(), part.difference.iloc[-1], method, colour))
            placed = []
            for x, y, method, colour in sorted(labels, key=lambda label: label[1]):
                low = max([other for at, other in placed if 0.2 < at / x < 5], default=0) * 1.6
                placed.append((x, max(y, low)))
                how = {"color": colour, "fontsize": 8, "va": "center", "zorder": 1.5}
                how["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axes.annotate(method.replace("S, window 32", "S"), (x, y), xytext=(x * 1.08, max(y, low)), **how)
            axes.axvline(N, color="0.6", linestyle=":", zorder=1)
            how = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "fontsize": 8, "color": "0.4"}
            axes.annotate("sequential", (N * 0.98, 0.97), va="top", **how)
            axes.set_xlabel(
                {"total": "evaluations in all (one device)", "serial": "serial evaluations (batches)"}[count]
            )
            ticks = (10, 20, 50, 100, 200) if count == "total" else (10, 20, 50)
            axes.set_xticks(ticks, ticks)
            axes.set_xticks([], minor=True)
            axes.set_xlim(*((8, 1000) if count == "total" else (6, 90)))
            axes.grid(color="0.93")
            axes.set_axisbelow(True)
        row[0].set_ylabel("difference to the N-step image, grey levels")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["demo", "fashion"])
    parser.add_argument("--guidance", type=float, nargs="*", default=[1, 2, 4, 7.5, 12], help="of the demo")
    parser.add_argument("--steps", type=int, nargs="*", default=[28, 50, 100, 200])
    parser.add_argument("--samples", type=int, default=8, help="half of them above N = 200 (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print tables and plot from what was measured")
    args = parser.parse_args()
    for model in () if args.show else args.models:
        for guidance in args.guidance if model == "demo" else [None]:
            for new in measure(model, guidance, args.steps, args.samples):
                common.save(new, "methods", ("model", "guidance", "N"))
    table = pd.read_csv(common.RESULTS / "methods.csv")
    common.show(few_passes(table))
    for N in args.steps:
        print(f"\nN = {N}:")
        common.show(all_methods(table, N))
    plot(table, common.RESULTS / "methods.png")
