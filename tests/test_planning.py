"""The plan of blocks and schedule."""

from unittest.mock import Mock

import pytest
import torch

from pipelines import stable_diffusion
from sampler import Sampler
from settings import Settings
from srds import srds
from study import planning


@pytest.mark.parametrize(
    "seconds_of_lanes, settings, expected",
    [
        (lambda widest: {1: 1.0, widest: 1.0}, {}, [20, "pipelined", 3, 32, 100]),  # the fewest ticks win
        (lambda widest: {1: 1.0, widest: 1.0}, {"schedule": "sweep"}, [10, "sweep", 3, 61, 100]),
        (lambda widest: {1: 1.0, widest: 1.0}, {"max_iterations": 1}, [10, "pipelined", 1, 19, 100]),
        (lambda widest: {1: 1.0, widest: float(widest)}, {}, None),  # the fewest lane-steps win
    ],
)
def test_the_plan_is_the_cheapest_sum_over_ticks(seconds_of_lanes, settings, expected, monkeypatch):
    monkeypatch.setattr(planning, "measure_calls", lambda sampler, widest: (seconds_of_lanes(widest), 0.0))
    plan = planning.make_plan(Mock(boundaries=[0, 100]), Settings(fine_steps=100, **settings), expected=3)
    if expected:
        assert [plan[key] for key in ("blocks", "schedule", "refinements", "srds", "sequential")] == expected
        assert "faster" not in planning.describe_plan(plan)
    else:
        assert plan["schedule"] == "sweep" and plan["srds"] > plan["sequential"]
        assert planning.describe_plan(plan).endswith("; sequential sampling is faster on this device")


@pytest.mark.parametrize("schedule, bound", [("pipelined", None), ("sweep", None), ("pipelined", 2)])
def test_widths_of_a_plan_are_the_engines(schedule, bound):
    widths, boundaries = [], [0, 3, 6, 10]
    denoise = lambda x, n: widths.append(len(x)) or x
    iterates = srds(torch.randn(1, 4, 8, 8), denoise, lambda x, m, *rest: (x, x), boundaries, schedule, bound)
    assert [next(iterates).k for _ in range(3)] == [0, 1, 2]
    assert planning.tick_widths(10, 3, schedule, 2, bound) == widths


def test_calls_of_every_width_are_measured_or_between_measured_ones():
    sampler = Sampler(stable_diffusion(), Settings(fine_steps=16, coarse_steps=1))
    calls, decoding = planning.measure_calls(sampler, 7)
    assert list(calls) == [1, 2, 3, 4, 6, 7] and min(calls.values()) > 0 and decoding > 0
    one, three = (planning.predict_seconds({1: 1.0, 9: 9.0}, 0.5, 9, B, "sweep", 0) for B in (1, 3))
    assert (one, three) == (1.5, 3.5)
