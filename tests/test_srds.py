"""The method: theory, exactness, counts."""

import gc

import pytest
import torch

from conftest import Gaussian, Mixture, Stiff
from diffusion import boundaries, normal
from examples import own_denoiser
from settings import SCHEDULES
from srds import algorithm_1, rehearsal, srds


def counted(N, B, schedule, refinements=None):
    """The iterates of a run, with the lane-steps of each tick as the denoiser saw them."""
    widths, seen, problem = [], [], Mixture(N)

    def denoise(x, n):
        assert x.shape == (len(n), 4, 8, 8) and n.dtype == torch.int64 and x.dtype == torch.float32
        widths.append(len(x))
        return problem.denoise(x, n)

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for iterate in srds(x, denoise, problem.step, boundaries(N, B), schedule, refinements):
        assert (iterate.ticks, iterate.lane_steps) == (len(widths), sum(widths)) and not iterate.all_nodes
        seen.append(iterate)
    assert seen[-1].ticks == len(widths), "no call after the last iterate"
    return seen, widths


@pytest.mark.parametrize(
    "N, B, schedule, ticks, lane_steps, widest",
    [
        (25, 5, "pipelined", [5, 9, 13, 17, 21, 25], [15, 35, 51, 63, 71, 75], 5),
        (25, 5, "sweep", [5, 13, 20, 26, 31], [5, 29, 48, 62, 71], 5),
        (100, 10, "pipelined", [10, 19, 28, 37, 46], [55, 145, 226, 298, 361], 10),
        (100, 10, "sweep", [10, 28, 45, 61, 76], [10, 109, 198, 277, 346], 10),
        (97, 10, "pipelined", [10, 19, 28, 37, 46], [55, 143, 222, 293, 355], 10),
        (196, 14, "pipelined", [14, 27, 40, 53, 66], [105, 287, 456, 612, 755], 14),
        (961, 31, "pipelined", [31, 61, 91, 121, 151], [496, 1426, 2326, 3196, 4036], 31),
        (10, 1, "pipelined", [1, 10], [1, 10], 1),
    ],
)
def test_ticks_lane_steps_and_widest_tick(N, B, schedule, ticks, lane_steps, widest):
    seen, widths = counted(N, B, schedule)
    assert [iterate.ticks for iterate in seen[: len(ticks)]] == ticks
    assert [iterate.lane_steps for iterate in seen[: len(lane_steps)]] == lane_steps
    assert max(widths) == widest
    assert [iterate.k for iterate in seen] == list(range(B + 1))
    counts = lambda iterates: [(iterate.k, iterate.ticks, iterate.lane_steps, iterate.exact) for iterate in iterates]
    assert counts(rehearsal(boundaries(N, B), schedule)) == counts(seen), "they are known without the network"


def test_a_bound_saves_lane_steps_and_keeps_ticks():
    seen, _ = counted(100, 10, "pipelined", refinements=2)
    assert [(iterate.ticks, iterate.lane_steps) for iterate in seen] == [(10, 55), (19, 145), (28, 198)]
    assert not seen[-1].exact
    swept, _ = counted(100, 10, "sweep", refinements=2)
    assert swept[-1].lane_steps == 198
    assert torch.allclose(swept[-1].states, seen[-1].states)
    assert counted(100, 10, "pipelined", refinements=99)[0][-1].exact


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("N, B", [(25, 5), (97, 10), (15, 10), (40, 20), (6, 1), (10, 10), (1, 1)])
def test_first_k_boundaries_are_exact_after_k_iterations_whatever_the_correction(N, B, schedule, noise):
    problem, n = Mixture(N), boundaries(N, B)
    truth = problem.sequential(noise, keep=n)
    for correct in (algorithm_1, problem.solver.damped, lambda dU, dG, start, end: -dU):
        for iterate in srds(noise, problem.denoise, problem.step, n, schedule, correct=correct):
            assert iterate.states.shape == (B + 1, 4, 8, 8) and iterate.states.dtype == torch.float32
            assert torch.equal(iterate.states[: iterate.k + 1], truth[: iterate.k + 1])
            assert iterate.exact == (iterate.k == B or N == B)
        assert torch.equal(iterate.states, truth)
        assert (iterate.k, iterate.ticks, iterate.lane_steps) == (0, N, N) if N == B else iterate.k == B


def test_damping_is_what_was_withheld_against_the_state(noise):
    problem, n = Mixture(20), boundaries(20, 4)
    withheld = {n[1]: 0.25, n[2]: 0.75, n[3]: 0.5}
    correct = lambda dU, dG, start, end: dG - withheld[start]
    for iterate in srds(noise, problem.denoise, problem.step, n, correct=correct):
        sizes = [withheld[n[i]] * noise.numel() ** 0.5 / iterate.states[i + 1].norm() for i in range(iterate.k or 4, 4)]
        assert iterate.damping.item() == pytest.approx(float(max(sizes, default=0)), rel=1e-4)
    plain = srds(noise, problem.denoise, problem.step, n)
    assert [iterate.damping.item() for iterate in plain] == [0] * 5


