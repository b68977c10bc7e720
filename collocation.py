"""Collocated refinement: the N-step sampler as one system of equations, solved at a few points in time.

Every solver here is linear in its states and in the clean images d_j that it predicts at grid points j:

    x_n = P_n x_0 + sum_{j < n} K_nj d_j + Z_n,     d_j = d(x_j, j),     Z_n the noise of the steps.

Along a trajectory, d changes smoothly; the states do not. So d is evaluated only at nodes t_1 = 0 < ... < t_M = N - 1
and interpolated between them, d = W d_nodes, with local cubics in j as W (collocation; arXiv 2506.24042 has it in
theory for diffusion's ODE). With C = K_nodes W, the states at the nodes solve a system of size M instead of N,

    X = P x_0 + C d(X) + Z.

A tick evaluates d, in one batch, at the first nodes whose states have moved by more than a threshold since their last
evaluation. Then d is approximated as linear, d(X) = D + J (X - X_seen), and the system is solved without the network.
The J of a node fits its own evaluations, J S = Y for the last changes S of its state and Y of its d, and is a gain g in
all other directions:

    J = g + (Y - g S) (S'S)^-1 S'          (multisecant, as in Anderson acceleration; Fang and Saad, 2009)

When no node moves any more, refinement 0 is done. Each further refinement puts a node into the middle of every
interval, with the interpolated state and d. With a node at every grid point, the system is the N-step sampler.

With a window of 1, refinement 0 evaluates each node once, in order: a multistep solver that aims at the N-step sample.
Behind the last node, p, d is interpolated; ahead of it, d is extrapolated. Let q be the node before p, s and y the last
changes of V and of d between evaluations, and V_n = x_n - P_n x_0. Then d_j is one of

    d_p + c y (j - p) / (p - q)         a line in time,
    d_p + y s'(V_j - V_p) / s's         a secant along the state, if s'y < 0.

The factor c, between 0 and 1, reduces the line's slope to the share that the last slope has in common with the slope
before it, so that a change that fades or reverses is not continued. The secant is for guidance, which makes d's
Jacobian strongly negative in a few directions: an overshoot of the state then moves d back by several times as much,
and explicit steps oscillate. With the secant, the states ahead depend on one number
each, z_j = s'(V_j - V_p) / s's, and the z_j solve a small triangular system.
"""

import math

import torch

from diffusion import interpolation, on
from srds import Iterate

# Tuned on the demo (guidance 1 to 12) and Fashion-MNIST, N = 25 to 1000, with prompts and seeds that no table uses.
MOVED = 1.0  # grey levels of 255 by which all unseen changes of the nodes together may change the sample
DENSELY_MOVED = 0.15  # the same for DENSE nodes, or all
SHOWN = 0.1  # the share of it that shows in most samples if guidance has made d rough: later steps remove the rest
DECIDED = 0.25  # share of the image in the state; below it, unseen changes may grow, so `tolerance` does not apply
NODES, DENSE = 13, 100  # nodes of the first solution, and of one for which so few are too coarse
ROUGH = 5.0  # grey levels by which a cubic through its neighbours may miss a node's d; above, nodes become dense
DOUBTFUL = 2.0  # 127.5 times a refinement's change of the sample over its norm; above, nodes become dense
SECANTS = 2  # pairs of changes kept for each node
BLOCK = 64  # nodes that are solved for together
# For a window of 1, with N = 28 to 200.
DENSER = 0.85  # nodes are evenly spaced in (j / N)^0.85: a little denser at the start, where d changes most
LAST = 0.3  # length of the last interval: the sample is almost d at the last node, and nothing corrects its state
POINTS = 3  # of the interpolation behind the last node; the one-sided end of a cubic amplifies oscillations
GAP = 2.5  # times the tolerance: how far a predicted state may differ from the interpolated one, in grey levels
FIRST, LEAST, MOST = 0.04, 0.5, 1.5  # without `nodes`: first interval over N; ratios of an interval to the one before
CPU = {"dtype": torch.float64, "device": "cpu"}  # for small tensors


