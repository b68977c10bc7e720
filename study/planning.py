"""The plan of coarse_steps "auto": the blocks and the schedule of the least predicted time on this device."""

import math
import time

import numpy as np
import torch

from diffusion import boundaries
from settings import EXPECTED_REFINEMENTS, SCHEDULES
from srds import srds


def make_plan(sampler, settings):
    """Plan a run with `settings` by measuring a sampler of the same pipeline and fine steps.

    Returns the "blocks", the "schedule", the "refinements" expected, seconds a prompt of "srds" and "sequential"
    sampling, and the measured "calls", seconds by lanes.
    """
    N = settings.fine_steps
    # Fewer blocks than this refine badly; more only widen the ticks.
    candidates = {min(N, max(1, round(factor * math.sqrt(N)))) for factor in (0.7, 1, 1.4, 2)}
    calls, decoding = measure_calls(sampler, max(candidates))
    plans = []
    for B in candidates:
        bound = settings.max_iterations
        refinements = min(B if settings.tolerance == 0 else EXPECTED_REFINEMENTS, bound or B, B)
        for schedule in [settings.schedule] if settings.schedule else SCHEDULES:
            seconds = predict_seconds(calls, decoding, N, B, schedule, refinements, bound)
            plans.append((seconds, B, schedule, refinements))
    seconds, B, schedule, refinements = min(plans)
    return {
        "blocks": B,
        "schedule": schedule,
        "refinements": refinements,
        "srds": seconds,
        "sequential": N * calls[1] + decoding,
        "calls": calls,
    }


def describe_plan(plan):
    """A plan in one line."""
    verdict = (
        "" if plan["srds"] < plan["sequential"] else "; SRDS is not faster than sequential sampling on this device"
    )
    return (
        f"plan: {plan['blocks']} blocks, {plan['schedule']}: about {plan['srds']:.2f} s a prompt "
        f"for {plan['refinements']} refinements, sequential {plan['sequential']:.2f} s{verdict}"
    )


def measure_calls(sampler, widest):
    """Seconds of a tick by its lanes, {1: ..., 2: ..., ..., widest: ...}, and of a decoding; the median of five."""
    denoise, x = sampler.processes.split(sampler.denoiser("")), sampler.noise()

    def seconds(call, *inputs):
        call(*inputs)
        return float(np.median([clock(call, x.device, *inputs) for _ in range(5)]))

    lanes = sorted({widest, *(L for i in range(12) for L in (2**i, 3 * 2**i) if L < widest)})
    calls = {L: seconds(denoise, x.expand(L, -1, -1, -1), torch.zeros(L, dtype=int)) for L in lanes}
    return calls, seconds(sampler.image, x)


def clock(call, device, *inputs):
    """Seconds of a call, until the device has done what it asks for."""

    def wait():
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize()

    wait()
    started = time.perf_counter()
    call(*inputs)
    wait()
    return time.perf_counter() - started


def predict_seconds(calls, decoding, N, B, schedule, refinements, bound=None):
    """Seconds of a run that stops after so many refinements, from `measure_calls`."""
    ticks = np.interp(tick_widths(N, B, schedule, refinements, bound), list(calls), list(calls.values()))
    return float(ticks.sum()) + (refinements + 1) * decoding


def tick_widths(N, B, schedule, refinements, bound=None):
    """Lanes in each tick of a run that stops after so many refinements: the engine's own, on states of one number."""
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