@pytest.mark.parametrize("N, B", [(25, 5), (100, 10)])
def test_damped_refinements_of_a_stiff_problem_do_not_diverge(N, B, noise):
    problem, n = Stiff(N), boundaries(N, B)
    truth = problem.sequential(noise, keep=n)

    def errors(correct):
        iterates = srds(noise, problem.denoise, problem.step, n, correct=correct)
        return [(iterate.states - truth).norm().item() for iterate in iterates]

    paper, damped = errors(algorithm_1), errors(problem.solver.damped)
    assert max(paper) > 1.3 * paper[0] and damped[1] < 0.1 * damped[0] and damped[2] < 0.1 * damped[1], (paper, damped)


def test_refinements_follow_algorithm_1(noise):
    """Against the recurrence written as the paper writes it, a block at a time."""
    N, B, problem = 23, 5, Mixture(23)
    n = boundaries(N, B)

    def F(i, x):
        for j in range(n[i], n[i + 1]):
            at = torch.tensor([j])
            x, _ = problem.step(x, problem.denoise(x, at), at, at + 1, x)
        return x

    def G(i, x):
        start, end = torch.tensor([n[i]]), torch.tensor([n[i + 1]])
        return problem.step(x, problem.denoise(x, start), start, end, x)[0]

    U = [noise]
    for i in range(B):
        U.append(G(i, U[i]))
    for both in zip(*(srds(noise, problem.denoise, problem.step, n, schedule) for schedule in SCHEDULES), strict=True):
        if both[0].k:
            new = [noise]
            for i in range(B):
                new.append(F(i, U[i]) + (G(i, new[i]) - G(i, U[i])))
            U = new
        for iterate in both:
            torch.testing.assert_close(iterate.states, torch.cat(U), atol=1e-5, rtol=0)


def test_error_decreases_superlinearly(noise):
    problem = Gaussian(100)
    truth = problem.sequential(noise)
    iterates = srds(noise, problem.denoise, problem.step, boundaries(100, 10), refinements=3)
    errors = [(iterate.states[-1] - truth).abs().max().item() for iterate in iterates]
    rates = [after / before for before, after in zip(errors, errors[1:])]
    assert rates[0] < 0.5 and rates[1] < 0.7 * rates[0] and rates[2] < 0.9 * rates[1], errors


def test_memory_does_not_grow_with_the_steps(noise):
    """Between ticks, the engine's live latents are those of two iterations in flight, whatever N is."""

    def most_alive(N, B):
        gc.collect()
        gc.freeze()  # what is alive by now is not looked at
        problem, alive = Gaussian(N), []

        def denoise(x, n):
            tensors = [tensor for tensor in gc.get_objects() if type(tensor) is torch.Tensor]
            latents = [tensor.untyped_storage() for tensor in tensors if tensor.shape[-3:] == (4, 8, 8)]
            storages = {storage.data_ptr(): storage.nbytes() for storage in latents}
            alive.append(sum(storages.values()) // noise.untyped_storage().nbytes())
            return problem.denoise(x, n)

        for _ in srds(noise, denoise, problem.step, boundaries(N, B), refinements=4):
            pass
        gc.unfreeze()
        return max(alive)

    short, long = most_alive(40, 5), most_alive(160, 5)
    assert 5 < short < 40 and long <= short + 2, (short, long)
    assert most_alive(100, 20) < 150  # 67 boundary states of 5 iterations, and their F, G and lanes


# The example of a denoiser of one's own


def test_the_examples_denoiser_has_the_exact_score_of_its_mixture():
    """Tweedie: E[x0 | x] = (x + noise^2 grad log p(x)) / signal."""
    n, x = torch.tensor([3, 40]), normal((2, own_denoiser.DIMENSIONS), 1).double().requires_grad_()
    signal, noise = own_denoiser.GRID.signal[n, None], own_denoiser.GRID.noise[n, None]
    variance = signal**2 * own_denoiser.SPREAD**2 + noise**2
    away = (x[:, None] - signal[..., None] * own_denoiser.MEANS).square().sum(2)
    score = torch.autograd.grad((-away / (2 * variance)).logsumexp(1).sum(), x)[0]
    expected = ((x + noise**2 * score) / signal).float()
    torch.testing.assert_close(own_denoiser.denoise(x.detach().float(), n), expected, atol=1e-4, rtol=1e-4)


def test_the_example_converges_within_the_bound_that_it_plots(tmp_path):
    samples = [own_denoiser.errors(normal((1, own_denoiser.DIMENSIONS), seed)) for seed in (0, 1)]
    for refined, theory, collocated in samples:
        far = refined[:, 1]
        assert (far <= theory + own_denoiser.ROUNDING).all() and theory[-1] == 0 == far[-1].round(decimals=5)
        assert (theory[:3] < 10 * far[:3]).all(), "and it is no empty bound"
        assert collocated[-1, 1] < 1e-3 < collocated[0, 1] and collocated[-1, 0] < own_denoiser.N / 2
    own_denoiser.plot(samples, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    iterate = own_denoiser.stopped(normal((1, own_denoiser.DIMENSIONS), 0))
    assert 0 < iterate.k < own_denoiser.B and samples[0][0][iterate.k, 1] < 1e-3, "its own rule has left the loop"
