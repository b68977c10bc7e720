"""The N-step image in few network passes: collocation with a window of 1 beside what people use, and all methods.

    python benchmarks/passes.py                     # an hour or two; writes results/passes.{csv,png}
    python benchmarks/passes.py --models fashion --steps 28   # some cells; the results of the others stay

For each model, guidance and N, on the same prompts and noise, the difference of each image to that of N sequential
steps of DDIM. By as many passes M: the first solution of collocation with M nodes and a window of 1; M steps of DDIM,
DPM-Solver++ (2M, 3M), UniPC and DEIS by diffusers' own pipelines; and N steps of which M have a pass and the others'
outputs are forecast, by TaylorSeer's rule (arXiv 2503.06923; orders 1 and 2) or Spectrum's (arXiv 2603.01623; a ridge
regression on Chebyshev polynomials), here applied to the network's outputs. By their own counts: nodes chosen with the
default tolerance, SRDS, ParaDiGMS, and collocation's defaults. "serial": passes one after the other, "total": states in
them; "difference" and "worst" in grey levels, PSNR in dB, "time": seconds over the sequential run's, the median.

DDIM's few steps and the other solvers aim at the exact solution of the ODE, not at N steps of DDIM, so that a part of
their difference is what N steps of DDIM miss of it.
"""

import argparse
import copy
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
}  # fmt: skip


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
    for tolerance in (0.1, 0.02) if parallel else ():
        started = time.perf_counter()
        state, *counts = common.paradigms(sampler, prompt, seed, min(32, N), tolerance)
        row(f"ParaDiGMS, {tolerance:g}", *counts, sampler.image(state, prompt, seed), time.perf_counter() - started)
    return rows


def measure(model, guidance, steps, samples, parallel):
    """Means and worst of each method over samples: a DataFrame."""
    loaded, rows, few = common.load(model, guidance_scale=guidance), [], {}
    for N in steps:
        sampler = loaded.vary(fine_steps=N, coarse_steps=1)
        for i, (text, seed) in enumerate(common.held_out(samples)):
            found = runs(sampler, text, seed, N in parallel, few.setdefault(i, {}))
            rows += [{"model": model, "guidance": guidance or 0, "N": N, **row} for row in found]
    groups = pd.DataFrame(rows).groupby(["model", "guidance", "N", "method", "passes"], sort=False, dropna=False)
    table = groups[["serial", "total", "difference", "psnr", "ssim"]].mean().assign(worst=groups.difference.max())
    return table.assign(time=groups.time.median()).reset_index()


def ratios(table):
    """For each cell and number of passes: ours, the best classic solver and the best forecast, and ours over both."""
    rows = []
    for (*cell, M), part in table[table.passes.notna()].groupby(["model", "guidance", "N", "passes"]):
        found = part.set_index("method").difference
        classic, guess = found[["DDIM", *SOLVERS]], found[[*FORECASTS]]
        ours = found["collocation, window 1"]
        rows.append([*cell, int(M), ours, classic.min(), classic.idxmin(), guess.min(), guess.idxmin(),
                     ours / classic.min(), ours / min(classic.min(), guess.min())])  # fmt: skip
    names = ["model", "guidance", "N", "passes", "window 1", "solver", "best solver", "forecast", "best forecast"]
    return pd.DataFrame(rows, columns=[*names, "of the solver", "of the best"])


LINES = {"collocation, window 1": "C0", "DDIM": "C7", "DPM-Solver++ 2M": "C1", "UniPC": "C2", "TaylorSeer 1": "C4"}
POINTS = {"collocation, default": "C0", "collocation, window 32": "C0", "SRDS, default": "C3", "SRDS, k = 1": "C3",
          "ParaDiGMS, 0.1": "C5", "ParaDiGMS, 0.02": "C5"}  # fmt: skip


def plot(table, path, N=50):
    """Difference against passes in all, for one device, and against serial evaluations, for room for batches."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    cells = (("demo", 2.0, "demo, guidance 2"), ("fashion", 0.0, "Fashion-MNIST"))
    for row, (model, guidance, title) in zip(figure.subplots(2, 2, sharey="row"), cells):
        cell = table[(table.model == model) & (table.guidance == guidance) & (table.N == N)]
        for axes, count in zip(row, ("total", "serial")):
            labels = []
            for method, colour in (LINES if count == "total" else {}).items():
                part = cell[cell.method == method].sort_values("passes")
                axes.plot(part.total, part.difference, "o-", color=colour, markersize=4)
                labels += [(part.total.max(), part.difference.iloc[-1], method, colour)]
            for method, colour in POINTS.items():
                (point,) = zip(*(cell[cell.method == method][name] for name in (count, "difference")))
                axes.plot(*point, "D", color=colour)
                labels += [(*point, method, colour)]
            placed = []
            for x, y, method, colour in sorted(labels, key=lambda label: label[1]):
                low = max([other for at, other in placed if 0.2 < at / x < 5], default=0) * 1.45
                placed.append((x, max(y, low)))
                axes.annotate(method, (x, y), xytext=(x * 1.07, max(y, low)), color=colour, fontsize=8, va="center")
            axes.axvline(N, color="0.6", linestyle=":")
            how = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "fontsize": 8, "color": "0.4"}
            axes.annotate("sequential", (N * 0.98, 0.03), **how)
            axes.set(xscale="log", yscale="log", title=f"{title}, N = {N}")
            axes.set_xlabel(
                "network passes in all (one device)" if count == "total" else "serial evaluations (batches)"
            )
            ticks = (10, 20, 50, 100, 200) if count == "total" else (10, 20, 50)
            axes.set_xticks(ticks, ticks)
            axes.set_xticks([], minor=True)
            axes.set_xlim(*((8, 900) if count == "total" else (6, 90)))
            axes.grid(color="0.93")
        row[0].set_ylabel("difference to the N-step image, grey levels")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["demo", "fashion"])
    parser.add_argument("--guidance", type=float, nargs="*", default=[1, 2, 4, 7.5, 12], help="of the demo")
    parser.add_argument("--steps", type=int, nargs="*", default=[28, 50, 100, 200])
    parser.add_argument("--parallel", type=int, nargs="*", default=[50], help="steps at which all methods run")
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    path = common.RESULTS / "passes.csv"
    for model in args.models:
        for guidance in args.guidance if model == "demo" else [None]:
            new = measure(model, guidance, args.steps, args.samples, args.parallel)
            print(ratios(new).round(3).to_string(index=False), flush=True)
            old = pd.read_csv(path) if path.exists() else new[:0]
            same = old[["model", "guidance", "N"]].apply(tuple, axis=1).isin({*zip(new.model, new.guidance, new.N)})
            both = pd.concat([old[~same.astype(bool)], new]).sort_values(["model", "guidance", "N"], kind="stable")
            both.to_csv(path, index=False, float_format="%.5g")
    table = pd.read_csv(path)
    if {("demo", 50), ("fashion", 50)} <= {*zip(table.model, table.N)}:
        plot(table, common.RESULTS / "passes.png")
