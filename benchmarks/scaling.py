"""What several processes are worth: seconds and efficiency of --parallel, and what the exchange of a tick costs.

    python benchmarks/scaling.py    # demo model, a CPU core a process; writes benchmarks/results/scaling.{csv,png}

Launches of 1 and 2 processes take turns. Lanes: one prompt to three refinements; prompts: eight of them. Efficiency is
one process's seconds over P times those of P. Larger P are predicted: a tick of L lanes as c(ceil(L / P)),
the measured seconds of a call of so many lanes, and P - 1 times an exchange between two, which is a line through
measured seconds against bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import common
from sampler import Sampler
from study.processes import Processes

REFINEMENTS, PROMPTS, MEASURED, PREDICTED = 3, 8, (1, 2), (1, 2, 4, 8, 16, 31)
SETTINGS = ((100, 10), (961, 31))


def sample(sampler, text):
    for iterate in sampler.iterates(text):
        if sampler.processes.sharing == 1 or sampler.processes.first:
            sampler.image(iterate.states)
        if iterate.k == REFINEMENTS:
            break


def measure(processes):
    """What the first process of a launch finds: seconds by what was done."""
    processes.join(torch.device("cpu"), "lanes")
    alone = common.load()
    lanes = Sampler(alone.pipeline, processes=processes if processes.size > 1 else None)
    texts = [text for text, _ in common.pairs(PROMPTS)]

    def seconds(call):
        processes.wait()
        started = time.perf_counter()
        call()
        processes.wait()
        return time.perf_counter() - started

    def sample_prompts():
        for text in processes.deal(texts):
            sample(alone, text)

    lanes.warm_up()
    found = {
        "lanes": [seconds(lambda: sample(lanes, texts[0])) for _ in range(3)],
        "prompts": [seconds(sample_prompts)],
    }
    if processes.size == 1:
        loop = lanes.loop(texts[0])
        for L in (1, 2, 3, 4, 6, 8, 12, 16, 24, 31):
            inputs = loop.x.expand(L, *loop.x.shape[1:]), torch.zeros(L, dtype=int)
            found[f"call {L}"] = [common.clock(loop.denoise, "cpu", *inputs) for _ in range(6)][1:]  # the first is slow
        return found
    exchange, noise = processes.split(lambda x, n: x), lanes.loop("").x
    for L in (2, 10, 30):
        inputs = noise.expand(L, -1, -1, -1).contiguous(), np.zeros(L)
        found[f"exchange {L}"] = [common.clock(exchange, "cpu", *inputs) for _ in range(300)]
    return found | {"lane": [noise.nbytes]}


def launch(size):
    """`measure` in so many processes of one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, __file__, "--worker"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def summarise(found):
    """Rows of measured and predicted results, from lists of seconds by number of processes and name."""
    median = {key: float(np.median(values)) for key, values in found.items()}
    rows = []
    for mode in ("lanes", "prompts"):
        for P in MEASURED:
            values = found[P, mode]
            spread = dict(zip(("least", "seconds", "most"), np.quantile(values, (0, 0.5, 1))))
            efficiency = median[1, mode] / (P * median[P, mode])
            rows.append(
                {"mode": mode, "P": P, "kind": "measured", "N": 100, "B": 10, **spread, "efficiency": efficiency}
            )

    calls = {int(name.split()[1]): seconds for (_, name), seconds in median.items() if name.startswith("call")}
    # Of L lanes, two processes send each other half.
    lane = median[2, "lane"]
    sent = {int(name.split()[1]) / 2 * lane: seconds
            for (_, name), seconds in median.items() if name.startswith("exchange")}  # fmt: skip
    slope, start = np.polyfit(list(sent), list(sent.values()), 1)
    if slope < 0:  # so little is sent that it makes no difference
        slope, start = 0.0, float(np.mean([*sent.values()]))
    for N, B in SETTINGS:
        widths, predicted = np.array(common.tick_widths(N, B, REFINEMENTS)), {}
        for P in PREDICTED:
            own = np.ceil(widths / P)
            exchanges = (P - 1) * (start + slope * own * lane)
            predicted[P] = float((np.interp(own, list(calls), list(calls.values())) + exchanges).sum())
        for P, seconds in predicted.items():
            row = {"mode": "lanes", "P": P, "kind": "predicted", "N": N, "B": B, "seconds": seconds}
            gains = {"efficiency": predicted[1] / (P * seconds), "sequential / it": N * calls[1] / seconds}
            rows.append(row | gains)
    exchanges = pd.DataFrame({"bytes sent by a process": sent.keys(), "microseconds": 1e6 * np.array([*sent.values()])})
    return pd.DataFrame(rows), exchanges


def plot(table, path):
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for (N, B), part in table[table.kind == "predicted"].groupby(["N", "B"]):
        axes.plot(part.P, part["sequential / it"], "o--", label=f"N = {N}, B = {B}, predicted")
        sequential = (part["sequential / it"] * part.seconds).iloc[0]
        real = table[(table.kind == "measured") & (table["mode"] == "lanes") & (table.N == N)]
        if len(real):
            axes.plot(real.P, sequential / real.seconds, "ks", label=f"N = {N}, B = {B}, measured")
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="processes", ylabel="sequential seconds / SRDS's", xticks=PREDICTED, xticklabels=PREDICTED)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="launches of each size (%(default)s)")
    parser.add_argument("--worker", action="store_true", help="measure in a process that was launched")
    args = parser.parse_args()
    if args.worker:
        processes = Processes()
        result = measure(processes)
        if processes.first:
            print(json.dumps(result))
        processes.close()
        sys.exit()
    found = {}
    for _ in range(args.rounds):
        for P in MEASURED:
            for name, values in launch(P).items():
                found.setdefault((P, name), []).extend(values)
    table, exchanges = summarise(found)
    common.save(table, "scaling")
    print(exchanges.round(1).to_string(index=False))
    plot(table, common.RESULTS / "scaling.png")
