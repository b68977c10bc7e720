"""The plan for `-cs auto`: the blocks and the schedule with the least predicted time on this device."""

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
    N = settings.fine_steps
    # Fewer blocks than these converge badly; more only widen the ticks.
    candidates = {min(N, max(1, round(factor * math.sqrt(N)))) for factor in (0.7, 1, 1.4, 2)}
    calls, decoding = measure_calls(sampler, max(candidates))
    plans = []
    for B in candidates:
        bound = settings.max_iterations
        refinements = min(B if settings.tolerance == 0 else expected, bound or B, B)
        for schedule in [settings.schedule] if settings.schedule else SCHEDULES:
            seconds = predict_seconds(calls, decoding, N, B, schedule, refinements, bound)
            plans.append((seconds, B, schedule, refinements))
    seconds, B, schedule, refinements = min(plans)
    plan = {"blocks": B, "schedule": schedule, "refinements": refinements, "srds": seconds}
    return {**plan, "sequential": N * calls[1] + decoding, "calls": calls}


def describe_plan(plan):
    """Return a plan in one line."""
    slower = plan["srds"] >= plan["sequential"]
    verdict = "; sequential sampling is faster on this device" if slower else ""
    costs = f"about {plan['srds']:.2f} s a sample for {plan['refinements']} refinements"
    return f"plan: {plan['blocks']} blocks, {plan['schedule']}: {costs}, sequential {plan['sequential']:.2f} s{verdict}"


def measure_calls(sampler, widest):
    """Return the seconds of a tick by its number of lanes, {1: ..., widest: ...}, and of decoding; medians of five."""
    denoise, x = sampler.processes.split(sampler.denoiser("")), sampler.noise()

    def seconds(call, *inputs):
        call(*inputs)
        return float(np.median([clock(call, x.device, *inputs) for _ in range(5)]))

    lanes = sorted({widest, *(L for i in range(12) for L in (2**i, 3 * 2**i) if L < widest)})
    calls = {L: seconds(denoise, x.expand(L, -1, -1, -1), torch.zeros(L, dtype=int)) for L in lanes}
    return calls, seconds(sampler.image, x)


def clock(call, device, *inputs):
    """Return the seconds of a call until the device has finished."""

    def wait():
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize()

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

    def step(x, m, start, end, past):
        return x, past

    for iterate in srds(torch.zeros(1, 1, 1), denoise, step, boundaries(N, B), schedule, bound):
        if iterate.k >= refinements:
            break
    return widths
