"""The sampler's arithmetic: time grid, solvers as tables, sequential sampling."""

import copy
import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

LEAST = 1e-12  # least gain of a step; it is 0 if the step does nothing

# Time grid and solvers


class Grid(NamedTuple):
    """The points in time of N steps: x = signal x0 + noise eps at each, and at the end of the chain."""

    times: torch.Tensor  # the network's input at points 0 to N - 1: int64 timesteps, or float32 for a flow, (N,)
    signal: torch.Tensor  # float64 (N + 1,)
    noise: torch.Tensor  # float64 (N + 1,)
    prediction_type: str  # "epsilon", "v_prediction", "sample" or "flow"
    clip: float | None = None  # the largest absolute value of x0, if it is clipped

    def last(self, steps):
        """Return the grid of the last steps alone, with which image to image goes on from a noisy image."""
        n = len(self.signal) - steps - 1
        return self._replace(times=self.times[n:], signal=self.signal[n:], noise=self.noise[n:])


def timesteps(steps, training_steps):
    """Return the model's timesteps on a trailing grid: int64 (steps,), strictly falling, from training_steps - 1.

    They equal DDIMScheduler's if that has as many (for 961 of 1000 it has one more, which is -1).
    """
    grid = np.round(np.arange(training_steps, 0, -training_steps / steps))[:steps] - 1
    return torch.from_numpy(grid.astype(np.int64))


def diffusion_grid(scheduler, steps, solver="ddim"):
    """Return the trailing grid of a DDIMScheduler's noise schedule.

    It ends as the solver does in diffusers: for ddim as `set_alpha_to_one` says, for the others without noise.
    """
    config, times = scheduler.config, timesteps(steps, scheduler.config.num_train_timesteps)
    final = scheduler.final_alpha_cumprod if solver == "ddim" else torch.tensor(1.0, device="cpu")
    alpha = torch.cat([scheduler.alphas_cumprod[times], final.reshape(1)]).double()
    clip = config.clip_sample_range if config.clip_sample else None
    return Grid(times, alpha.sqrt(), (1 - alpha).sqrt(), config.prediction_type, clip)


def flow_grid(scheduler):
    """Return the grid of a FlowMatchEulerDiscreteScheduler whose timesteps are set."""
    noise = scheduler.sigmas.cpu().double()
    return Grid(scheduler.timesteps.cpu(), 1 - noise, noise, "flow")


def step_noise(seed, j, shape):
    """Return the normal noise of the fine step from grid point j: float32, drawn on the CPU from (seed, j) alone."""
    mixed = int(np.random.SeedSequence([seed, j]).generate_state(1, np.uint64)[0])
    return normal(shape, mixed)


