"""Collocated refinement: theory, its limit, counts."""

import math

import pytest
import torch
from test_solvers import KINDS

import collocation as method
from collocation import collocation, spread, usual_window
from conftest import Gaussian, Mixture, Stiff
from diffusion import boundaries, interpolation

EXACT = 0.02  # grey levels of the images' 255, on the exact problems below


def grey(states, truth):
    """Mean absolute difference of the last states, on the images' scale."""
    return 127.5 * float((states - truth)[-1].abs().mean())


@pytest.mark.parametrize("N", [1, 2, 5, 31, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", [Gaussian, Mixture])
def test_the_last_refinement_is_the_sequential_sample(problem, kind, N, noise):
    if problem is Mixture and (kind, N) in (("ddpm", 31), ("ddpm", 100), ("ddim, eta = 0.5", 31)):
        pytest.skip("takes more than N ticks; see the test of that")
    problem, n = problem(N, seed=5, **KINDS[kind]), boundaries(N, min(N, 6))
    *_, last = collocation(noise, problem.denoise, problem.solver, n)
    assert last.all_nodes and not last.exact and last.settled and last.states.shape == (len(n), 4, 8, 8)
    assert last.ticks <= N
    assert grey(last.states, problem.sequential(noise, keep=n)) < EXACT


@pytest.mark.parametrize("kind", ["ddim", "ddim, eta = 0.5", "ddpm"])
def test_the_last_refinement_of_clipped_pixels_is_the_sequential_sample(kind, noise):
    """Data beyond the range, so that clipping is at work all along."""
    problem = Mixture(40, "v_prediction", zero_snr=True, seed=5, **KINDS[kind])
    problem.solver = type(problem.solver)(problem.grid._replace(clip=0.9), problem.solver.name, seed=5)
    problem.step = problem.solver.step
    truth = problem.sequential(noise)
    assert (truth - Mixture(40, "v_prediction", zero_snr=True, seed=5).sequential(noise)).abs().mean() > 0.01
    *_, last = collocation(noise, problem.denoise, problem.solver, [0, 40], nodes=40)
    assert last.all_nodes and grey(last.states, truth) < EXACT


@pytest.mark.parametrize("problem, count", [(Gaussian, 5), (Stiff, 3)])
def test_refinements_come_closer(problem, count, noise):
    problem = problem(100)
    truth = problem.sequential(noise)
    iterates = collocation(noise, problem.denoise, problem.solver, [0, 100], nodes=13)
    errors = [grey(each.states, truth) for each in iterates]
    assert len(errors) == count and errors[0] < 1 and errors[1] < 0.5 * errors[0] and errors[-1] < EXACT, errors


def test_where_d_is_rough_the_grid_short_or_a_refinement_changed_much_nodes_become_dense(noise):
    doubtful = Mixture(100, seed=5, **KINDS["dpmsolver++ of a flow"])
    cases = (Gaussian(100), None, 5), (Stiff(100), None, 1), (Mixture(26), None, 1), (doubtful, 13, 3)
    for problem, nodes, count in cases:
        iterates = list(collocation(noise, problem.denoise, problem.solver, [0, len(problem.points) - 1], nodes))
        assert len(iterates) == count and iterates[-1].all_nodes
        assert grey(iterates[-1].states, problem.sequential(noise)) < EXACT


def test_dense_nodes_are_a_hundred_or_all_and_fewer_go_into_a_tick(noise):
    for N, M, most in ((25, 25, 3), (200, 200, 8), (401, 100, 5)):
        problem, widths = Gaussian(N), []
        denoise = lambda x, n, problem=problem, widths=widths: widths.append(len(x)) or problem.denoise(x, n)
        iterates = collocation(noise, denoise, problem.solver, [0, N], dense=True)
        first = next(iterates)
        assert first.all_nodes == (M == N) and max(widths) == most == usual_window(M, narrow=True)
        assert grey(first.states, problem.sequential(noise)) < method.DENSELY_MOVED
        if M < N:
            next(iterates)
            assert max(widths) == M - 1, "one node in each interval"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [None, 50])
def test_from_a_good_start_few_ticks_are_left_and_from_a_bad_one_the_limit_is_the_same(nodes, kind, noise):
    """Where d is rough, as of ddpm, all grid points then become nodes after the first tick."""
    problem, n = Mixture(50, seed=5, **KINDS[kind]), list(range(51))
    truth = problem.sequential(noise, keep=n)
    clean, W = problem.solver.held(truth, n).flatten(1), torch.eye(50).double()
    run = lambda start: list(collocation(noise, problem.denoise, problem.solver, [0, 50], nodes=nodes, start=start))
    without, good, bad = run(None), run((clean, W)), run((-clean, W))
    assert good[0].ticks < without[0].ticks and good[-1].ticks < without[-1].ticks
    for iterates in (good, bad):
        assert iterates[-1].settled and grey(iterates[-1].states, truth[-1:]) < EXACT


def test_a_tolerance_saves_evaluations_where_nodes_become_dense_and_the_image_is_decided_and_nowhere_else(noise):
    """There the error stays within it; of nodes that are dense from the first, the sample shows more."""
    problem = Stiff(50, eta=0.5)
    early, truth = problem.solver.signal[:-1] < method.DECIDED, problem.sequential(noise)

    def evaluations(**how):
        seen = torch.zeros(50)

        def denoise(x, n):
            seen[n] += 1
            return problem.denoise(x, n)

        *_, last = collocation(noise, denoise, problem.solver, [0, 50], **how)
        assert grey(last.states, truth) < 0.1
        return seen

    exactly, loosely = evaluations(), evaluations(tolerance=0.1)
    assert torch.equal(loosely[early], exactly[early])
    assert loosely.sum() < 0.95 * exactly.sum()
    assert torch.equal(evaluations(tolerance=0.1, dense=True), evaluations(dense=True))


def test_counts_are_those_that_the_denoiser_saw(noise):
    widths, problem = [], Gaussian(100)

    def denoise(x, n):
        assert x.shape == (len(n), 4, 8, 8) and n.dtype == torch.int64 and x.dtype == torch.float32
        assert n.diff().gt(0).all()
        widths.append(len(x))
        return problem.denoise(x, n)

    for iterate in collocation(noise, denoise, problem.solver, [0, 100], nodes=13, window=6, refinements=3):
        assert (iterate.ticks, iterate.lane_steps) == (len(widths), sum(widths))
    assert (iterate.k, iterate.ticks) == (3, len(widths)), "a bound ends the run without another call"
    assert widths[0] == 1 and sorted(widths)[-3:] == [12, 24, 48], "new nodes are evaluated at once"
    assert all(width <= 6 for width in widths if width not in (12, 24, 48))


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("nodes", [4, 5, 13])
def test_a_clean_image_cubic_in_time_is_integrated_without_error(nodes, solver, noise):
    problem, n = Gaussian(50, "sample", solver=solver), boundaries(50, 7)
    cubic = lambda t: 0.3 - t + 2 * t**2 - 1.5 * t**3
    problem.denoise = lambda x, n: torch.ones_like(x) * cubic(n.reshape(-1, 1, 1, 1) / 50)
    first = next(collocation(noise, problem.denoise, problem.solver, n, nodes))
    torch.testing.assert_close(first.states, problem.sequential(noise, keep=n), atol=2e-6, rtol=1e-5)


def test_errors_of_interpolation_are_of_fourth_order():
    """Twice as many nodes, on a grid fine enough to have them, divide the error by 16, over three doublings."""
    values, errors = (torch.arange(961).double() / 48).sin(), []
    for nodes in (25, 49, 97, 193):
        t = spread(961, nodes)
        errors.append(float((interpolation(961, t) @ values[t] - values).abs().max()))
    assert 14 < (errors[0] / errors[-1]) ** (1 / 3) < 18, errors


def test_interpolation_reproduces_cubics_on_uneven_nodes():
    t, n = torch.tensor([0, 1, 5, 6, 11, 19]), torch.arange(20).double()
    for power in range(4):
        torch.testing.assert_close(interpolation(20, t) @ t.double() ** power, n**power)
    assert interpolation(20, t)[t].equal(torch.eye(6).double())
    assert interpolation(3, torch.tensor([0])).equal(torch.ones(3, 1).double())
    assert spread(1, 13).tolist() == [0] and spread(10, 4).tolist() == [0, 3, 6, 9]


def test_a_run_is_never_deeper_than_the_sequential_one_and_says_that_it_did_not_settle(noise):
    """Noise of ancestral steps makes the clean image rough, and the mixture parts at it."""
    problem = Mixture(31, seed=5, solver="ddpm")
    for x in (noise, noise.flip(-1)):
        *_, last = collocation(x, problem.denoise, problem.solver, [0, 31], nodes=8, window=2)
        assert last.ticks == 31 and not last.settled and not last.all_nodes and last.states.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_end_in_states_that_are_not(value, noise):
    problem = Mixture(30)
    denoise = lambda x, n: problem.denoise(x, n).where((n < 20).reshape(-1, 1, 1, 1), value)
    *_, last = collocation(noise, denoise, problem.solver, [0, 30])
    assert not last.states[-1].isfinite().any() and last.ticks <= 30


@pytest.mark.parametrize("name, value", [("BLOCK", 5), ("SECANTS", 0), ("SECANTS", 1)])
def test_smaller_blocks_and_fewer_secants_reach_the_same_limit(name, value, noise, monkeypatch):
    monkeypatch.setattr(method, name, value)
    problem = Mixture(50)
    *_, last = collocation(noise, problem.denoise, problem.solver, [0, 50])
    assert last.all_nodes and grey(last.states, problem.sequential(noise)) < EXACT


# One evaluation at a time


def serial(problem, noise, **how):
    """All iterates with a window of 1, and the grid points of the calls, of which each must have one state."""
    seen = []

    def denoise(x, n):
        assert len(x) == 1
        seen.append(int(n))
        return problem.denoise(x, n)

    N = len(problem.points) - 1
    return list(collocation(noise, denoise, problem.solver, [0, N], window=1, **how)), seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [2, 3, 10, 25, 50, 60])
