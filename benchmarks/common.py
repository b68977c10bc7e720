"""What the benchmarks share: a sampler with the command's defaults, prompts and seeds, a clock, widths of ticks."""

import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from diffusion import boundaries
from models import scenes
from refinement import entry_of
from sampler import Sampler
from settings import SEED
from srds import rehearsal
from study.console import quiet_libraries
from study.sampling import Shared

quiet_libraries()  # before a script imports what remarks on being imported
TEXTS = (ROOT / "prompts.txt").read_text(encoding="utf-8").splitlines()


def load(model="demo", **settings):
    """A `Sampler` for a model on the CPU."""
    return Sampler.from_pretrained(model, device="cpu").vary(**settings)


def refinements(sampler, settings, pairs):
    """A row for each prompt and seed, setting and refinement, as in the command's `results.csv`: a DataFrame.

    settings: dicts of what differs from the sampler's own.
    """
    samplers, rows = [sampler.vary(**each) for each in settings], []
    for text, seed in tqdm(pairs, unit="pair"):
        shared = Shared(sampler.encode(text), seed)
        for each, varied in zip(settings, samplers):
            truth = shared.truth(varied)
            for refinement in varied.refine(shared.prompt, seed):
                rows.append({"prompt": text, "seed": seed, **each, **entry_of(refinement, truth)})
    return pd.DataFrame(rows)


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


def held_out(count):
    """Pairs of prompt and seed on which nothing was set."""
    return list(zip(prompts(np.random.default_rng(26), count)[0], range(7000, 7000 + count)))


def clock(call, device, *inputs):
    """The seconds of a call until the device has finished."""
    wait = torch.accelerator.synchronize if torch.device(device).type != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    call(*inputs)
    wait()
    return time.perf_counter() - started


def tick_widths(N, B, refinements):
    """The lanes in each tick of a pipelined sample that stops after so many refinements."""
    widths = []
    iterates = rehearsal(boundaries(N, B), denoise=lambda x, n: widths.append(len(x)) or x)
    next((iterate for iterate in iterates if iterate.k == refinements), None)  # there is none if k = 0 is exact
    return widths


def save(table, name):
    """Write a table of results, and print it."""
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.5g")
    print(table.round(3).to_string(index=False))