@torch.no_grad()
def collocation(
    x, denoise, solver, boundaries, nodes=None, window=None, refinements=None, dense=False, start=None, tolerance=0.0
):
    """Yield the solution on the first nodes (k = 0) and every refinement of it as an `Iterate`; leave the loop to stop.

    x, denoise, boundaries: as in `srds.srds`. The iterates' states are those at the boundaries.
    solver: has unrolled(shape), a `diffusion.Chain`; signal; gain; and clean(x, m, n), d of states and outputs.
    nodes: M of k = 0, evenly spaced, at most N. None: 13, or 100 if nodes are dense; all N if N is at most twice that.
        With a window of 1, as many as the tolerance needs, and more if `dense`.
    window: most nodes in a tick, except for those that a refinement adds and for the first tick from a start. None:
        see `usual_window`. 1: always one node a tick, and in k = 0 each once.
    refinements: the last refinement to yield; None: all, until each grid point is a node.
    dense: whether to begin with dense nodes, for samples that depend strongly on early states, as pixels do.
        Nodes also become dense if the first ones show d to be too rough for interpolation, or if a refinement changes
        the sample by much.
    start: a first guess of d: float32 (B, E), and W, float64 (N, B). The first tick then evaluates all nodes.
    tolerance: how far off most samples may be, in grey levels. If nodes become dense because d is rough or a refinement
        doubtful, a tolerance between 0.015 and 0.1 saves evaluations once the image is `DECIDED`.

    Ends after N ticks at most, so as not to need more than the sequential sampler. An iterate is `settled` unless that
    limit, or the limit of 2 M + 8 ticks for a refinement, cut it short.
    """
    shape, x = x.shape[1:], x.reshape(1, -1).float()
    chain, signal, ends = solver.unrolled(shape), solver.signal, torch.tensor(boundaries, device="cpu")
    N, last, ticks, lane_steps, k = chain.K.shape[1], None, 0, 0, 0
    # How far unseen changes of dense nodes may change the sample, once decided; `loose` if nodes became dense later.
    share, loose = DENSELY_MOVED, min(max(tolerance / SHOWN, DENSELY_MOVED), MOVED)
    # How much an unseen change of a state changes the sample through the steps at a node; d changes by 1 / (2 signal).
    effect = solver.gain / (2 * signal[:-1].clamp(min=1e-3))

    def evaluate(X, n):
        """Return d, (L, E), of the states X, (L, E), at grid points n: one tick."""
        nonlocal ticks, lane_steps
        ticks, lane_steps, X = ticks + 1, lane_steps + len(n), X.reshape(-1, *shape)
        return solver.clean(X, denoise(X, n), n).flatten(1)

    def solve(system, nodes, wide, matters, look):
        """Evaluate nodes until none moves by more than `matters`, or to the bound; return W and those that still move.

        In place of the nodes, None if d proves rough after `look` ticks, when five nodes or more are known.
        """
        W, bound = interpolation(N, system.t), min(N, ticks + 2 * len(system.t) + 8)
        C, free = (chain.K[system.t] @ W).to(x), chain.states(x, system.t)
        while nodes and ticks < bound:
            n = system.t[nodes]
            system.see(nodes, evaluate(system.X[on(x, nodes)], n), signal[n])
            system.solve(C, free, min(nodes), wide)
            nodes = system.moved(matters)[:wide]
            if ticks == look and system.roughness(signal) > ROUGH:
                return W, None
        return W, nodes

    t = spread(N, nodes) if nodes else first(N, DENSE if dense else NODES)
    system, moving, at_once = System(t, chain.states(x, t)), [0], start is not None
    if start:
        system.X, system.d, moving = chain.held(x, t, *start), start[1][t].to(x) @ start[0], [*range(len(t))]
    elif window == 1:
        system, moving = one_by_one(chain, evaluate, x, nodes, tolerance * (DENSELY_MOVED if dense else 1)), []
    while True:
        M, dense = len(system.t), dense or len(system.t) >= min(N, DENSE)
        wide = window or usual_window(M, narrow=dense and k == 0 and not start)
        shares = torch.where(signal[system.t] < DECIDED, DENSELY_MOVED, share) if dense else MOVED
        matters, look = shares / N / effect[system.t] / 127.5, 0 if nodes or dense else 1 if start else 2
        W, moving = solve(system, moving if at_once else moving[:wide], wide, matters, look)
        if moving is None:  # later values would mislead: keep the first node's d, whose state is exact
            t, known, dense, share = first(N, DENSE), system.D[:1], True, loose
            system = System(t, chain.held(x, t, *start) if start else chain.states(x, t, system.d, W))
            system.see([0], known, signal[:1])
            moving = list(range(1, len(t)))
            continue
        states = chain.states(x, ends, system.d, W).reshape(-1, *shape)
        yield Iterate(k, states, ticks, lane_steps, False, x.new_zeros(()), not moving, M == N and not moving)
        if M == N or ticks >= N or k == refinements:
            return
        change = 127.5 * float((states[-1] - last).norm() / states[-1].norm()) if k else 0.0
        doubtful, k, last = not dense and change > DOUBTFUL, k + 1, states[-1]
        dense, share = dense or doubtful, loose if doubtful else share
        new, at_once = first(N, DENSE) if doubtful else between(system.t), window != 1 and not doubtful
        new = new[~torch.isin(new, system.t)]
        system, moving = system.refined(new, chain.states(x, new, system.d, W), W[new].to(x) @ system.d)


