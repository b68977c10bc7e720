"""What the engine costs beside the network: the share of a pipelined run that is not spent in `denoise`.

python benchmarks/engine.py           # demo model, N = 100, on the CPU; writes benchmarks/results/engine.csv
"""

import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main
from srds import srds


def measure(problem):
    """Seconds of one run to exactness, and those of them inside the denoiser."""
    denoiser, inside = problem.denoiser("a red sun over purple mountains at dusk"), 0.0

    def denoise(x, n):
        nonlocal inside
        started = time.perf_counter()
        output = denoiser(x, n)
        inside += time.perf_counter() - started
        return output

    started = time.perf_counter()
    for _ in srds(problem.x, denoise, problem.step, problem.boundaries):
        pass
    return time.perf_counter() - started, inside


if __name__ == "__main__":
    rows = []
    for blocks in (5, 10, 20):
        argv = ["--model", "demo", "--prompt", "-", "-o", "output", "--device", "cpu", "-cs", str(blocks)]
        problem, _ = main.load(main.parse_arguments(argv))
        measure(problem)
        for _ in range(5):
            seconds, inside = measure(problem)
            rows.append({"N": 100, "B": blocks, "seconds": seconds, "engine share, %": 100 * (1 - inside / seconds)})
    table = pd.DataFrame(rows).groupby(["N", "B"]).agg(["min", "median", "max"]).round(2)
    print(table.to_string())
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    table.to_csv(results / "engine.csv")
