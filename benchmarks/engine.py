"""What the engine costs beside the network: the share of a pipelined run that is not spent in `denoise`.

python benchmarks/engine.py           # demo model, N = 100, B = 10, on the CPU
"""

import sys
import time
from pathlib import Path
from statistics import median

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
    problem = main.load(main.parse_arguments(["--model", "demo", "--prompt", "-", "-o", "output", "--device", "cpu"]))[
        0
    ]
    measure(problem)
    runs = [measure(problem) for _ in range(5)]
    shares = sorted(100 * (total - inside) / total for total, inside in runs)
    print(f"run {median(total for total, _ in runs):.2f} s, of which the engine "
          f"{median(shares):.2f} % (5 runs: {shares[0]:.2f} to {shares[-1]:.2f} %)")  # fmt: skip
