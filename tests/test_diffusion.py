"""The sampler's arithmetic: the grid, the step, the correction, batches."""

import pytest
import torch
from diffusers import DDIMScheduler

import diffusion
from conftest import Gaussian, Mixture, Stiff


def test_grid_has_exactly_as_many_falling_timesteps_as_steps():
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1001):
        times = diffusion.timesteps(steps, 1000)
        assert len(times) == steps and times[0] == 999 and times[-1] >= 0 and (times.diff() < 0).all()
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) == steps:
            assert torch.equal(times, scheduler.timesteps)


def test_step_of_many_lanes_is_the_step_of_each_to_the_bit(noise):
    problem = Mixture(50)
    x, m = torch.randn(2, 7, 4, 8, 8)
    start, end = torch.arange(7), torch.tensor([1, 50, 3, 9, 20, 6, 49])
    together, _ = problem.step(x, m, start, end, x)
    for j in range(7):
        alone, _ = problem.step(x[j : j + 1], m[j : j + 1], start[j : j + 1], end[j : j + 1], x[j : j + 1])
        assert torch.equal(together[j : j + 1], alone)


def test_the_correction_is_the_papers_where_the_denoiser_is_an_optimal_one(noise):
    """For Gaussian data, 0 <= d x0 / dy <= 1: nothing is withheld."""
    problem, other = Gaussian(50), noise.flip(-1)
    for n, end in ((0, 7), (7, 20), (30, 49), (43, 50)):
        at = torch.tensor([n, n])
        x = torch.cat([noise, other])
        (new, old), _ = problem.step(x, problem.denoise(x, at), at, torch.tensor([end, end]), x)
        assert torch.equal(problem.solver.damped(noise[0] - other[0], new - old, n, end), new - old)


def test_what_overshoots_is_carried_as_the_ode_carries_it(noise):
    """x0 = -3 y, of which the solution is y' = r^4 y with r the ratio of noise to signal at the ends."""
    problem = Stiff(50)
    signal, ratio = problem.grid.signal, problem.grid.noise / problem.grid.signal
    for n, end in ((0, 10), (10, 20), (30, 49)):
        start = torch.tensor([n])
        coarse, _ = problem.step(noise, problem.denoise(noise, start), start, torch.tensor([end]), noise)
        exact = (signal[end] / signal[n] * (ratio[end] / ratio[n]) ** 4 * noise).float()
        torch.testing.assert_close(problem.solver.damped(noise, coarse, n, end), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "widest, max_batch, size", [(10, None, 12), (10, 8, 8), (10, 6, 4), (10, 1, 1), (5, None, 8), (4, None, 4)]
)
def test_a_fixed_batch_is_a_multiple_of_four_where_it_can_be(widest, max_batch, size):
    assert diffusion.fixed_batch(widest, max_batch) == size


def test_blocks_are_as_even_as_can_be():
    for N, B in ((25, 5), (97, 10), (7, 7), (5, 1)):
        n = torch.tensor(diffusion.boundaries(N, B))
        assert n[0] == 0 and n[-1] == N and len(n) == B + 1 and n.diff().max() - n.diff().min() <= 1


def test_another_seed_shares_the_tables(noise):
    solver, at = Mixture(10, solver="ddpm", seed=1).solver, torch.tensor([3])
    other = solver.with_seed(2)
    assert other.carry is solver.carry and (solver.seed, other.seed) == (1, 2)
    steps = [each.step(noise, noise, at, at + 1, noise)[0] for each in (solver, other, solver.with_seed(1))]
    assert torch.equal(steps[0], steps[2]) and not torch.equal(steps[0], steps[1])
