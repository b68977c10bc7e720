"""What a start from an earlier trajectory saves: serial evaluations with it and without, at the default stop.

    python benchmarks/start.py          # writes benchmarks/results/start.csv

For 100 steps of the demo model, and of that of real data, which has no prompts: the earlier run is of another number
of steps, guidance, word (the time of day), prompt, solver or seed, or the same; it ends where its stop rule ends it.
"kept" are the blocks of which it keeps a clean image each. Means; "worst" is the largest difference to the N-step
sequential image, with a start.
"""

import argparse

import pandas as pd

import common
from models import scenes
from refinement import difference

# The earlier run's settings, where they differ.
CASES = {
    "the same": {},
    "25 steps": {"fine_steps": 25},
    "50 steps": {"fine_steps": 50},
    "guidance 1.5": {"guidance_scale": 1.5},
    "guidance 4": {"guidance_scale": 4.0},
    "another word": {},
    "another prompt": {},
    "dpmsolver++": {"solver": "dpmsolver++"},
    "another seed": {},
}
OF_PROMPTS = ("guidance 1.5", "guidance 4", "another word", "another prompt")


def earlier(case, text, seed, others):
    """The prompt and seed of the earlier run."""
    time = next(name for name in scenes.SKIES if name in text)
    texts = {"another prompt": others, "another word": text.replace(time, "noon" if time != "noon" else "night")}
    return texts.get(case, text), seed + 1000 * (case == "another seed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["demo", "fashion"])
    parser.add_argument("--samples", type=int, default=4, help="prompts, or seeds, a cell (%(default)s)")
    args, rows = parser.parse_args(), []
    pairs = common.pairs(args.samples)
    for model in args.models:
        loaded = common.load(model)
        for i, (text, seed) in enumerate(pairs):
            truth = loaded.sequential(text, seed).image
            for method in ("srds", "collocation"):
                sampler = loaded.vary(method=method)
                without = sampler(text, seed)
                for case, settings in CASES.items():
                    if case in OF_PROMPTS and not loaded.model.prompted:
                        continue
                    asked, before = earlier(case, text, seed, pairs[i - 1][0])
                    for blocks in (10, 25) if method == "collocation" else (10,):
                        other = sampler.vary(coarse_steps=blocks, **settings)
                        start = other.trajectory(other(asked, before).states, before)
                        sample = sampler(text, seed, start)
                        rows.append(
                            {
                                "model": model,
                                "method": method,
                                "earlier": case,
                                "kept": blocks,
                                "serial": sample.serial_evaluations,
                                "without": without.serial_evaluations,
                                "total": sample.total_evaluations,
                                "total without": without.total_evaluations,
                                "worst": difference(sample.image, truth),
                            }
                        )
    groups = pd.DataFrame(rows).groupby(["model", "method", "earlier", "kept"], sort=False)
    common.save(groups.mean().assign(worst=groups.worst.max()).reset_index(), "start")
