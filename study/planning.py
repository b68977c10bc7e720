"""The plan for `-cs auto`: the blocks and the schedule with the least predicted time on this device."""

import itertools
import math
import time

import numpy as np
import torch

from diffusion import boundaries
from settings import SCHEDULES
from srds import srds


def make_plan(sampler, settings, expected):
    """Plan sampling with `settings` by measuring a sampler with the same pipeline and fine steps.

    expected: the number of refinements that samples are expected to need.

    Returns a dict with "blocks", "schedule", the "refinements" planned for, the predicted seconds for a sample by
    "srds" and by "sequential" sampling, and the measured "calls": seconds by number of lanes.
    """
    N, bound = sampler.boundaries[-1], settings.max_iterations  # strength may leave fewer than the fine steps
    # Fewer blocks than these converge badly; more only widen the ticks.
    candidates = {min(N, max(1, round(factor * math.sqrt(N)))) for factor in (0.7, 1, 1.4, 2)}
    calls, decoding = measure_calls(sampler, max(candidates))
    plans = []
    for B, schedule in itertools.product(candidates, [settings.schedule] if settings.schedule else SCHEDULES):
        refinements = min(B if settings.tolerance == 0 else expected, bound or B, B)
        seconds = predict_seconds(calls, decoding, N, B, schedule, refinements, bound)
        plans.append({"srds": seconds, "blocks": B, "schedule": schedule, "refinements": refinements})
    plan = min(plans, key=lambda plan: [*plan.values()])
    return {**plan, "sequential": N * calls[1] + decoding, "calls": calls}


def describe_plan(plan):
    """Return a plan in one line."""
    costs = f"about {plan['srds']:.2f} s a sample for {plan['refinements']} refinements"
    slower = "; sequential sampling is faster on this device" if plan["srds"] >= plan["sequential"] else ""
    return f"plan: {plan['blocks']} blocks, {plan['schedule']}: {costs}, sequential {plan['sequential']:.2f} s{slower}"


def measure_calls(sampler, widest):
    """Return the seconds of a tick by its number of lanes, {1: ..., widest: ...}, and of decoding; medians of five."""
    denoise, x = sampler.processes.split(sampler.loop("").denoise), sampler.noise()

    def seconds(call, *inputs):
        _, *measured = [clock(call, x.device, *inputs) for _ in range(6)]  # the first call is slower
        return float(np.median(measured))

    lanes = sorted({widest, *(L for i in range(12) for L in (2**i, 3 * 2**i) if L < widest)})
    calls = {L: seconds(denoise, x.expand(L, *x.shape[1:]), torch.zeros(L, dtype=int)) for L in lanes}
    return calls, seconds(sampler.image, x)


def clock(call, device, *inputs):
    """Return the seconds of a call until the device has finished."""
    wait = torch.accelerator.synchronize if torch.device(device).type != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    call(*inputs)
    wait()
    return time.perf_counter() - started


def predict_seconds(calls, decoding, N, B, schedule, refinements, bound=None):
    """Return the seconds of a sample that stops after so many refinements, from what `measure_calls` returns."""
    ticks = np.interp(tick_widths(N, B, schedule, refinements, bound), list(calls), list(calls.values()))
    return float(ticks.sum()) + (refinements + 1) * decoding


def tick_widths(N, B, schedule, refinements, bound=None):
    """Return the lanes in each tick of a sample that stops after so many refinements, as the engine has them."""
    widths = []

    def denoise(x, n):
        widths.append(len(x))
        return x

    step = lambda x, m, start, end, past: (x, past)
    iterates = srds(torch.zeros(1, 1, 1), denoise, step, boundaries(N, B), schedule, bound)
    next((iterate for iterate in iterates if iterate.k == refinements), None)  # there is none if k = 0 is exact
    return widths
