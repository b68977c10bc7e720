"""What the engine costs beside the network, and what samples side by side and processes of one CPU core each gain.

    python benchmarks/engine.py           # demo model, a quiet machine; writes results/{engine,batch,processes}.csv

"engine, %" is the share of a run's seconds that is spent neither in the network nor in decoding. "lanes" and "samples"
are what processes share (`--parallel`), for three refinements of N = 100, B = 10; "seconds" are those of a sample, and
the efficiency is what one process needs for it, over what P of them need together. "over one by one" is the time that
four samples of 50 steps take by `Sampler.batch`, over what they take one after the other.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from unittest import mock

import pandas as pd

import common
from settings import METHODS, SCHEDULES

REFINEMENTS, ROUNDS = 3, 3
RUNS = [{"coarse_steps": B, "schedule": schedule} for B in (10, 20) for schedule in SCHEDULES]
RUNS += [{"method": "collocation", "fine_steps": N, "nodes": M} for N, M in ((100, 13), (100, 100), (1000, 1000))]


def share(sampler):
    """The percentage of a run's seconds that is spent outside the network and decoding."""
    prompt, unet, inside = sampler.encode(common.TEXTS[0]), sampler.pipeline.unet, 0.0
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
        return 100 * (1 - inside / (time.perf_counter() - started))


def side_by_side(sampler, pairs):
    """What samples side by side take, over what they take one by one: seconds, and calls of the network."""
    counted = mock.patch.object(sampler.pipeline.unet, "forward", side_effect=sampler.pipeline.unet.forward)

    def cost(samples):
        started = time.perf_counter()
        with counted as network:
            list(samples)
        return time.perf_counter() - started, network.call_count

    one = cost(sampler(*pair) for pair in pairs)
    together = cost(sampler.batch(pairs))
    return [new / old for new, old in zip(together, one)]


def launch(P, parallel):
    """The seconds of each sample of eight, made by so many processes: a list."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={P}"] if P > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *(["-m", *torchrun] if torchrun else []), "main.py", "-o", folder, "--model", "demo",
                 "-p", "prompts.txt", "--seeds", "42,43", "--no-ground-truth", "--device", "cpu", "--tolerance", "0",
                 "--max-iterations", str(REFINEMENTS), *(["--parallel", parallel] if P > 1 else [])]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(words, env=environment, cwd=common.ROOT, capture_output=True, check=True)
        return pd.read_csv(f"{folder}/results.csv").query("final").seconds.tolist()


if __name__ == "__main__":
    sampler, rows = common.load(), []
    for how in RUNS:
        varied = sampler.vary(**how)
        shares = [share(varied) for _ in range(ROUNDS + 1)][1:]
        rows.append({"method": "srds", "fine_steps": varied.settings.fine_steps, **how,
                     "engine, %": pd.Series(shares).median(), "least": min(shares), "most": max(shares)})  # fmt: skip
    common.save(pd.DataFrame(rows), "engine")
    rows = []
    for method in METHODS:
        varied = sampler.vary(method=method, fine_steps=50, coarse_steps=7)
        seconds, calls = zip(*(side_by_side(varied, common.pairs(4)) for _ in range(ROUNDS)))
        rows.append({"method": method, "over one by one": pd.Series(seconds).median(), "least": min(seconds),
                     "most": max(seconds), "calls over one by one": calls[0]})  # fmt: skip
    common.save(pd.DataFrame(rows), "batch")
    rows = []
    for P, parallel in ((1, "lanes"), (2, "lanes"), (2, "samples")) * ROUNDS:
        rows += [{"parallel": parallel, "P": P, "seconds": seconds} for seconds in launch(P, parallel)]
    groups = pd.DataFrame(rows).groupby(["parallel", "P"])
    table = groups.seconds.agg(["median", "min", "max"]).reset_index()
    together = table["median"] * table.P.where(table.parallel == "lanes", 1)
    common.save(table.assign(efficiency=table["median"][0] / together), "processes")
