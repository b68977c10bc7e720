"""Why the defaults are what they are: sweeps of the command's own settings, each against N sequential steps.

    python benchmarks/defaults.py                   # hours; writes results/NAME.csv for each of the names below
    python benchmarks/defaults.py solvers start     # those alone

prompts     how SRDS converges on 104 prompts at the defaults: the difference after each refinement.
correction  whether refinements make an image worse than its initialisation, with the paper's correction and the damped
            one, over guidance, N and B. "excess": by how much at worst; "failed": settings in which it is over 0.5.
stop        where each stop rule ends a run, which otherwise ends after six refinements, and how far off that is.
            "wrong": the share of runs that end more than one grey level off; "above": more than the tolerance.
solvers     how each solver converges to its own sequential sample, and where the default rule stops.
start       what a start from an earlier trajectory saves. The earlier run has another number of steps, guidance, word
            (the time of day), prompt, solver or seed, or is the same. "kept": its blocks, with a clean image each.

All differences are in grey levels of 255; "worst" is the largest of the samples.
"""

import argparse
import itertools
from itertools import pairwise

import pandas as pd

import common
from models import scenes
from refinement import difference, judge
from settings import STOP_RULES, TOLERANCE


def prompts():
    pairs = common.pairs(104)
    rows = common.refinements(common.load(tolerance=0, max_iterations=5), [{}], pairs)
    found = rows.groupby("k").difference.quantile([0.5, 0.9, 1]).unstack()
    return found.set_axis(["median", "90 %", "worst"], axis=1).reset_index()


def correction():
    grid = ((25, 5), (25, 8), (25, 10), (50, 7), (50, 10), (50, 14), (100, 10), (100, 14), (100, 20))
    names, found = ("guidance_scale", "fine_steps", "coarse_steps", "correction"), []
    for model, guidances in (("demo", (1.0, 3.0, 5.0, 7.5, 12.0)), ("fashion", (None,))):
        settings = [dict(zip(names, (guidance, *steps, kind)))
                    for guidance, steps, kind in itertools.product(guidances, grid, ("paper", "damped"))]  # fmt: skip
        sampler = common.load(model, tolerance=0, max_iterations=8)
        rows = common.refinements(sampler, settings, common.pairs(4)).fillna({"guidance_scale": 0.0})
        error = rows.pivot(index=[*names, "seed"], columns="k", values="difference")
        excess = error.drop(columns=0).sub(error[0], axis=0).max(axis=1)
        found.append(excess.groupby([*names]).max().rename("excess").reset_index().assign(model=model))
    groups = pd.concat(found).groupby(["model", "guidance_scale", "correction"])
    table = groups.excess.agg(settings="count", failed=lambda excess: (excess > 0.5).sum(), excess="max")
    return table.reset_index()


def stopped(rows, rule=STOP_RULES[0], tolerance=TOLERANCE):
    """Of each seed's refinements, the one at which a rule stops; the last where it does not."""
    found = []
    for _, part in rows.groupby("seed"):
        run = [*part.itertuples()]
        stops = (
            later for earlier, later in pairwise([None, *run]) if judge(later, earlier, rule, tolerance) == "converged"
        )
        found.append(next(stops, run[-1]))
    return pd.DataFrame(found)


def stop():
    settings = {
        "demo": ("demo", {}, 200),
        "N = 25, B = 5": ("demo", {"fine_steps": 25, "coarse_steps": 5}, 200),
        "N = 50, guidance 7.5": ("demo", {"fine_steps": 50, "guidance_scale": 7.5}, 200),
        "collocation": ("demo", {"method": "collocation"}, 200),
        "Fashion-MNIST": ("fashion", {}, 60),
    }
    found = []
    for name, (model, how, count) in settings.items():
        rows = common.refinements(common.load(model, tolerance=0, max_iterations=6), [how], common.pairs(count))
        for rule, tolerance in itertools.product(STOP_RULES, (0.02, 0.1, 0.5)):
            stops = stopped(rows, rule, tolerance)
            above = [(stops.difference > limit).mean() for limit in (1, tolerance)]
            found.append([name, rule, tolerance, stops.k.mean(), stops.difference.max(), *above])
    return pd.DataFrame(found, columns=["setting", "rule", "tolerance", "k", "worst", "wrong", "above"])


def solvers():
    found, sampler = [], common.load(tolerance=0, max_iterations=4)
    for how in ({}, {"eta": 0.5}, {"solver": "ddpm"}, {"solver": "dpmsolver++"}):
        rows = common.refinements(sampler, [how], common.pairs(12))
        errors = {f"k = {k}": value for k, value in rows.groupby("k").difference.mean().items()}
        found.append(
            {"solver": how.get("solver", "ddim"), "eta": how.get("eta", 0.0), **errors, "stop": stopped(rows).k.mean()}
        )
    return pd.DataFrame(found)


def start():
    cases = {"the same": {}, "25 steps": {"fine_steps": 25}, "50 steps": {"fine_steps": 50},
             "dpmsolver++": {"solver": "dpmsolver++"}, "another seed": {}, "guidance 1.5": {"guidance_scale": 1.5},
             "guidance 4": {"guidance_scale": 4.0}, "another word": {}, "another prompt": {}}  # fmt: skip
    found, pairs = [], common.pairs(4)
    for model, of_prompts in (("demo", True), ("fashion", False)):
        loaded = common.load(model)
        for (i, (text, seed)), method in itertools.product(enumerate(pairs), ("srds", "collocation")):
            sampler, truth = loaded.vary(method=method), loaded.sequential(text, seed).image
            without = sampler(text, seed)
            time = next(name for name in scenes.SKIES if name in text)
            word = text.replace(time, "noon" if time != "noon" else "night")
            texts = {"another prompt": pairs[i - 1][0], "another word": word}
            for case, changed in list(cases.items())[: None if of_prompts else 5]:
                for kept in (10, 25) if method == "collocation" else (10,):
                    earlier, before = sampler.vary(coarse_steps=kept, **changed), seed + 1000 * (case == "another seed")
                    states = earlier(texts.get(case, text), before).states
                    sample = sampler(text, seed, earlier.trajectory(states, before))
                    counts = [
                        each for run in (sample, without) for each in (run.serial_evaluations, run.total_evaluations)
                    ]
                    found.append([model, method, case, kept, *counts, difference(sample.image, truth)])
    names = ["model", "method", "earlier", "kept"]
    counts = ["serial", "total", "serial without", "total without", "difference"]
    groups = pd.DataFrame(found, columns=[*names, *counts]).groupby(names, sort=False)
    return (
        groups.mean().assign(difference=groups.difference.max()).rename(columns={"difference": "worst"}).reset_index()
    )


SWEEPS = {sweep.__name__: sweep for sweep in (prompts, correction, stop, solvers, start)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SWEEPS, []], default=[], metavar="name", help=", ".join(SWEEPS))
    for name in parser.parse_args().names or SWEEPS:
        print(f"\n{name}:", flush=True)
        common.save(SWEEPS[name](), name)
