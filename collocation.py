"""Collocated refinement: the N-step sampler as one system of equations, solved at a few points in time.

Every solver here is linear in its states and in the clean images d_j that it predicts at grid points j:

    x_n = P_n x_0 + sum_{j < n} K_nj d_j + Z_n,     d_j = d(x_j, j),     Z_n the noise of the steps.

Along a trajectory d changes smoothly; the states do not. So d is evaluated only at nodes t_1 = 0 < ... < t_M = N - 1
and interpolated between them, d = W d_nodes with W a local cubic in j (collocation; of diffusion's ODE as theory in
arXiv 2506.24042). With C = K_nodes W, the states at the nodes solve a system of size M instead of N,

    X = P x_0 + C d(X) + Z.

A tick evaluates d, in one batch, at the first nodes whose states have moved since their last evaluation by more than a
threshold. Then d is taken to be linear, d(X) = D + J (X - X_seen), and the system is solved without the network. The J
of a node fits its own evaluations, J S = Y for the last pairs of changes, and is a gain g in all other directions:

    J = g + (Y - g S) (S'S)^-1 S'          (multisecant, as in Anderson acceleration; Fang and Saad, 2009)

When no node moves any more, refinement 0 is done. Each further one puts a node into the middle of every interval, with
the interpolated state and d. With a node at every grid point, the system is the N-step sampler.
"""

import math

import torch

from srds import Iterate

MOVED = 1.0  # grey levels of 255 by which all that the nodes leave unseen together may change the sample
DENSELY_MOVED = 0.15  # the same for DENSE nodes, or all
SHOWN = 0.1  # the part of it that shows in most samples if guidance has made d rough: later steps forget the rest
DECIDED = 0.25  # share of the image in the state; before that, what is unseen may grow, and no tolerance allows more
NODES = 13  # of the first solution
DENSE = 100  # nodes, if interpolation between the first ones is too coarse
ROUGH = 5.0  # grey levels by which its neighbours may miss a first node's d; above, nodes become dense
DOUBTFUL = 2.0  # 127.5 times a refinement's change of the sample over its norm; above, nodes become dense
SECANTS = 2  # pairs of changes kept for each node
MOST_NUMBERS = 2**29  # in the secants of all nodes; above, fewer are kept
BLOCK = 64  # nodes that are solved for together
CPU = {"dtype": torch.float64, "device": "cpu"}  # for small tensors


