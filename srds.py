"""Self-Refining Diffusion Samplers (Selvam, Merchant and Ermon, NeurIPS 2024, arXiv 2412.08292): the method.

The N steps of a sampler are cut into B blocks. F_i is the fine solve of block i (its steps, one after another), G_i
the coarse solve (one step over the whole block), and U_i^k the state at boundary i after k refinements:

    U_0^k     = x
    U_{i+1}^0 = G_i(U_i^0)                                               coarse initialisation
    U_k^k     = F_{k-1}(U_{k-1}^{k-1})                                   exact: the sequential sample's state
    U_{i+1}^k = F_i(U_i^{k-1}) + (G_i(U_i^k) - G_i(U_i^{k-1}))   i >= k  predictor-corrector (Algorithm 1)

A lane (i, k) carries U_i^k through block i, one fine step a tick; a tick is one batched model call for all
lanes that move. The first model output of a lane also serves its coarse step, which thus costs no call. As G can
overshoot, the caller may replace what the predictor-corrector adds to F (`correct`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Iterate(NamedTuple):
    """The trajectory after k refinements, and its cost so far."""

    k: int
    states: torch.Tensor  # U_0^k ... U_B^k, float32, (B + 1, ...)
    ticks: int  # serial model evaluations
    lane_steps: int  # model evaluations in all
    exact: bool  # the sequential sample, up to the model's rounding
    damping: torch.Tensor  # what `correct` withheld, over the state's norm, at the boundary with most; float32 ()
    settled: bool = True  # False if a method was cut short on its way to k, which SRDS never is
    all_nodes: bool = False  # collocation's last: every grid point is a node, and none still moves


@dataclass
class Lane:
    """The fine solve of block i from U_i^k: state x, float32, has reached grid point n."""

    i: int
    k: int
    n: int
    x: torch.Tensor
    past: torch.Tensor  # what the solver keeps from the lane's last step


def algorithm_1(dU, dG, start, end):
    """Return the paper's correction: the change of G."""
    return dG


