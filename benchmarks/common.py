"""What the benchmarks share: a sampler with the command's defaults, prompts and seeds, places for results."""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from models import scenes
from refinement import difference
from sampler import Sampler
from settings import SEED, Settings
from study.quiet import quiet_libraries

quiet_libraries()  # before a script imports what remarks on being imported
TEXTS = (ROOT / "prompts.txt").read_text(encoding="utf-8").splitlines()


def load(model="demo", **settings):
    """A `Sampler` for a model on the CPU."""
    return Sampler.from_pretrained(model, Settings(**settings), device="cpu")


def errors(sampler, prompt, seed, truth):
    """Difference to the image `truth`, in grey levels, and ticks, after refinements 0, 1, ...: (2, K + 1)."""
    iterates = sampler.iterates(prompt, seed)
    return np.array([(difference(sampler.image(iterate.states), truth), iterate.ticks) for iterate in iterates]).T


def prompts(rng, count):
    """Different captions that state every attribute, drawn at random, and their attributes."""
    drawn = {}
    while len(drawn) < count:
        attributes = {name: str(rng.choice(values)) for name, values in scenes.ATTRIBUTES.items()}
        drawn[scenes.caption(rng, **attributes)] = attributes
    return list(drawn), list(drawn.values())


def pairs(count):
    """Pairs of prompt and seed: those of prompts.txt first."""
    texts = [*TEXTS, *prompts(np.random.default_rng(7), count)[0]][:count]
    return list(zip(texts, range(SEED, SEED + count)))


def save(table, name):
    """Write a table of results, and print it."""
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.5g")
    print(table.round(3).to_string(index=False))