def one_by_one(chain, evaluate, x, nodes, tolerance):
    """Return the system with nodes that were evaluated once each, in order, see above.

    evaluate(X, n): d, (1, E), of a state at a grid point. nodes: their number; None: as many as the tolerance needs.
    """
    K, N, n, given = chain.K, chain.K.shape[1], 0, nodes and placed(chain.K.shape[1], nodes)
    t, V, seen, D = torch.zeros(0, dtype=int, device="cpu"), torch.zeros_like(x), x[:0], x[:0]
    while True:
        at = torch.tensor([n], device="cpu")
        t, seen, D = torch.cat([t, at]), torch.cat([seen, V]), torch.cat([D, evaluate(chain.states(x, at) + V, at)])
        if n == N - 1:
            system = System(t, chain.states(x, t, D, interpolation(N, t)))
            system.X_seen, system.D, system.d, system.seen[:] = chain.states(x, t) + seen, D, D.clone(), True
            return system
        s, y = (values[-2:].diff(dim=0).sum(0) for values in (seen, D))  # 0 at the first node
        W, sy, ss = interpolation(N, t, POINTS), float(s @ y), float(s @ s) + 1e-12
        gap = 127.5 * float(((K[at] @ W).to(x) @ D - V).square().mean().sqrt())
        end = given[len(t)] if given else following(t, gap, tolerance, N)
        W[n:], line = interpolation(N, t, 1)[n:], interpolation(N, t, 2)[n:]
        if sy >= 0 and len(t) > 1:
            before, now = (D[-3:].diff(dim=0) / on(D, t[-3:].diff())[:, None])[[0, -1]]  # the line's slopes
            W[n:] += min(max(float(before @ now) / (float(before @ before) + 1e-12), 0), 1) * (line - W[n:])
        V = (K[[end]] @ W).to(x) @ D
        if sy < 0:
            free = (K[n:end] @ W) @ (D @ s).double().cpu() - float(seen[-1] @ s)  # s'(V - V_p), if d stayed at d_p
            within = torch.eye(end - n, **CPU) - sy / ss * K[n:end, n:end]
            z = torch.linalg.solve_triangular(within, free[:, None] / ss, upper=False)
            V = V + float(K[end, n:end] @ z[:, 0]) * y
        n = end


def placed(N, M):
    """Return M of N grid points (at most N), 0 and N - 1 included, for a window of 1: a rising list."""
    order = torch.arange(min(M, N), device="cpu")
    even = (order / (len(order) - 2 + LAST)).clamp(max=1).double() ** (1 / DENSER)
    apart = ((even * (N - 1)).round().long() - order).cummax(0)[0] + order
    t = apart.clamp(max=N - len(order) + order)
    t[1:-1] = t[:-1].diff().sort()[0].cumsum(0)  # a line predicts less well over a longer interval
    return t.tolist()