@torch.no_grad()
def srds(x, denoise, step, boundaries, schedule="pipelined", refinements=None, correct=algorithm_1, begun=None):
    """Yield the initialisation (k = 0) and every refinement of it as an `Iterate`; leave the loop to stop.

    x: the initial noise, (1, ...). Times are indices in the grid, 0 to N, passed as
        int64 (L,) on the CPU.
    denoise(x, n): model outputs, (L, ...), for L states x at grid points n.
    step(x, m, start, end, past): the L states that the solver reaches at `end` from x at `start` with model outputs m,
        and what to pass as `past`, of the same shape, at each lane's next step. At a block's start `past` has no
        meaning.
    boundaries: n_0 < n_1 < ... < n_B, the grid points between the blocks.
    schedule: which lanes move in a tick. "pipelined" (section on pipelining): all of them. "sweep" (Algorithm 1):
        those of one refinement, first one by one through their first step, then together through the rest.
    refinements: K, the last refinement to yield; at most B, which is also the default.
    correct(dU, dG, start, end): what to add to F for the block from grid point `start` to `end`. dU and dG, of a
        state's shape, are the changes of its first state and of G since the last refinement.
    begun: U_1^0 ... U_B^0, (B, ...), in place of the coarse initialisation; all blocks then begin in the first
        tick. Ignored if each block has one step.

    Nothing here waits for the device, so that it always has work queued.
    """
    n, B = list(boundaries), len(boundaries) - 1
    K = B if refinements is None else min(refinements, B)
    fine_is_coarse = n[B] - n[0] == B
    if fine_is_coarse:
        K = 0  # the initialisation is already the sequential sample

    x = x[0].float()
    exact = [x]  # U_0^0, U_1^1, ...
    U = {0: [x]}  # U[k][i] of the iterates that are not complete yet, as far as it is known
    F, G = {}, {}  # F[i, k] = F_i(U_i^k) and G[i, k] = U_i^k, G_i(U_i^k), until refinement k + 1 has used them
    damping = {0: x.new_zeros(())}
    if begun is not None and not fine_is_coarse:
        U[0].extend(begun.float())
    # Every state that is known starts a lane: U_0^0 alone, unless `begun` is given.
    lanes = [Lane(i, 0, n[i], state, state) for i, state in enumerate(U[0][:B])]
    ticks = lane_steps = k = 0

    while k <= K:
        # One tick: a model output for every lane that moves, its fine step, and its coarse step if it has yet to start.
        moving = lanes if schedule == "pipelined" else sweep(lanes, n)
        # Lanes at their block's start go first in the batch, so that a slice of it serves their coarse steps.
        first = [lane for lane in moving if lane.n == n[lane.i]]
        moving = first + [lane for lane in moving if lane.n > n[lane.i]]
        X = torch.stack([lane.x for lane in moving])
        start = torch.tensor([lane.n for lane in moving], device="cpu")
        m = denoise(X, start)
        ticks, lane_steps = ticks + 1, lane_steps + len(moving)

        if first:
            f, end = len(first), torch.tensor([n[lane.i + 1] for lane in first], device="cpu")
            for lane, coarse in zip(first, step(X[:f], m[:f], start[:f], end, X[:f])[0]):
                G[lane.i, lane.k] = lane.x, coarse.clone()  # not a view, which would keep the whole batch alive
        for lane, fine, past in zip(moving, *step(X, m, start, start + 1, torch.stack([lane.past for lane in moving]))):
            lane.x, lane.n, lane.past = fine, lane.n + 1, past
            if lane.n == n[lane.i + 1]:
                F[lane.i, lane.k] = fine.clone()
        # Lanes end with their block; those of refinement K after their first step, as nothing corrects it.
        lanes = [lane for lane in lanes if lane.n < n[lane.i + 1] and (lane.k < K or lane.n == n[lane.i])]

        # Every state that becomes known starts a lane.
        for r, states in U.items():
            i = len(states) - 1
            if r == 0 and (i, 0) in G:
                # The coarse initialisation: U_{i+1}^0 = G_i(U_i^0).
                states.append(G[i, 0][1])
            elif (i, r) in G and (i, r - 1) in F:
                # The predictor-corrector: U_{i+1}^r = F_i(U_i^{r-1}) + the correction for how U_i, and so G_i, changed.
                dU, dG = (new - old for new, old in zip(G[i, r], G.pop((i, r - 1))))
                correction = correct(dU, dG, n[i], n[i + 1])
                states.append(F.pop((i, r - 1)) + correction)
                damping[r] = torch.maximum(damping[r], (dG - correction).norm() / states[-1].norm())
            else:
                continue
            if i + 1 < B:
                lanes.append(Lane(i + 1, r, n[i + 1], states[-1], states[-1]))
        i = len(exact) - 1
        if i < K and (i, i) in F:
            # The exact state, U_{i+1}^{i+1} = F_i(U_i^i), with which refinement i + 1 begins.
            exact.append(F.pop((i, i)))
            del G[i, i]
            U[i + 1], damping[i + 1] = list(exact), x.new_zeros(())
            if i + 1 < B:
                lanes.append(Lane(i + 1, i + 1, n[i + 1], exact[-1], exact[-1]))

        while k in U and len(U[k]) == B + 1:
            yield Iterate(k, torch.stack(U.pop(k)), ticks, lane_steps, k == B or fine_is_coarse, damping.pop(k))
            k += 1


def sweep(lanes, n):
    """Return the earliest refinement's lane that has not taken its first step; all its lanes if each has."""
    k = min(lane.k for lane in lanes)
    lanes = [lane for lane in lanes if lane.k == k]
    return [lane for lane in lanes if lane.n == n[lane.i]] or lanes


def rehearsal(boundaries, schedule="pipelined", refinements=None, started=False, denoise=lambda x, n: x):
    """Yield the iterates of `srds` without a network, for their counts. started: whether `begun` is given."""
    step, begun = lambda x, m, start, end, past: (x, past), torch.zeros(len(boundaries) - 1, 1) if started else None
    return srds(torch.zeros(1, 1), denoise, step, boundaries, schedule, refinements, begun=begun)
