"""What the benchmarks share: a sampler with the command's defaults, prompts and seeds, sweeps, tables of results."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from models import scenes
from refinement import entry_of
from sampler import Sampler
from settings import SEED
from study.console import quiet_libraries
from study.sampling import Shared

quiet_libraries()  # before a script imports what remarks on being imported
TEXTS = (ROOT / "prompts.txt").read_text(encoding="utf-8").splitlines()


def load(model="demo", **settings):
    """A `Sampler` for a model on the CPU."""
    return Sampler.from_pretrained(model, device="cpu").vary(**settings)


def prompts(seed, count):
    """So many different captions that state every attribute, drawn at random: {caption: attributes}."""
    rng, drawn = np.random.default_rng(seed), {}
    while len(drawn) < count:
        attributes = {name: str(rng.choice(values)) for name, values in scenes.ATTRIBUTES.items()}
        drawn[scenes.caption(rng, **attributes)] = attributes
    return drawn


def pairs(count):
    """Pairs of prompt and seed: those of prompts.txt first."""
    return list(zip([*TEXTS, *prompts(7, count)][:count], range(SEED, SEED + count)))


def held_out(count):
    """Pairs of prompt and seed on which nothing was set."""
    return list(zip(prompts(26, count), range(7000, 7000 + count)))


def refinements(sampler, settings, pairs):
    """A row for each prompt and seed, setting and refinement, as in the command's `results.csv`: a DataFrame.

    settings: dicts of what differs from the sampler's own.
    """
    samplers, rows = [sampler.vary(**each) for each in settings], []
    for text, seed in tqdm(pairs, unit="pair"):
        prompt = sampler.encode(text)
        shared = Shared(prompt, seed)
        for each, varied in zip(settings, samplers):
            truth = shared.truth(varied)
            for refinement in varied.refine(prompt, seed):
                rows.append({"prompt": text, "seed": seed, **each, **entry_of(refinement, truth)})
    return pd.DataFrame(rows)


def save(table, name, keys=()):
    """Write a table of results, print it, and return it with what an earlier one had.

    keys: columns; rows of an earlier table stay if the new one has none of the same values in these.
    """
    show(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    if keys and path.exists():
        old = pd.read_csv(path)
        replaced = old[[*keys]].apply(tuple, axis=1).isin({*table[[*keys]].itertuples(index=False, name=None)})
        table = pd.concat([old[~replaced], table]).sort_values([*keys], kind="stable")
    table.to_csv(path, index=False, float_format="%.5g")
    return table


def show(table):
    """Print a table as Markdown."""
    number = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    for cells in [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False, name=None)]:
        print(f"|{'|'.join(map(number, cells))}|", flush=True)
