"""How each solver refines, what coarse steps should take for noise, and what restarts cost DPM-Solver++.

    python benchmarks/solvers.py          # about 15 minutes; writes benchmarks/results/solvers.{csv,png}

On the demo model: the difference to the solver's own sequential image, in grey levels, after refinements 0 to 4, the
worst prompt and the mean; and the refinements and serial evaluations at the default stop. A stochastic solver's coarse
step has the noise of its fine steps ("fine steps'", what srds runs), noise of its own of the same variance ("own"), or
none ("none", DDIM's step). "to the limit" is the difference of the sequential sample to that of 1000 DDIM steps,
"unrestarted" the same of diffusers' DPMSolverMultistepScheduler, which has no blocks to restart at.
"""

import argparse
import itertools

import numpy as np
import pandas as pd
import torch
from diffusers import DPMSolverMultistepScheduler
from matplotlib.figure import Figure

import common
from diffusion import Solver
from refinement import difference
from srds import srds

GRID = ((25, 5), (100, 10))
SOLVERS = {
    "ddim": {},
    "ddim, eta = 0.5": {"eta": 0.5},
    "ddpm": {"solver": "ddpm"},
    "dpmsolver++": {"solver": "dpmsolver++"},
}
NOISES = ("fine steps'", "own", "none")


def with_coarse_noise(sampler, seed, kind):
    """The solver's step, with other noise in its coarse steps."""
    solver, own = sampler.solver.with_seed(seed), sampler.solver.with_seed(seed + 10**6)
    coarse = {"own": own, "none": Solver(sampler.solver.grid)}.get(kind, solver)
    return lambda x, m, start, end, past: (coarse if (end > start + 1).any() else solver).step(x, m, start, end, past)


def refine(sampler, prompt, seed, noise, truth):
    """Errors after refinements 0 to 4, with the refinements and serial evaluations at the default stop."""
    how = with_coarse_noise(sampler, seed, noise), sampler.boundaries, sampler.settings.schedule, 4
    errors, stop, earlier = [], None, None
    for iterate in srds(sampler.loop("", seed).x, sampler.loop(prompt).denoise, *how, sampler.solver.damped):
        image = sampler.image(iterate.states)
        errors.append(difference(image, truth))
        settled = iterate.k and difference(image, earlier) < sampler.settings.tolerance
        if settled or iterate.k == 4:
            stop = stop or {"refinements": iterate.k, "serial": iterate.ticks}
        earlier = image
    return {**stop, "k": errors}


def unrestarted(sampler, prompt, seed):
    """The image of diffusers' own 2M sampler in the place of ours."""
    scheduler = DPMSolverMultistepScheduler.from_config(sampler.model.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(sampler.settings.fine_steps)
    x, denoise = sampler.loop("", seed).x, sampler.loop(prompt).denoise
    for j, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x, torch.tensor([j])), t, x).prev_sample
    return sampler.image(x)


def measure(sampler, count):
    finest, rows = sampler.vary(fine_steps=1000), []
    for text, seed in common.pairs(count):
        prompt = sampler.encode(text)
        limit = finest.sequential(prompt, seed).image
        for (N, B), (name, settings) in itertools.product(GRID, SOLVERS.items()):
            varied = sampler.vary(fine_steps=N, coarse_steps=B, **settings)
            truth = varied.sequential(prompt, seed).image
            row = {"N": N, "B": B, "solver": name, "to the limit": difference(truth, limit)}
            if name == "dpmsolver++":
                row["unrestarted"] = difference(unrestarted(varied, prompt, seed), limit)
            for noise in NOISES if varied.solver.stochastic else ("-",):
                rows.append({**row, "coarse noise": noise, **refine(varied, prompt, seed, noise, truth)})
    return rows


def summarise(rows):
    table = pd.DataFrame(rows)
    errors = np.stack(table.pop("k"))
    for k in range(errors.shape[1]):
        table[f"mean k={k}"] = errors[:, k]
    groups = table.groupby(["N", "B", "solver", "coarse noise"], sort=False)
    worst = groups[[f"mean k={k}" for k in range(errors.shape[1])]].max()
    worst.columns = [name.replace("mean", "worst") for name in worst]
    return groups.mean().join(worst).reset_index()


def plot(table, path):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    styles = dict(zip(["-", *NOISES], ("-", "-", "--", ":")))
    for axes, ((N, B), part) in zip(figure.subplots(1, 2), table.groupby(["N", "B"])):
        for _, line in part.iterrows():
            errors = [max(line[f"mean k={k}"], 1e-3) for k in range(5)]
            noise = "" if line["coarse noise"] == "-" else f", coarse noise: {line['coarse noise']}"
            color = f"C{list(SOLVERS).index(line.solver)}"
            axes.plot(errors, styles[line["coarse noise"]], marker="o", color=color, label=line.solver + noise)
        axes.set(yscale="log", xlabel="refinement k", xticks=range(5), title=f"N = {N}, B = {B}")
        axes.set_ylabel("mean difference, grey levels (from 0.001)")
        axes.grid(color="0.9")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12, help="(%(default)s)")
    args = parser.parse_args()
    results = summarise(measure(common.load(), args.prompts))
    common.save(results, "solvers")
    plot(results, common.RESULTS / "solvers.png")