def boundaries(N, B):
    """Return the boundaries 0 = n_0 < ... < n_B = N of B blocks of N steps, as even as possible."""
    return [i * N // B for i in range(B + 1)]


def interpolation(N, t, points=4):
    """Return W, float64 (N, M), which interpolates values at the nodes t to all grid points, by Lagrange's polynomial
    through the nearest four (Berrut and Trefethen, 2004, eq. 2.1)."""
    points, n = min(points, len(t)), torch.arange(N, device="cpu")
    low = (torch.searchsorted(t, n, right=True) - 1 - (points - 1) // 2).clamp(0, len(t) - points)
    near = low[:, None] + torch.arange(points, device="cpu")
    at = t[near].double()
    numerators = (n[:, None] - at)[:, None].expand(-1, points, -1)
    denominators = at[:, :, None] - at[:, None]
    same = torch.eye(points, device="cpu").bool()
    factors = numerators.where(~same, 1.0) / denominators.where(~same, 1.0)
    return torch.zeros(N, len(t), dtype=torch.float64, device="cpu").scatter(1, near, factors.prod(2))


def on(x, values):
    """Return small tensors of the CPU, or a list, on the device of x, without waiting for it."""
    return torch.as_tensor(values, device="cpu").to(x.device, non_blocking=True)


class Chain(NamedTuple):
    """All steps of a solver in one equation, x_n = P_n x_0 + sum_{j < n} K_nj d_j + Z_n, with d_j = `Solver.clean`."""

    P: torch.Tensor  # float64 (N + 1,)
    K: torch.Tensor  # float64 (N + 1, N)
    Z: torch.Tensor | None  # the steps' noise as carried to each point, float32 (N + 1, ...); None for none
    K_held: torch.Tensor  # K of steps that do not extrapolate, for d that is held

    def states(self, x, n, d=None, W=None):
        """Return the states at grid points n, int64 (L,), from the first, x, and d = W d_nodes: float32 (L, E).

        x: (1, E), E numbers. d: at M nodes, (M, E); None for the part of the states that does not depend on it.
        W: float64 (N, M).
        """
        states = self.P[n, None].to(x) * x
        if self.Z is not None:
            states += self.Z[n].to(x).flatten(1)
        return states if d is None else states + (self.K[n] @ W).to(x) @ d

    def held(self, x, n, d, W):
        """Return what `states` does, for d that is constant over many steps, then another, as in `Solver.held`."""
        return self._replace(K=self.K_held).states(x, n, d, W)


class Solver:
    """A sampler as tables over a grid: `step` makes its steps and `damped` corrects them.

    Every solver writes out x0 = p x + q m, then steps with x0 held: x' = signal' x0 + carry (x - signal x0) + spread z.
    ddim: DDIM (Song, Meng and Ermon, 2021, eq. 12), for eta > 0 with noise z.
    euler: Euler's step of a flow dx / dsigma = m, which is the same table without noise.
    ddpm: ancestral sampling (Ho, Jain and Abbeel, 2020, algorithm 2) with the posterior's variance: ddim at eta = 1
        except for how x0 is clipped.
    dpmsolver++: DPM-Solver++ (2M) (Lu et al., 2022, algorithm 2): x0 is extrapolated from the step before. At the grid
        points `restarts`, where blocks begin, there is no step before, and the step is ddim's.

    A step over several points, the coarse one, does what the fine steps there would do if x0 stayed what it is at the
    first point. For eta = 0 and eta = 1 that is the solver's own long step. Its noise is that of the fine steps,
    carried to its end.

    The noise z of the fine step from point j is `step_noise(seed, j)`, drawn again each time.
    """

    def __init__(self, grid, name="ddim", eta=0.0, seed=0, restarts=()):
        self.name, self.seed, self.clip = name, seed, grid.clip
        self.grid, self.signal = grid, grid.signal
        a, b, a_next, b_next = grid.signal[:-1], grid.noise[:-1], grid.signal[1:], grid.noise[1:]
        one = torch.ones_like(a)
        self.x0_of_state, self.x0_of_output = {
            "epsilon": (1 / a, -b / a),
            "v_prediction": (a, -b),
            "sample": (0 * a, one),
            "flow": (one, -b),
        }[grid.prediction_type]

        eta = 1.0 if name == "ddpm" else eta
        self.spread = eta * b_next / b * (1 - (a / a_next) ** 2).clamp(min=0).sqrt()
        self.stochastic = bool(self.spread.any())
        kept = (b_next**2 - self.spread**2).clamp(min=0).sqrt() / b
        steps = len(a)
        # carry[i, j] = kept[i] ... kept[j - 1]: what is left at j of a deviation from signal x0 at i.
        from_here_on = torch.ones(steps + 1, steps, device="cpu").triu().bool()
        self.carry = torch.cat([one.new_ones(steps + 1, 1), kept.where(from_here_on, 1.0)], 1).cumprod(1)

        self.gain = a_next - kept * a  # of x0 in a step

        half_log_snr = (a / b).log()  # in which 2M extrapolates
        h = torch.cat([half_log_snr, (a_next / b_next)[-1:].log()]).diff()
        self.extrapolation = torch.zeros_like(a)
        if name == "dpmsolver++":
            self.extrapolation[1:] = (h[1:] / (2 * h[:-1])).where(h[1:].isfinite() & h[:-1].isfinite(), 0.0)
            self.extrapolation[[n for n in restarts if n < steps]] = 0

    def with_seed(self, seed):
        """Return the same tables with the noise of another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def step(self, x, m, start, end, past):
        """Step L states x at grid points `start`, with model outputs m, both float32 (L, ...), to those at `end`.

        start, end: int64 (L,) on the CPU, 0 to N. past: for dpmsolver++, the x0 of the steps that led to x,
        (L, ...); it has no meaning at a restart or for others. Returns the states, and `past` for the steps from there.
        """
        columns = [self.x0_of_state[start], self.x0_of_output[start], self.extrapolation[start] * (end - start == 1)]
        columns += [self.signal[start], self.signal[end], self.carry[start, end]]
        p, q, extrapolation, signal, signal_end, carry = self._on(x, *columns)
        x0 = p * x + q * m
        at_end, at_start = self._clipped(x0)
        if self.name == "dpmsolver++":
            at_end = at_start = x0 + extrapolation * (x0 - past)
        x = signal_end * at_end + carry * (x - signal * at_start)
        if self.stochastic:
            noises = [self._noise(*between, x.shape[1:]) for between in zip(start.tolist(), end.tolist())]
            x = x + torch.stack(noises).to(x.device, non_blocking=True)
        return x, x0 if self.name == "dpmsolver++" else x

    def unrolled(self, shape):
        """Return the `Chain` for states of a shape."""
        carried = (self.gain[:, None] * self.carry[1:]).T.tril(-1)
        K = carried * (1 + self.extrapolation)
        K[:, :-1] -= carried[:, 1:] * self.extrapolation[1:]
        return Chain(self.carry[0], K, self._forcing(shape), carried)

    def clean(self, x, m, n):
        """Return what steps from grid points n, int64 (L,), are linear in: x0, clipped by the solver; (L, ...)."""
        columns = self.x0_of_state[n], self.x0_of_output[n], self.signal[n + 1], self.gain[n].clamp(min=LEAST)
        p, q, signal_end, gain = self._on(x, *columns)
        x0 = p * x + q * m
        at_end, at_start = self._clipped(x0)
        if at_end is at_start:
            return at_end
        return x0 + signal_end * (at_end - x0) / gain

    def held(self, states, n):
        """Return the x0 that, held over a block, leads from its first state to its last: float32 (B, ...).

        states: at the grid points n, a list; float32 (B + 1, ...).
        """
        start, end = (torch.tensor(part, device="cpu") for part in (n[:-1], n[1:]))
        carry = self.carry[start, end]
        carry, gain = self._on(states, carry, (self.signal[end] - carry * self.signal[start]).clamp(min=LEAST))
        added = states[1:] - carry * states[:-1]
        if self.stochastic:
            noises = [self._noise(*between, states.shape[1:]) for between in pairwise(n)]
            added = added - torch.stack(noises).to(states.device)
        return added / gain

    def _forcing(self, shape):
        if not self.stochastic:
            return None
        total = [torch.zeros(shape, dtype=torch.float32, device="cpu")]
        for j, kept in enumerate(self.carry.diagonal(1).tolist()):
            total.append(kept * total[-1] + self._noise(j, j + 1, shape))
        return torch.stack(total)

    def _clipped(self, x0):
        """Return x0 as used at the end and at the start of a step."""
        if self.clip is None or self.name == "dpmsolver++":
            return x0, x0
        # In diffusers, ddim clips x0 where the step leads, but not in the noise that it finds in x.
        clipped = x0.clamp(-self.clip, self.clip)
        return clipped, clipped if self.name == "ddpm" else x0

    @staticmethod
    def _on(x, *columns):
        """Return columns of the tables, each (L,), as float32 (L, 1, ...) on the device of x, in one transfer."""
        columns = torch.stack(columns).float().to(x.device, non_blocking=True)
        return columns.reshape(*columns.shape, *[1] * (x.ndim - 1))

    def _noise(self, start, end, shape):
        """Return the noise that fine steps from one point to another add if x0 is held: float32, a state's shape."""
        total = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for j in range(start, end):
            total += float(self.spread[j] * self.carry[j + 1, end]) * step_noise(self.seed, j, shape)
        return total

    def damped(self, dU, dG, start, end):
        """Return the correction of SRDS: dG, or less if the long step overshoots.

        dU: the change of the state at grid point `start`. dG: the change of what the coarse step makes of it at `end`.

        In y = x / signal, with r = carry signal / signal', the coarse step carries a change as r dy + (1 - r) dx0. With
        dx0 = J dy and J constant, short steps carry it to r^(1 - J) dy. The two are close for 0 <= J <= 1, where
        the Jacobian of an optimal denoiser lies (it is a covariance) unless modes part. Strong guidance makes J
        negative: short steps then let a change decay, but one long step reverses and enlarges it, and refinements
        diverge. Then dx0 is scaled by the theta that makes the two equal, r + (1 - r) theta J = r^(1 - J). J is
        measured for each element and for the whole state, and the lower one counts. Nothing is withheld if J's
        negative part, its mean weighted by dy^2, is above -0.05.
        """
        if end - start == 1:
            return dG  # the coarse step is the fine one
        carry, q = float(self.carry[start, end]), float(self.signal[end] / self.signal[start])
        r = carry / q
        carried = carry * dU  # if x0 stayed the same
        rest = dG - carried
        along, size = rest * dU / (q - carry), dU * dU
        weight = size.sum() + 1e-30
        J = torch.minimum(along / (size + 1e-8 * size.mean() + 1e-30), along.sum() / weight)
        turned = along.clamp(max=0).sum() / weight
        decay = (-J).clamp(min=1e-6)
        theta = -torch.expm1(decay * math.log(max(r, 1e-30))) * r / ((1 - r) * decay)
        return torch.where((J < 0) & (turned < -0.05), carried + theta * rest, dG)


# Batches


def fixed_batch(widest, max_batch=None):
    """Return the one batch size for calls of up to `widest` network samples: the next multiple of 4, within max_batch.

    With other sizes (5, 6, 7, 9, 10, 11 on two cores), MKL gives a sample other bits at other places of the batch.
    """
    size = -(-widest // 4) * 4
    return size if max_batch is None or size <= max_batch else max_batch // 4 * 4 or max_batch


# Sampling


def normal(shape, seed):
    """Return normal numbers of a seed: float32, drawn on the CPU, whatever torch's default dtype and device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@torch.no_grad()
def sequential(x, denoise, step, points, keep=None):
    """Solve from grid point to grid point, one model call each, starting with x, (1, ...), at the first.

    Returns the states at the points `keep`, float32 (len(keep), ...); if None, at the last point.
    """
    points = list(points)
    keep = {points[-1]} if keep is None else set(keep)
    x = past = x.float()
    kept = [x] if points[0] in keep else []
    for start, end in pairwise(points):
        start, at_end = (torch.tensor([n], device="cpu") for n in (start, end))
        x, past = step(x, denoise(x, start), start, at_end, past)
        if end in keep:
            kept.append(x)
    return torch.cat(kept)
