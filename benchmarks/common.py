"""What the benchmarks share: the command's own problem with other settings, other prompts, places for results."""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import diffusion
import main
import scenes


def load(model="demo", *more, processes=None):
    """The command's `Problem` for a model on the CPU, with its defaults and the prompts of prompts.txt."""
    argv = ["--model", model, "-p", str(ROOT / "prompts.txt"), "-o", "output", "--device", "cpu", *more]
    return main.load(main.parse_arguments(argv), processes or main.Processes())[0]


def sequential(problem, denoise):
    """The sequential sample's state, (1, C, H, W)."""
    return diffusion.sequential(problem.x, denoise, problem.step, range(problem.args.fine_steps + 1))


def errors(problem, denoise, truth):
    """Difference to the image `truth`, in grey levels, and ticks, after refinements 0, 1, ...: (2, K + 1)."""
    runs = [(main.difference(problem.image(at.states), truth), at.ticks) for at in problem.iterates(denoise)]
    return np.array(runs).T


def prompts(rng, count):
    """Different captions that state every attribute, drawn at random, and their attributes."""
    drawn = {}
    while len(drawn) < count:
        attributes = {name: str(rng.choice(values)) for name, values in scenes.ATTRIBUTES.items()}
        drawn[scenes.caption(rng, **attributes)] = attributes
    return list(drawn), list(drawn.values())


def pairs(problem, count):
    """Pairs of prompt and seed: those of prompts.txt first."""
    texts = [*problem.args.texts, *prompts(np.random.default_rng(7), count)[0]][:count]
    return list(zip(texts, range(problem.args.seed, problem.args.seed + count)))


def save(table, name):
    """Write a table of results, and print it."""
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.5g")
    print(table.round(3).to_string(index=False))
