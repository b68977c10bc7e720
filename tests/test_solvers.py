"""Solvers: orders of convergence, parity with diffusers' schedulers, refinements of each."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm

import diffusion
from conftest import Gaussian, Mixture
from diffusion import boundaries
from pipelines import SD
from refinement import Trajectory
from settings import SCHEDULES
from srds import srds

KINDS = {
    "ddim": {},
    "ddim, eta = 0.5": {"eta": 0.5},
    "ddpm": {"solver": "ddpm"},
    "dpmsolver++": {"solver": "dpmsolver++"},
    "euler": {"solver": "euler", "prediction_type": "flow"},
    "dpmsolver++ of a flow": {"solver": "dpmsolver++", "prediction_type": "flow"},
}


@pytest.mark.parametrize("kind, order", [("ddim", 1), ("euler", 1), ("dpmsolver++", 2), ("dpmsolver++ of a flow", 2)])
def test_order_of_convergence_within_a_block(kind, order, noise):
    """Against the ODE's solution at half the timesteps; from 40 to 320 steps, the error falls by 2^order a doubling."""
    errors = []
    for N in (40, 80, 160, 320):
        problem = Gaussian(N, **KINDS[kind])
        end = diffusion.sequential(noise.double(), problem.denoise, problem.step, range(N // 2 + 1))
        errors.append((end - problem.solution(noise, N // 2)).abs().max().item())
    ratios = [before / after for before, after in zip(errors, errors[1:])]
    assert all(0.75 * 2**order < ratio < 1.3 * 2**order for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_leads_along_a_trajectory_by_what_each_block_held(kind, noise):
    """Also where blocks are uneven, and from there to a chain of twice the steps, up to what its noise is."""
    n = [0, 4, 11, 12, 31]
    problem = Mixture(31, seed=3, restarts=n, **KINDS[kind])
    states = problem.sequential(noise, keep=n)
    start = Trajectory(problem.solver.held(states, n), n)
    x, d = noise.flatten(1), start.clean.flatten(1)
    led = problem.solver.unrolled(noise.shape[1:]).held(x, torch.tensor(n), d, start.weights(31))
    torch.testing.assert_close(led.reshape(states.shape), states, atol=1e-5, rtol=1e-4)
    if not problem.solver.stochastic:
        finer = Mixture(62, **KINDS[kind]).solver.unrolled(noise.shape[1:])
        led = finer.held(x, 2 * torch.tensor(n), d, start.weights(62))
        torch.testing.assert_close(led[-1], states[-1].flatten(), atol=0.1, rtol=0.1)


SCHEDULERS = {"ddpm": DDPMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


def by_diffusers(scheduler, x, denoise, kind, seed, monkeypatch):
    """The sample of a scheduler of diffusers; denoise(x, j) is the output of step j, whose noise is our own."""
    eta = KINDS[kind].get("eta", 0)
    for j, t in enumerate(scheduler.timesteps):
        drawn = diffusion.step_noise(seed, j, x.shape[1:])[None]
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, drawn=drawn, **kwargs: drawn)
        more = {"eta": eta, "variance_noise": drawn if eta else None} if "ddim" in kind else {}
        x = scheduler.step(denoise(x, torch.tensor([j])), t, x, **more).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of a scheduler of diffusers
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["ddim", "ddim, eta = 0.5", "ddpm", "dpmsolver++"])
def test_a_solver_is_diffusers_scheduler(kind, prediction_type, noise, monkeypatch):
    """On grids that divide the chain; with the same noise, and without restarts."""
    problem = Mixture(20, prediction_type, seed=3, **KINDS[kind])
    settings = {**SD, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    settings |= {} if kind == "dpmsolver++" else {"clip_sample": False}
    scheduler = SCHEDULERS.get(kind, DDIMScheduler)(**settings)
    scheduler.set_timesteps(20)
    assert torch.equal(scheduler.timesteps, problem.grid.times)
    theirs = by_diffusers(scheduler, noise, problem.denoise, kind, 3, monkeypatch)
    torch.testing.assert_close(problem.sequential(noise), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ddim", "ddim, eta = 0.5", "ddpm"])
def test_pixels_are_clipped_as_diffusers_clips_them(kind, noise, monkeypatch):
    """Data beyond the range, so that every step clips."""
    scheduler = SCHEDULERS.get(kind, DDIMScheduler)(**SD, timestep_spacing="trailing")
    solver, eta = KINDS[kind].get("solver", "ddim"), KINDS[kind].get("eta", 0.0)
    grid = diffusion.diffusion_grid(DDIMScheduler(**SD), 10, solver)
    assert scheduler.config.clip_sample and grid.clip == 1
    scheduler.set_timesteps(10)
    denoise = lambda x, n: (x - grid.signal[n].float() * 1.5) / grid.noise[n].float()
    ours = diffusion.sequential(noise, denoise, diffusion.Solver(grid, solver, eta).step, range(11))
    theirs = by_diffusers(scheduler, noise, denoise, kind, 0, monkeypatch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of a scheduler of diffusers
@pytest.mark.parametrize(
    "shift", [{"shift": 3.0}, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}]
)
@pytest.mark.parametrize("solver", ["euler", "dpmsolver++"])
def test_a_flows_solver_is_diffusers_scheduler(solver, shift, noise, monkeypatch):
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(**shift)
        scheduler.set_timesteps(20, mu=0.6)
        grid = diffusion.flow_grid(scheduler)
    else:
        scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        scheduler.set_timesteps(20)
        sigmas = scheduler.sigmas.double()
        grid = diffusion.Grid(scheduler.timesteps, 1 - sigmas, sigmas, "flow")
    ours = diffusion.sequential(noise, lambda x, n: x.sin(), diffusion.Solver(grid, solver).step, range(21))
    theirs = by_diffusers(scheduler, noise, lambda x, n: x.sin(), solver, 0, monkeypatch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_snr", [{}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}])
def test_first_k_boundaries_are_exact_after_k_iterations_at_zero_terminal_snr_too(zero_snr, kind, schedule, noise):
    """There the first step starts from noise alone, where the tables divide by the signal."""
    if zero_snr and "prediction_type" in KINDS[kind]:
        pytest.skip("a flow has no terminal SNR but zero")
    n, settings = boundaries(31, 6), {**KINDS[kind], **zero_snr, "zero_snr": bool(zero_snr)}
    problem, errors = Mixture(31, restarts=n, seed=5, **settings), []
    truth = problem.sequential(noise, keep=n)
    for iterate in srds(noise, problem.denoise, problem.step, n, schedule, correct=problem.solver.damped):
        assert torch.equal(iterate.states[: iterate.k + 1], truth[: iterate.k + 1])
        errors.append((iterate.states - truth).abs().mean().item())
    assert iterate.exact and torch.equal(iterate.states, truth) and errors[2] < 0.5 * errors[0], errors
    assert (problem.grid.signal[0] == 0) == bool(zero_snr or problem.grid.prediction_type == "flow")
    assert (truth[-1].abs() - 1).abs().median() < 0.05, "it does not end at the data"


@pytest.mark.parametrize("kind", ["ddim, eta = 0.5", "ddpm"])
def test_coarse_noise_is_what_the_fine_steps_add_with_x0_held(kind, noise):
    """A denoiser that always says the same: the coarse step then lands where the fine ones do."""
    problem = Mixture(40, "sample", seed=9, **KINDS[kind])
    for start, end in ((0, 10), (10, 40), (33, 34)):
        x, x0 = noise, noise.flip(-1)
        for j in range(start, end):
            x, _ = problem.step(x, x0, torch.tensor([j]), torch.tensor([j + 1]), x)
        coarse, _ = problem.step(noise, x0, torch.tensor([start]), torch.tensor([end]), noise)
        torch.testing.assert_close(coarse, x, atol=1e-5, rtol=1e-5)


def test_noise_is_of_the_seed_and_the_step_alone():
    shape, steps = (4, 8, 16), ((1, 0), (0, 1), (1, 0), (2**64 - 1, 999))
    draws = [diffusion.step_noise(seed, j, shape) for seed, j in steps]
    assert torch.equal(draws[0], draws[2]) and draws[0].dtype == torch.float32
    different = [draws[0], draws[1], draws[3]]
    assert all((one - other).abs().mean() > 0.5 for one, other in itertools.combinations(different, 2))
    torch.testing.assert_close(diffusion.step_noise(0, 0, (100000,)).var(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_a_last_step_that_does_nothing_leaves_numbers(noise):
    """As of Stable Diffusion, which ends at the noise of timestep 0, where N is so large that it is reached."""
    scheduler = DDIMScheduler(**SD, set_alpha_to_one=False)
    solver = diffusion.Solver(diffusion.diffusion_grid(scheduler, 700)._replace(clip=1.0))
    assert solver.gain[-1] == 0
    states = noise.expand(3, -1, -1, -1)
    assert solver.held(states, [698, 699, 700]).isfinite().all()
    assert solver.clean(2 * noise, noise, torch.tensor([699])).isfinite().all()
