"""What the engine costs beside the network.

    python benchmarks/engine.py           # demo model; writes benchmarks/results/engine.{csv,png}

"engine, %" is the share of a run's seconds that is spent neither in the network nor in decoding. Of collocation, B are
its nodes.
"""

import functools
import time
from unittest import mock

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import common
from settings import SCHEDULES

N, BLOCKS, REFINEMENTS, REPEATS = 100, (7, 10, 14, 20), 3, 3
NODES = ((100, 13), (100, 100), (1000, 1000))  # of so many steps, for collocation


def measure(sampler):
    """Seconds of a run of REFINEMENTS refinements at most, and those of them in the network and in decoding."""
    prompt, unet, inside = sampler.encode("a red sun over purple mountains at dusk"), sampler.pipeline.unet, 0.0
    sampler.loop(prompt)

    def timed(call, *inputs, **how):
        nonlocal inside
        started = time.perf_counter()
        output = call(*inputs, **how)
        inside += time.perf_counter() - started
        return output

    with mock.patch.object(unet, "forward", functools.partial(timed, unet.forward)):
        started = time.perf_counter()
        for iterate in sampler.iterates(prompt):
            timed(sampler.image, iterate.states, prompt)
            if iterate.k == REFINEMENTS:
                break
        return time.perf_counter() - started, inside


def plot(table, path):
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for schedule, part in table[table.schedule.isin(SCHEDULES)].groupby("schedule"):
        median = part.groupby("B")["engine, %"].median()
        axes.plot(part.B, part["engine, %"], ".", color="0.7")
        axes.plot(median.index, median, marker="o", label=schedule)
    axes.axhline(3, color="0.4", linestyle="--")
    axes.set(xlabel="B", ylabel="engine, %", xticks=BLOCKS)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sampler, rows = common.load(fine_steps=N), []
    for B in BLOCKS:
        for schedule in SCHEDULES:
            varied = sampler.vary(coarse_steps=B, schedule=schedule)
            measure(varied)
            for _ in range(REPEATS):
                seconds, inside = measure(varied)
                rows.append({"N": N, "B": B, "schedule": schedule, "seconds": seconds})
                rows[-1]["engine, %"] = 100 * (1 - inside / seconds)
    for steps, nodes in NODES:
        varied = sampler.vary(method="collocation", fine_steps=steps, nodes=nodes)
        for _ in range(REPEATS):
            seconds, inside = measure(varied)
            rows.append({"N": steps, "B": nodes, "schedule": "collocation", "seconds": seconds})
            rows[-1]["engine, %"] = 100 * (1 - inside / seconds)
    table = pd.DataFrame(rows)
    spread = table.groupby(["N", "B", "schedule"]).agg([np.min, np.median, np.max])
    spread.columns = [f"{name}, {statistic}" for name, statistic in spread.columns]
    common.save(spread.reset_index(), "engine")
    plot(table, common.RESULTS / "engine.png")