@torch.no_grad()
def collocation(
    x, denoise, solver, boundaries, nodes=None, window=None, refinements=None, dense=False, start=None,
    broadcast=lambda value: value, tolerance=0.0,
):  # fmt: skip
    """Yield the solution on the first nodes (k = 0) and every refinement of it as an `Iterate`; leave the loop to stop.

    x, denoise, boundaries: as of `srds.srds`. The iterates' states are those at the boundaries.
    solver: has unrolled(shape), a `diffusion.Chain`; signal; gain; and clean(x, m, n), d of states and model outputs.
    nodes: M of k = 0, evenly spaced, at most N. None: 13, or 100 if nodes are dense; all N if N is at most twice that.
    window: most nodes in a tick, except for those that a refinement adds and for the first tick from a start. None:
        see `usual_window`.
    refinements: the last refinement to yield; None: all, until each grid point is a node.
    dense: whether to begin with dense nodes, for samples that depend strongly on early states, as those of pixels do.
        Nodes also become dense if the first ones show d to be too rough for interpolation, or if a refinement changes
        the sample by much.
    start: what d is at first: float32 (B, E), and W, float64 (N, B). The first tick then evaluates all nodes.
    broadcast: returns the first process's value, a list or a bool, if several share the lanes of a tick, so that all
        evaluate the same nodes.
    tolerance: how far off most samples may be, in grey levels. If nodes become dense because they are rough or
        doubtful, a tolerance between 0.015 and 0.1 saves evaluations once the image is `DECIDED`.

    Ends after N ticks with what is known by then, so as not to be deeper than the sequential sampler. An iterate is
    `settled` unless that limit, or the one of 2 M + 8 ticks for a refinement, cut it short.
    """
    shape, x = x.shape[1:], x.reshape(1, -1).float()
    chain = solver.unrolled(shape)
    N = chain.K.shape[1]
    t, kept = spread(N, nodes) if nodes else first(N, DENSE if dense else NODES), memory(N, x.numel())
    # How much an unseen change of a state changes the sample through the steps at a node; d changes by 1 / (2 signal).
    effect = solver.gain / (2 * solver.signal[:-1].clamp(min=1e-3))
    system, chosen, at_once = System(t, chain.states(x, t), kept), [0], start is not None
    densely = DENSELY_MOVED
    last, ticks, lane_steps, k = None, 0, 0, 0
    if start:
        system.X, system.d = chain.held(x, t, *start), start[1][t].to(x) @ start[0]
        chosen = list(range(len(t)))
    while True:
        M = len(system.t)
        dense = dense or M >= min(N, DENSE)
        wide = window or usual_window(M, narrow=dense and k == 0 and not start)
        chosen = chosen if at_once else chosen[:wide]
        shares = torch.where(solver.signal[system.t] < DECIDED, DENSELY_MOVED, densely) if dense else MOVED
        matters = shares / N / effect[system.t] / 127.5
        W = interpolation(N, system.t)
        C, free, bound = (chain.K[system.t] @ W).to(x), chain.states(x, system.t), min(N, ticks + 2 * M + 8)
        rough = False
        while (chosen := broadcast(chosen)) and ticks < bound:
            n = system.t[chosen]
            X = system.X[on(x, chosen)].reshape(-1, *shape)
            d = solver.clean(X, denoise(X, n), n)
            ticks, lane_steps = ticks + 1, lane_steps + len(chosen)
            system.see(chosen, d.reshape(len(chosen), -1), solver.signal[n])
            system.solve(C, free, min(chosen), wide)
            chosen = system.moved(matters)[:wide]
            # By now, d is known at five nodes or more.
            first_look = not (nodes or dense) and ticks == (1 if start else 2)
            rough = first_look and broadcast(system.roughness(solver.signal) > ROUGH)
            if rough:
                break
        if rough:  # what is known at later nodes would mislead: keep the first one, whose state is exact
            t, known, dense, densely = first(N, DENSE), system.D[:1], True, allowed(tolerance)
            system = System(t, chain.held(x, t, *start) if start else chain.states(x, t, system.d, W), kept)
            system.see([0], known, solver.signal[:1])
            chosen = list(range(1, len(t)))
            continue
        all_nodes = M == N and not chosen
        states = chain.states(x, torch.tensor(boundaries, device="cpu"), system.d, W).reshape(-1, *shape)
        yield Iterate(k, states, ticks, lane_steps, False, x.new_zeros(()), not chosen, all_nodes)
        if M == N or ticks >= N or k == refinements:
            return
        change = 127.5 * float((states[-1] - last).norm() / states[-1].norm()) if k else 0.0
        doubtful = broadcast(not dense and change > DOUBTFUL)
        if doubtful:
            dense, densely = True, allowed(tolerance)
        at_once = not doubtful
        new = first(N, DENSE) if doubtful else between(system.t)
        new = new[~torch.isin(new, system.t)]
        k, last = k + 1, states[-1]
        system, chosen = system.refined(new, chain.states(x, new, system.d, W), W[new].to(x) @ system.d)


def usual_window(nodes, narrow=False):
    """Return the most nodes in a tick; `narrow` for the first solution on dense nodes: less work, more ticks."""
    return max(3 if narrow else 8, math.ceil(nodes**0.5 / 2))


def allowed(tolerance):
    """Return what dense nodes together may leave unseen once the image is `DECIDED`, in grey levels."""
    return min(max(tolerance / SHOWN, DENSELY_MOVED), MOVED)


def first(N, nodes):
    """Return what `spread` does, or all grid points if there are at most twice as many."""
    return spread(N, nodes if N > 2 * nodes else N)