def following(t, gap, tolerance, N):
    """Return the grid point of the next node; the gap is of second order in the interval, hence the root."""
    stretch = min(max((GAP * tolerance / max(gap, 1e-9)) ** 0.5, LEAST), MOST)
    interval = max(1, round(int(t[-2:].diff()) * stretch if len(t) > 1 else FIRST * N))
    left = N - 1 - int(t[-1])  # no short interval is left for the end
    return int(t[-1]) + (interval if left >= 2 * interval else left if left <= interval else -(-left // 2))


def usual_window(nodes, narrow=False):
    """Return the default window; `narrow` for a first solution on dense nodes: fewer evaluations, more ticks."""
    return max(3 if narrow else 8, math.ceil(nodes**0.5 / 2))


def first(N, nodes):
    """Return the grid points of `spread`, or all N if N is at most twice `nodes`."""
    return spread(N, nodes if N > 2 * nodes else N)


def spread(N, nodes):
    """Return at most `nodes` (two or more) evenly spaced grid points, 0 and N - 1 included: int64 (M,)."""
    return torch.linspace(0, N - 1, min(nodes, N), **CPU).round().long().unique()


def between(t):
    """Return the grid point in the middle of each interval between nodes that has one: int64."""
    return ((t[:-1] + t[1:]) // 2)[t.diff() > 1]


class System:
    """The unknown states, and what is known about d, at each of M nodes, as vectors of E numbers.

    t: the nodes, int64 (M,). X: the states. d: the predicted d there. X_seen, D: the state at which d was last
    evaluated, and its value. S, Y: the last changes of both between evaluations, (M, SECANTS, E). g: the gain. seen:
    whether d was ever evaluated; until then, d is that of the last node that was. A node takes the memory of eight
    states.
    """

    def __init__(self, t, X):
        self.t, self.X, self.X_seen, self.D, self.d = t, X, *X.new_zeros(3, *X.shape)
        self.S, self.Y = X.new_zeros(2, len(t), SECANTS, X.shape[1])
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
        if len(a):  # nodes seen for the first time are expected to change like those seen with them
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
        # All that needs vectors is in one product and one transfer; the rest is small.
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
        weights = torch.linalg.solve_ex(torch.eye(m * memory, **CPU) - both[:, :-1], both[:, -1])[0]
        small = weights.reshape(m, memory, 1), g[:, None], inverse, through
        weights, g, inverse, through = (on(R, values).to(R) for values in small)
        beyond = (Y * weights).sum(1) - g * (S * weights).sum(1)
        Z = inverse @ R + through @ beyond
        self.X[block], self.d[block] = self.X_seen[block] + Z, D + g * Z + beyond

    def moved(self, matters):
        """Return the nodes, a list, that were not seen yet or moved, in RMS, by more than `matters`, float64 (M,)."""
        change = (self.X - self.X_seen).square().mean(1).sqrt().double().cpu()
        return ((change > matters) | ~self.seen).nonzero()[:, 0].tolist()

    def roughness(self, signal):
        """Return how far the cubic through a node's four neighbours misses d there, as RMS over the nodes seen so far.

        In grey levels, scaled by the share of the image in the state; NaN if two to four nodes were seen.
        """
        seen = int(self.seen.sum())
        missed = self.D[:seen].diff(n=4, dim=0).square().mean(1).cpu() / 36
        return 127.5 * float((missed * signal[self.t[2 : seen - 2]] ** 2).mean().sqrt())

    def refined(self, new, X, d):
        """Return the system with new nodes, int64 (L,), and the list of their numbers.

        X, d: those of the new nodes. A new node has the secants of the node before it, and its neighbours' mean gain.
        """
        t, order = torch.cat([self.t, new]).sort()
        before = torch.searchsorted(self.t, new) - 1
        other = System(t, torch.cat([self.X, X])[order])
        g, seen = (self.g[before] + self.g[before + 1]) / 2, torch.zeros(len(new), **CPU).bool()
        parts = {"X_seen": X, "D": d, "d": d, "S": self.S[before], "Y": self.Y[before], "g": g, "seen": seen}
        vars(other).update({name: torch.cat([vars(self)[name], values])[order] for name, values in parts.items()})
        return other, (order >= len(self.t)).nonzero()[:, 0].tolist()