def test_with_a_window_of_one_each_node_of_the_first_solution_is_evaluated_once_in_order(kind, nodes, noise):
    problem, M = Mixture(50, seed=5, **KINDS[kind]), min(nodes, 50)
    (first,), seen = serial(problem, noise, nodes=nodes, refinements=0)
    assert (first.ticks, first.lane_steps, len(seen)) == (M, M, M) and first.settled
    assert seen == sorted({*seen}) and seen[0] == 0 and seen[-1] == 49 and first.all_nodes == (M == 50)
    if M == 50:
        assert grey(first.states, problem.sequential(noise)) < 1e-3, "with a node at each grid point, it is sequential"


@pytest.mark.parametrize("problem, N", [(Gaussian, 50), (Mixture, 50), (Gaussian, 100), (Mixture, 200)])
def test_one_evaluation_a_node_comes_closer_than_as_many_steps_and_closer_with_more(problem, N, noise):
    problem, fewer = problem(N), {M: problem(M) for M in (13, 25)}
    truth = problem.sequential(noise)
    for M, steps in fewer.items():
        (first,), _ = serial(problem, noise, nodes=M, refinements=0)
        assert grey(first.states, truth) < 0.5 * grey(steps.sequential(noise), truth), M


@pytest.mark.parametrize("nodes", [10, 13, 16, 20])
def test_where_guidance_turns_d_back_with_the_state_the_secant_follows_it(nodes, noise):
    """d falls with the state, five for one. Held values end 0.9 to 6 grey levels off."""
    problem = Gaussian(50, "sample")
    P = problem.solver.unrolled(noise.shape[1:]).P.float()
    problem.denoise = lambda x, n: 1 - 5 * (x - P[n].reshape(-1, 1, 1, 1) * noise)
    (first,), _ = serial(problem, noise, nodes=nodes, refinements=0)
    assert grey(first.states, problem.sequential(noise)) < 0.1


@pytest.mark.parametrize("problem", [Gaussian, Mixture])
@pytest.mark.parametrize("nodes", [None, 10])
def test_further_refinements_lead_to_the_sequential_sample_one_evaluation_at_a_time(problem, nodes, noise):
    problem = problem(40)
    iterates, seen = serial(problem, noise, nodes=nodes)
    assert len(seen) == iterates[-1].ticks == iterates[-1].lane_steps <= 40
    truth = problem.sequential(noise)
    assert all(grey(each.states, truth) < 1 for each in iterates)
    assert not iterates[-1].all_nodes or grey(iterates[-1].states, truth) < EXACT


def test_the_tolerance_decides_how_many_nodes_are_evaluated_if_no_number_is_given(noise):
    problem, counts = Mixture(100), []
    truth = problem.sequential(noise)
    for tolerance in (0, 0.01, 0.1, 1.0):
        (first, *_), _ = serial(problem, noise, tolerance=tolerance, refinements=0)
        counts.append(first.ticks)
        assert grey(first.states, truth) < max(3 * tolerance, 1e-3), (tolerance, first.ticks)
    assert counts == sorted(counts, reverse=True) and counts[0] > 90 and counts[-1] < 20, counts
