"""Sample with a denoiser of your own, without a pipeline or a network, and plot how fast the refinements converge.

    python examples/own_denoiser.py own_denoiser.png

The data is a mixture of Gaussians, whose best denoiser is known: `denoise` below. The methods take only such a
function, a `diffusion.Solver` on a grid of times, and the first noise.

The dashed curve is the theoretical bound of parareal, the method behind SRDS. Let e_i^k be the distance of the state at
boundary i after k refinements from the sequential one, F_i the fine solve of block i, and G_i the coarse one. Then

    e_0^k = 0,    e_{i+1}^0 <= b_i e_i^0 + c_i,    e_{i+1}^{k+1} <= a_i e_i^k + b_i e_i^{k+1},

where a_i is a Lipschitz constant of F_i - G_i, b_i is one of G_i, and c_i is the distance between F_i and G_i at the
sequential state (Gander and Hairer, Nonlinear convergence analysis for the parareal algorithm, 2008, theorem 1 and its
proof). For equal blocks with b >= 1, the last state's distance is then at most

    c a^k b^(B - k - 1) B! / ((k + 1)! (B - k - 1)!),

which falls faster than any geometric series and is 0 at k = B. Since no constants are known in advance, a_i and b_i are
measured here: the largest ratios between the sequential states and those of the refinements. Smaller ones cannot hold.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collocation import collocation
from diffusion import Grid, Solver, boundaries, normal, sequential
from srds import srds
from utils import COLORS

N, B, DIMENSIONS, COMPONENTS, SPREAD = 64, 8, 16, 6, 0.1
ROUNDING = 2e-6  # of states whose norm is 4
MEANS = normal((COMPONENTS, DIMENSIONS), seed=0).double()

# The grid: N + 1 points in time, at which x = signal x0 + noise eps. A network would also need the times.
ANGLE = torch.linspace(0.98, 0, N + 1, dtype=torch.float64) * math.pi / 2
GRID = Grid(ANGLE[:-1], ANGLE.cos(), ANGLE.sin(), prediction_type="sample")  # the denoiser returns x0
SOLVER = Solver(GRID, "ddim")


def denoise(x, n):
    """Return the mean of x0 given x, float32 (L, DIMENSIONS), for L states x, float32, at grid points n, int64 (L,)."""
    signal, noise = GRID.signal[n, None], GRID.noise[n, None]
    variance = signal**2 * SPREAD**2 + noise**2  # of x around signal * mean, if the component is known
    away = x.double()[:, None] - signal[..., None] * MEANS  # (L, COMPONENTS, DIMENSIONS)
    weights = (-away.square().sum(2) / (2 * variance)).softmax(1)[..., None]  # of each component, given x
    x0 = MEANS + (signal * SPREAD**2 / variance)[..., None] * away  # the mean of x0, if the component is known
    return (weights * x0).sum(1).float()


def stopped(x, tolerance=1e-3):
    """Return the first iterate of SRDS whose states have moved by less than the tolerance: a stop rule leaves the loop.

    For a pipeline, `for refinement in sampler.refine(prompt)` is the same loop, with images.
    """
    earlier = None
    for iterate in srds(x, denoise, SOLVER.step, boundaries(N, B)):
        if earlier is not None and (iterate.states - earlier).norm(dim=1).max() < tolerance:
            break
        earlier = iterate.states
    return iterate


def errors(x):
    """Return what the plot shows of SRDS, the theory and collocation, three tensors.

    For each method, (K, 2): for each k, serial evaluations and the distance of the last state from the sequential one.
    For the theory, (B + 1,): the bounds of SRDS's distances.
    """
    n = boundaries(N, B)
    truth = sequential(x, denoise, SOLVER.step, range(N + 1), n)
    distances = lambda iterates: torch.tensor([(each.ticks, (each.states[-1] - truth[-1]).norm()) for each in iterates])
    refined = [*srds(x, denoise, SOLVER.step, n)]
    collocated = collocation(x, denoise, SOLVER, n, nodes=6, tolerance=0)
    return distances(refined), bounds(truth, torch.stack([each.states for each in refined]), n), distances(collocated)


def bounds(truth, states, n):
    """Return the bounds of the last state's distance for k = 0 ... B, float64 (B + 1,).

    truth: (B + 1, DIMENSIONS). states: those of each refinement, (B + 1, B + 1, DIMENSIONS). n: the boundaries.
    """
    bound = torch.zeros(B + 1, B + 1, dtype=torch.float64)  # of e_i^k, at [k, i]
    for i, (start, end) in enumerate(pairwise(n)):
        u, U = truth[i], states[:, i]
        solved = lambda points, x: torch.cat([sequential(each[None], denoise, SOLVER.step, points) for each in x])
        fine, coarse = (solved(points, (u, *U)).double() for points in (range(start, end + 1), (start, end)))
        rest, moved = fine - coarse, (U - u).double().norm(dim=1)
        far = moved > 1e-4  # smaller moves would give ratios of rounding
        a, b = (((each[1:] - each[0]).norm(dim=1) / moved)[far].max() if far.any() else 0 for each in (rest, coarse))
        bound[0, i + 1] = b * bound[0, i] + rest[0].norm()
        for k in range(B):
            bound[k + 1, i + 1] = a * bound[k, i] + b * bound[k + 1, i]
    return bound[:, B]


def plot(samples, path):
    """Plot what `errors` returns for each of several samples, and write the plot to a file."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    looks = {"SRDS": (COLORS["srds"], "o-"), "collocation": (COLORS["collocation"], "s-")}
    for refined, _, collocated in samples:
        for (method, (color, mark)), (ticks, far) in zip(looks.items(), (refined.T, collocated.T)):
            how = {"color": color, "alpha": 0.5, "ms": 4, "label": method if refined is samples[0][0] else None}
            axes[0].plot(far, mark, **how)
            axes[1].plot(ticks, far, mark, **how)
    theory = torch.stack([bound for _, bound, _ in samples]).max(0)[0]
    axes[0].plot(theory, "k--", label="theory of SRDS, largest of all")
    axes[1].axvline(N, color=COLORS["sequential"], linestyle="--", label=f"sequential: N = {N}")
    for each, words in zip(axes, ("k", "serial evaluations")):
        each.axhspan(0, ROUNDING, color="0.93", label="rounding of float32")
        each.set_yscale("symlog", linthresh=1e-8)
        each.set(xlabel=words, xlim=(-0.02 * each.get_xlim()[1], None), ylim=(0, 1))
        each.legend(fontsize=8)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(ylabel="distance from the sequential sample", title=f"{len(samples)} samples, N = {N}, B = {B}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    plot([errors(normal((1, DIMENSIONS), seed)) for seed in range(8)], *sys.argv[1:2] or ["own_denoiser.png"])
    iterate = stopped(normal((1, DIMENSIONS), seed=0))
    print(f"own stop rule: k = {iterate.k}, {iterate.ticks} serial evaluations, {iterate.lane_steps} in total")