def spread(N, nodes):
    """Return at most so many (two or more) evenly spaced grid points, 0 and N - 1 among them: int64 (M,)."""
    return torch.linspace(0, N - 1, min(nodes, N), **CPU).round().long().unique()


def memory(N, E):
    """Return how many secants, vectors of E numbers, each of N nodes keeps."""
    return min(SECANTS, MOST_NUMBERS // (2 * N * E))


def between(t):
    """Return the middle of each interval between nodes that has one: int64."""
    left = (t.diff() > 1).nonzero()[:, 0]
    return (t[left] + t[left + 1]) // 2


def interpolation(N, t, points=4):
    """Return W, float64 (N, M), which interpolates values at the nodes t to all grid points, by Lagrange's polynomial
    through the nearest four (Berrut and Trefethen, 2004, eq. 2.1)."""
    points, n = min(points, len(t)), torch.arange(N, device="cpu")
    low = (torch.searchsorted(t, n, right=True) - 1 - (points - 1) // 2).clamp(0, len(t) - points)
    near = low[:, None] + torch.arange(points, device="cpu")
    at = t[near].double()
    numerators = (n[:, None] - at)[:, None].expand(-1, points, -1)
    denominators = at[:, :, None] - at[:, None]
    same = torch.eye(points, **CPU).bool()
    factors = numerators.where(~same, 1.0) / denominators.where(~same, 1.0)
    return torch.zeros(N, len(t), **CPU).scatter(1, near, factors.prod(2))


def on(x, values):
    """Return small tensors of the CPU, or a list, on the device of x, without waiting for it."""
    return torch.as_tensor(values, device="cpu").to(x.device, non_blocking=True)


class System:
    """The unknown states, and what is known about d, at each of M nodes, as vectors of E numbers.

    t: the nodes, int64 (M,). X: the states. d: the prediction of d there. X_seen, D: the state at which d was last
    evaluated, and its value. S, Y: the last changes of both between evaluations, (M, memory, E). g: the gain. seen:
    whether d was evaluated at all; until then, it is that of the last node at which it was. With memory for two
    changes, a node takes the memory of eight states.
    """

    def __init__(self, t, X, memory):
        self.t, self.X, self.X_seen, self.D, self.d = t, X, *X.new_zeros(3, *X.shape)
        self.S, self.Y = X.new_zeros(2, len(t), memory, X.shape[1])
        self.g, self.seen = torch.zeros(len(t), **CPU), torch.zeros(len(t), **CPU).bool()

    def see(self, chosen, d, signal):
        """Record d, (L, E), as evaluated at the nodes `chosen`; signal: of these nodes, float64 (L,)."""
        chosen = torch.tensor(chosen, device="cpu")
        a = chosen[again := self.seen[chosen]]
        at, known = on(d, chosen), on(d, a)
        s, y = self.X[known] - self.X_seen[known], d[on(d, again.nonzero()[:, 0])] - self.D[known]
        gain = ((s * y).sum(1) / (s * s).sum(1).clamp(min=1e-12)).double().cpu()
        # An optimal denoiser's Jacobian lies between 0 and 1 / signal; guidance can make it negative.
        most = 1 / signal[again].clamp(min=1e-3)
        self.g[a] = torch.minimum(torch.maximum(gain, -3 * most), most)
        for values, last in ((self.S, s), (self.Y, y)):
            values[known] = torch.cat([last[:, None], values[known]], 1)[:, : values.shape[1]]
        if len(a):  # nodes seen for the first time will change like those seen with them
            for values in (self.S, self.Y, self.g):
                values[on(values, chosen[~again])] = values[int(a[-1])].clone()
        self.X_seen[at], self.D[at], self.seen[chosen] = self.X[at], d, True

    def solve(self, C, free, first, window):
        """Move X to the solution of X = free + C d(X), after an evaluation of nodes from number `first` on."""
        M = last = len(self.t)
        if not self.seen.all():
            latest = int(self.seen.nonzero()[-1])
            self.D[latest + 1 :] = self.d[latest + 1 :] = self.D[latest]
            last = min(M, latest + window + 1)
        # A cubic reaches to the second node ahead.
        for low in range(max(first - 2, 0), last, BLOCK):
            self._solve_block(slice(low, min(low + BLOCK, last)), C, free)

    def _solve_block(self, block, C, free):
        """Solve for the nodes of a block, with d at the others as predicted."""
        S, Y, D, g = self.S[block], self.Y[block], self.D[block], self.g[block]
        self.d[block] = D
        R = free[block] + C[block] @ self.d - self.X_seen[block]
        m, memory, E = S.shape
        # Everything that needs vectors is in one product and one transfer; the rest is small.
        products = S.reshape(-1, E) @ torch.cat([R, S.reshape(-1, E), Y.reshape(-1, E)]).T
        SR, SS, SY = products.double().cpu().split([m, m * memory, m * memory], 1)
        within = C[block, block].double().cpu()
        inverse = torch.linalg.inv_ex(torch.eye(m, **CPU) - within * g)[0]
        through = inverse @ within
        # weights_a = (S'S)^-1 S' Z_a, where Z = inverse R + through (Y - g S) weights.
        SS, SY = SS.reshape(m, memory, m, memory), SY.reshape(m, memory, m, memory)
        gram = SS.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        gram = gram + (1e-6 * gram.diagonal(dim1=1, dim2=2).sum(1) + 1e-10)[:, None, None] * torch.eye(memory, **CPU)
        coupling = ((SY - g[:, None] * SS) * through[:, None, :, None]).reshape(m, memory, m * memory)
        known = torch.einsum("arb,ab->ar", SR.reshape(m, memory, m), inverse)
        both = torch.linalg.solve_ex(gram, torch.cat([coupling, known[..., None]], 2))[0].flatten(0, 1)
        system = torch.eye(m * memory, **CPU) - both[:, :-1]
        weights = torch.linalg.solve_ex(system, both[:, -1])[0].reshape(m, memory, 1)
        weights, g, inverse, through = (on(R, values).to(R) for values in (weights, g[:, None], inverse, through))
        beyond = (Y * weights).sum(1) - g * (S * weights).sum(1)
        Z = inverse @ R + through @ beyond
        self.X[block], self.d[block] = self.X_seen[block] + Z, D + g * Z + beyond

    def moved(self, matters):
        """Return the nodes, a list, that were not seen yet or whose RMS change is above `matters`, float64 (M,)."""
        change = (self.X - self.X_seen).square().mean(1).sqrt().double().cpu()
        return ((change > matters) | ~self.seen).nonzero()[:, 0].tolist()

    def roughness(self, signal):
        """Return by how much the cubic through a node's four neighbours misses d there, over the nodes seen so far.

        In RMS grey levels, as they show in the states; 0 if fewer than five nodes were seen.
        """
        seen = int(self.seen.sum())
        if seen < 5:
            return 0.0
        missed = self.D[:seen].diff(n=4, dim=0).square().mean(1).cpu() / 36
        return 127.5 * float((missed * signal[self.t[2 : seen - 2]] ** 2).mean().sqrt())

    def refined(self, new, X, d):
        """Return the system with new nodes, with states X and values d (L, E), and the list of their numbers.

        A new node has the secants of the node before it, and the mean gain of its neighbours.
        """
        t, order = torch.cat([self.t, new]).sort()
        before = torch.searchsorted(self.t, new) - 1
        other = System(t, torch.cat([self.X, X])[order], 0)
        for name, values in {
            "X_seen": X, "D": d, "d": d, "S": self.S[before], "Y": self.Y[before],
            "g": (self.g[before] + self.g[before + 1]) / 2, "seen": torch.zeros(len(new), **CPU).bool(),
        }.items():  # fmt: skip
            setattr(other, name, torch.cat([getattr(self, name), values])[order])
        return other, (order >= len(self.t)).nonzero()[:, 0].tolist()
