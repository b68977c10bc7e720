"""The door for Python: what a pipeline in memory is sampled to, when a run stops, and what stays as it was."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import sampler as door
from models.loading import ModelError
from models.loop import Refused
from pipelines import SD, flux, pixels, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from refinement import MEASURED, Trajectory, difference, judge, trajectory_change
from sampler import Sampler
from settings import SettingError, Settings

SMALL, GUIDED = Settings(fine_steps=9, coarse_steps=3), {"guidance_scale": 2.0, "negative_prompt": "rain"}
V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(stable_diffusion(), SMALL, GUIDED)


# Samples


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "shipped, expected",
    [
        (DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False), {"set_alpha_to_one": False}),
        (DDIMScheduler(**SD, clip_sample=True, **V), V),
        (DDIMScheduler(**SD, prediction_type="sample", **ZERO), {"prediction_type": "sample", **ZERO}),
        (diffusers.EulerDiscreteScheduler(**SD), {}),
        (diffusers.EulerDiscreteScheduler(**SD, **V, **ZERO), {**V, **ZERO}),
        (diffusers.DPMSolverMultistepScheduler(**SD, **V), V),
        (diffusers.PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False), {"set_alpha_to_one": False}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "-".join(map(str, value.values())),
)
def test_sequential_equals_diffusers_pipeline(shipped, expected, guidance_scale):
    """To 1e-4 of a latent's scale: float32 rounding, which epsilon prediction enlarges by 1 / sqrt(alpha) = 15."""
    pipeline, asked = stable_diffusion(shipped), {"guidance_scale": guidance_scale, "negative_prompt": "rain"}
    other = DDIMScheduler(**SD, **{"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1, **expected})
    theirs = StableDiffusionPipeline(**{**pipeline.components, "scheduler": other}, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    for steps, coarse in ((4, False), (10, False), (25, True)):
        sampler = Sampler(pipeline, Settings(fine_steps=steps, coarse_steps=min(5, steps)), asked)
        how = {"latents": sampler.loop("").x, "height": 64, "width": 64, "output_type": "latent", **asked}
        truth = theirs("a red sun", num_inference_steps=5 if coarse else steps, **how).images
        ours = sampler.sequential("a red sun", coarse=coarse).states[-1:]
        torch.testing.assert_close(ours, truth, atol=1e-4 * float(truth.std()), rtol=1e-4)


def test_a_sample_goes_from_the_initialisation_to_the_stop(sampler):
    sample = sampler.vary(tolerance=0)("a red sun", seed=7)
    assert [refinement.k for refinement in sample.refinements] == [0, 1, 2, 3]
    assert [refinement.serial_evaluations for refinement in sample.refinements] == [3, 5, 7, 9]
    assert (sample.serial_evaluations, sample.total_evaluations, sample.stop_reason) == (9, 18, "exact")
    assert (sample.prompt, sample.seed) == ("a red sun", 7)
    assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8
    assert sample.image is sample.refinements[-1].image and sample.refinements[-1].states.shape == (4, 4, 8, 8)
    seconds = [refinement.seconds for refinement in sample.refinements]
    assert seconds == sorted(seconds) and seconds[0] > 0 and sample.seconds == seconds[-1]


def test_what_a_refinement_says_is_measured_on_its_images_and_states(sampler):
    first, second, *_ = sampler.vary(tolerance=0).refine("a red sun")
    assert first.image_change is first.trajectory_change is None
    assert second.image_change == pytest.approx(abs(second.image.astype(int) - first.image).mean())
    assert second.trajectory_change == trajectory_change(second.states, first.states)


COLLOCATION = {"method": "collocation", "fine_steps": 25}


@pytest.mark.parametrize(
    "settings, calls, shapes",
    [  # of 3, 2, 3, 2, 3, 2, 1, 1, 1 lanes, each guided: calls until the end, and the samples in them
        ({}, 9, {2, 4, 6}),
        ({"schedule": "sweep"}, 12, {2, 4, 6}),
        ({"max_batch": 4}, 12, {2, 4}),
        ({"fixed_batch": True, "max_batch": 4}, 12, {4}),
        ({**COLLOCATION, "nodes": 7, "window": 3, "max_iterations": 1}, None, {2, 4, 6, 12}),
        ({**COLLOCATION, "fixed_batch": True, "max_batch": 8}, None, {8}),
    ],
)
def test_counts_are_those_that_the_network_sees(settings, calls, shapes, sampler):
    seen, ticks, varied = [], [], sampler.vary(tolerance=0, **settings)
    varied.loop("a")  # the first look calls the network once
    with sampler.pipeline.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(len(inputs[0]))):
        for refinement in varied.refine("a", on_tick=ticks.append):
            counts = refinement.serial_evaluations, refinement.total_evaluations, refinement.network_calls
            assert counts == (len(ticks), sum(ticks), len(seen)) and refinement.widest_tick == max(ticks)
    assert set(seen) == shapes and calls in (None, len(seen))
    if "nodes" in settings:
        assert refinement.k == 1 and refinement.stop_reason == "max-iterations"
        assert sorted(ticks)[-2:] == [3, 6], "six intervals between seven nodes"


@pytest.mark.parametrize("max_batch, guidance_scale", [(None, 3.0), (8, 3.0), (6, 3.0), (1, 3.0), (None, 1.0)])
def test_with_fixed_batch_all_refinements_equal_sequential_bit_for_bit(max_batch, guidance_scale, sampler):
    settings = {"max_batch": max_batch, "guidance_scale": guidance_scale, "tolerance": 0}
    varied = sampler.vary(fine_steps=15, coarse_steps=5, fixed_batch=True, **settings)
    prompt = varied.encode("a red sun")
    assert varied(prompt).refinements[-1].states.equal(varied.sequential(prompt).states)


@pytest.mark.parametrize("settings", [{}, {"solver": "ddpm"}, {"method": "collocation", "coarse_steps": 25}])
def test_a_start_from_the_same_trajectory_saves_ticks_and_leads_to_it_again(settings, sampler):
    varied = sampler.vary(fine_steps=25, tolerance=0.5, **settings)
    before = varied("a red sun")
    again = varied("a red sun", start=varied.trajectory(before.states))
    assert again.serial_evaluations < before.serial_evaluations
    assert difference(again.image, before.image) < 0.5
    if "method" not in settings:
        first = again.refinements[0]
        assert (first.serial_evaluations, first.total_evaluations) == (1, 3), "all blocks begin at once"
        torch.testing.assert_close(first.states, before.states, atol=1e-4, rtol=1e-3)


def test_a_sample_is_the_start_that_its_own_sampler_makes_of_it(sampler):
    """Whatever its seed, steps and blocks."""
    other = sampler.vary(fine_steps=14, coarse_steps=4, solver="ddpm")
    sample = other("a dog", seed=5)
    first = lambda start: sampler("a", start=start).refinements[0].states
    assert first(sample).equal(first(other.trajectory(sample.states, seed=5)))
    assert next(sampler.refine("a", start=sample)).states.equal(first(sample))
    assert not first(sample).equal(first(other.trajectory(sample.states, seed=4)))


def test_a_sample_is_a_table_with_or_without_ground_truth(sampler):
    sample, truth = sampler.vary(tolerance=0)("a", seed=3), sampler.sequential("a", seed=3)
    plain, compared = sample.table(), sample.table(truth)
    assert [*plain] == [*compared] and set(compared) < {*MEASURED} and plain.final.tolist() == [False] * 3 + [True]
    assert compared.difference.tolist() == [difference(each.image, truth.image) for each in sample.refinements]
    differing = {name for name in plain if not plain[name].equals(compared[name])}
    assert differing == {"difference", "psnr", "ssim", "sequential_seconds"} and plain[[*differing]].isna().all(
        axis=None
    )


@pytest.mark.parametrize("method", ["srds", "collocation"])
def test_any_start_ends_at_the_sequential_sample(method, sampler):
    """Of another prompt, number of steps, number of blocks, solver and seed."""
    other = sampler.vary(fine_steps=14, coarse_steps=4, solver="dpmsolver++")
    start = other.trajectory(other.sequential("a dog", seed=5).states, seed=5)
    varied = sampler.vary(method=method, tolerance=0)
    sample, truth = varied("a red sun", start=start), varied.sequential("a red sun")
    reason = "exact" if method == "srds" else "all nodes"
    assert sample.stop_reason == reason and difference(sample.image, truth.image) < 0.1
    last = sample.refinements[-1]
    assert (last.exact, last.all_nodes, last.verdict) == (method == "srds", method != "srds", "converged")


def test_a_start_that_does_not_fit_is_refused(sampler):
    sample = sampler("a")
    start, pixel = sampler.trajectory(sample.states), Sampler(pixels(), Settings(fine_steps=9, coarse_steps=3))
    for other, given, words in (
        (sampler.vary(height=128, width=64), start, r"start_from: \(4, 8, 8\) is not the states' shape \(4, 16, 8\)"),
        (pixel, start, r"start_from: \(4, 8, 8\) is not the states' shape"),
    ):
        with pytest.raises(SettingError, match=words):
            next(other.refine("a", start=given))


def test_a_trajectory_is_unpacked_as_it_was_packed_and_nothing_else_is(sampler):
    start = sampler.trajectory(sampler.sequential("a").states, seed=5)
    found = Trajectory.unpack(start.packed())
    assert found.clean.equal(start.clean) and found[1:] == start[1:] and found.digest == start.digest
    clean, n = start.clean, torch.tensor(start.boundaries)
    packed = lambda **other: safetensors.torch.save({"clean": clean, "boundaries": n, **other})
    assert Trajectory.unpack(packed()).clean.equal(clean)
    files = [packed(clean=other) for other in (clean.double(), clean.half(), clean[:2], clean[0], clean * math.nan)]
    files += [packed(boundaries=other) for other in (n.float(), n.int(), n.flip(0), n * 2**40)]
    files += [packed(clean=clean[:0], boundaries=n[:1])]
    files += [safetensors.torch.save({"clean": clean}), start.packed()[:-1], start.packed()[:8]]
    for data in (*files, b"", b"not a trajectory", b"\x02" + 7 * b"\0" + b"[]"):
        with pytest.raises(ValueError, match="holds no trajectory"):
            Trajectory.unpack(data)


def test_what_is_asked_of_loading_reaches_the_pipeline(tiny):
    pipeline = Sampler.from_pretrained(tiny, SMALL, device="cpu", dtype="bfloat16").pipeline
    assert pipeline.dtype == torch.bfloat16
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


# One prompt, many uses


def test_a_prompt_is_encoded_once_for_truth_and_refinements(sampler):
    texts = []
    with sampler.pipeline.text_encoder.register_forward_pre_hook(lambda encoder, inputs: texts.append(inputs)):
        prompt = sampler.encode("a moon")
        sampler.sequential(prompt)
        sampler.sequential(prompt, seed=1, coarse=True)
        list(sampler.refine(prompt, seed=2))
        sampler.vary(coarse_steps=2, tolerance=5)(prompt)
        assert len(texts) == 2, "and the negative prompt"
        sampler.vary(negative_prompt="snow")(prompt)
        assert len(texts) == 3


@pytest.mark.slow
def test_threads_that_share_a_sampler_sample_as_one_does(sampler):
    """A tokenizer keeps the padding that it was last asked for."""
    texts = [" ".join("abcdefgh"[: 1 + i % 8]) for i in range(16)]
    image = lambda text: sampler(text).image.astype(int)
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(image, texts), map(image, texts), strict=True):
            assert abs(one - other).max() <= 1, "rounding may differ between threads"


@pytest.mark.parametrize("dtype, device", [(torch.float64, None), (torch.float16, None), (torch.float32, "meta")])
@pytest.mark.parametrize("settings", [{}, {"solver": "ddpm"}, {"method": "collocation"}])
def test_torchs_defaults_change_no_sample(settings, dtype, device, sampler):
    plain = sampler.vary(tolerance=0, **settings)
    truth, start = plain.sequential("a"), plain.trajectory(plain.sequential("a dog").states)
    images = [plain("a", start=given).image for given in (None, start)]
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        other = sampler.vary(tolerance=0, **settings)
        assert other.sequential("a").states.equal(truth.states)
        assert all((other("a", start=given).image == image).all() for given, image in zip((None, start), images))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


SMALLEST = {"height": 64, "width": 64}


def test_given_sigmas_are_those_of_one_prompt_alone():
    sampler, sigmas = Sampler(flux(), Settings(fine_steps=4, coarse_steps=2), SMALLEST), [1.0, 0.9, 0.5, 0.2]
    sampler.sequential("a")
    made = [each.sequential(each.encode("a", sigmas=sigmas)) for each in (sampler.vary(), sampler)]
    assert made[0].states.equal(made[1].states)


def test_points_to_keep_are_grid_points(sampler):
    states = sampler.sequential("a", kept=[0, 8, 9]).states
    assert states[[0, 2]].equal(sampler.sequential("a").states[[0, 3]])


@pytest.mark.parametrize(
    "settings",
    [{"solver": "ddpm"}, {"eta": 0.5}, {"solver": "dpmsolver++"}, {"guidance_scale": 1}, {"negative_prompt": ""},
     {"seed": 5}],
)  # fmt: skip
def test_settings_reach_the_sample(settings, sampler):
    plain, other = (each.sequential("a").states[-1] for each in (sampler, sampler.vary(**settings)))
    assert (plain - other).abs().mean() > 1e-4


@pytest.mark.parametrize("settings", [{"solver": "ddpm"}, {"eta": 0.5}, {}])
def test_a_seed_that_is_passed_is_the_settings_seed(settings, sampler):
    passed, set_before = sampler.vary(**settings), sampler.vary(seed=5, **settings)
    assert passed.sequential("a", seed=5).states.equal(set_before.sequential("a").states)
    assert passed("a", seed=5).image.tobytes() == set_before("a").image.tobytes() and set_before("a").seed == 5


def test_refinements_are_lazy_and_each_tick_is_told(sampler):
    ticks = []
    refinements = sampler.vary(tolerance=0).refine("a", on_tick=lambda lanes: ticks.append(1))
    assert not ticks
    assert next(refinements).serial_evaluations == len(ticks) == 3
    assert next(refinements).serial_evaluations == len(ticks) == 5
    sampler.sequential("a", on_tick=lambda lanes: ticks.append(1))
    assert len(ticks) == 5 + 9 and torch.is_grad_enabled()


def test_what_the_caller_does_between_refinements_is_not_in_its_seconds(sampler, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(door, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for refinement in sampler.refine("a", on_tick=lambda lanes: now.__setitem__(0, now[0] + 1)):
        assert refinement.seconds == refinement.serial_evaluations
        now[0] += 100


# Side by side

THREE = [("a red sun", 1), ("moon", 2), ("", 1)]


def counting(sampler, seen):
    """A context that adds the number of samples in each call of the network to a list, after the first look."""
    sampler.loop("")
    network = sampler.pipeline.components.get("unet") or sampler.pipeline.transformer
    how = {"with_kwargs": True}
    return network.register_forward_pre_hook(lambda _, args, kw: seen.append(len([*args, *kw.values()][0])), **how)


def assert_same(alone, together):
    """The same counts and verdicts, and the same states and images up to the rounding of another batch."""
    counts = "k serial_evaluations total_evaluations network_calls widest_tick verdict exact".split()
    for one, other in zip(alone.refinements, together.refinements, strict=True):
        assert [getattr(one, name) for name in counts] == [getattr(other, name) for name in counts]
        torch.testing.assert_close(one.states, other.states, atol=1e-4 * float(one.states.std()), rtol=1e-4)
        assert abs(one.image.astype(int) - other.image).max() <= 1
    assert (alone.prompt, alone.seed) == (together.prompt, together.seed)


@pytest.mark.parametrize("model, most", [("demo", None), ("fashion", 2)])
@pytest.mark.parametrize("settings", [{}, {"method": "collocation", "window": 3}])
def test_samples_of_a_batch_are_those_made_alone_each_with_its_counts_and_stop(model, settings, most):
    """All of the batch are in each call of the network: it takes as many as the deepest sample has ticks."""
    seen, settings = [], Settings(fine_steps=9, coarse_steps=4, tolerance=1, **settings)
    sampler = Sampler.from_pretrained(model, settings, device="cpu")
    alone = [sampler(*each) for each in THREE]
    with counting(sampler, seen):
        together = dict(sampler.batch(THREE, most))
    for i, one in enumerate(alone):
        assert_same(one, together[i])
    ticks = sorted(one.serial_evaluations for one in alone)
    assert len(seen) == ticks[-1] if most is None else ticks[-1] < len(seen) < sum(ticks)
    assert ticks[0] < ticks[-1], "they stop at refinements of their own"


@pytest.mark.parametrize("make", [stable_diffusion_xl, stable_diffusion_3, flux])
def test_in_a_shared_call_each_sample_has_its_own_conditions(make):
    settings = Settings(fine_steps=4, coarse_steps=2, tolerance=0)
    sampler, seen = Sampler(make(), settings, {"height": 64, "width": 64}), []
    alone = [sampler(*each) for each in THREE]
    with counting(sampler, seen):
        together = dict(sampler.batch(THREE))
    assert len(seen) == 4 and max(seen) == 6 * max(sampler.loop("").rows)
    assert (alone[0].states - alone[1].states).abs().mean() > 1e-3
    for i, one in enumerate(alone):
        assert_same(one, together[i])


def test_a_batch_is_asked_for_by_prompts_alone_or_by_any_iterable(sampler):
    alone = sampler("moon")
    for asked in (["a red sun", "moon"], [sampler.encode("a red sun"), ("moon",)], (("moon", None) for _ in range(2))):
        assert_same(alone, dict(sampler.batch(asked))[1])
    for most in (0, -1, 1.5):
        with pytest.raises(SettingError, match="most"):
            list(sampler.batch(["moon"], most))


def test_samples_of_a_single_step_share_its_call():
    """The network is told one time, which is the same for all: a tensor without dimensions."""
    sampler, seen = Sampler.from_pretrained("fashion", Settings(fine_steps=1, coarse_steps=1), device="cpu"), []
    with counting(sampler, seen):
        together = dict(sampler.batch([("", 1), ("", 2)]))
    assert seen == [2] and all(one.image.any() for one in together.values())


def test_samples_that_differ_in_more_than_their_rows_are_made_in_calls_of_their_own(sampler):
    asked = [sampler.encode("a", **more) for more in ({}, {"height": 96, "width": 64}, {"guidance_scale": 1.0})]
    alone, seen = [sampler(prompt) for prompt in asked], []
    with counting(sampler, seen):
        together = dict(sampler.batch([(prompt, None) for prompt in asked]))
    assert len(seen) == 2 + sum(one.serial_evaluations for one in alone), "and two looks, at other arguments"
    for i, one in enumerate(alone):
        assert_same(one, together[i])


def test_what_samples_have_no_rows_of_must_be_equal_in_a_shared_call():
    """Images of 64 by 96 and of 96 by 64 pixels have as many tokens, which Flux is told the places of once for all."""
    sampler = Sampler(flux(), Settings(fine_steps=4, coarse_steps=2, tolerance=0))
    asked = [sampler.encode("a", height=height, width=160 - height) for height in (64, 96)]
    together = dict(sampler.batch([(prompt, 1) for prompt in asked]))
    for i, prompt in enumerate(asked):
        assert_same(sampler(prompt, 1), together[i])


@pytest.mark.parametrize("settings", [{"max_batch": 6}, {"fixed_batch": True}])
def test_limits_of_a_call_hold_for_a_batch(settings, sampler):
    varied, seen = sampler.vary(tolerance=0, **settings), []
    truths = [varied.sequential(*each).states for each in THREE]
    with counting(varied, seen):
        together = dict(varied.batch(THREE))
    assert max(seen) == {"max_batch": 6, "fixed_batch": 8}[[*settings][0]]
    assert len(seen) < sum(one.serial_evaluations for one in together.values())
    if varied.settings.fixed_batch:
        assert {*seen} == {8} and all(together[i].states.equal(truth) for i, truth in enumerate(truths)), "to the bit"


@pytest.mark.parametrize("failure", [ValueError, "not finite"])
def test_a_sample_of_a_batch_that_fails_leaves_the_others_whole(failure, sampler):
    """In the network, for the words of one prompt, wherever they are in a call."""
    words = sampler.loop(sampler.encode("moon")).told[0].first
    words = next(value[1] for value in words if isinstance(value, torch.Tensor) and value.ndim == 3)
    alone, made, threads = [sampler(*each) for each in THREE], {}, threading.active_count()

    def fail(unet, args, kwargs, output):
        found = [torch.allclose(row, words, atol=1e-4) for row in kwargs["encoder_hidden_states"]]
        if failure is ValueError and any(found):
            raise ValueError("moon")
        return (output[0].where(~torch.tensor(found).reshape(-1, 1, 1, 1), math.nan),)

    with sampler.pipeline.unet.register_forward_hook(fail, with_kwargs=True):
        with pytest.raises((ValueError, FloatingPointError), match="moon|not finite"):
            made.update(sampler.batch(THREE))
    assert threading.active_count() == threads
    with sampler.pipeline.unet.register_forward_hook(fail, with_kwargs=True):
        with pytest.raises((ValueError, FloatingPointError)):
            for i, sample in sampler.batch(THREE):
                made[i] = sample
    assert made.keys() == {0, 2}
    for i, sample in made.items():
        assert_same(alone[i], sample)


def test_a_batch_that_is_left_leaves_no_thread_and_what_samples_cannot_share_is_refused(sampler):
    threads = threading.active_count()
    batch = sampler.batch([*THREE, ("sea", 4)], 2)
    next(batch)
    batch.close()
    assert threading.active_count() == threads and next(sampler.batch(THREE[:1], 1))[0] == 0
    parts = {**sampler.pipeline.components, "requires_safety_checker": False}
    perturbed = Sampler(diffusers.StableDiffusionPAGPipeline(**parts), SMALL)
    with pytest.raises(Refused, match="changes what samples side by side share"):
        list(perturbed.batch(THREE))
    assert threading.active_count() == threads


# What is asked, and what is refused


def test_what_cannot_be_is_refused_before_anything_is_sampled(tiny, sampler, monkeypatch):
    with pytest.raises(ModelError, match="thresholding"):
        Sampler(stable_diffusion(DDIMScheduler(**SD, thresholding=True)))
    monkeypatch.setattr(door, "load_pipeline", lambda *args: pytest.fail("weights were loaded"))
    for wrong, words in (
        ({"settings": Settings(eta=1, solver="ddpm")}, "eta: 1"),
        ({"dtype": "half"}, "dtype: 'half'"),
    ):
        with pytest.raises(SettingError, match=words):
            Sampler.from_pretrained(tiny, **wrong)
    for prompt in (["a red sun", "snow"], None, 3, "caf\udce9"):
        with pytest.raises(SettingError, match="prompt: .* is not usable; give some text"):
            sampler(prompt)
    with pytest.raises(SettingError, match="seed: -1"):
        sampler("a", seed=-1)


# When to stop


def changes(image, trajectory):
    return SimpleNamespace(image_change=image, trajectory_change=trajectory, settled=True)


@pytest.mark.parametrize(
    "history, final, trajectory",
    [
        ([], "continuing", "continuing"),
        ([(5, 5)], "continuing", "continuing"),
        ([(0.05, 0.05)], "converged", "converged"),
        ([(5, 9), (0.05, 2)], "converged", "continuing"),  # an inner boundary still moves
        ([(5, 2), (0.05, 9)], "converged", "growing"),
        ([(5, 9), (1, 1)], "continuing", "continuing"),
        ([(5, 9), (8, 3)], "growing", "growing"),
        ([(0.02, 0.01), (0.04, 0.05)], "converged", "converged"),  # grew, but both are below
        ([(0.02, 0.01), (0.2, 0.05)], "growing", "growing"),
        ([(0.1, 0.1)], "continuing", "continuing"),
    ],
)
def test_stop_rules(history, final, trajectory):
    earlier, last = None, changes(None, None)
    for image, moved in history:
        earlier, last = last, changes(image, moved)
    unsettled = SimpleNamespace(**{**vars(last), "settled": False})
    assert judge(unsettled, earlier, "final", 0.1) == "growing", "it was cut short"
    verdicts = [judge(last, earlier, rule, 0.1) for rule in ("final", "trajectory")]
    assert verdicts == [final, trajectory]


def test_final_stops_where_trajectory_goes_on(sampler):
    """A tolerance between the first image change and the trajectory's is such a case, made for this model."""
    _, first, *_ = sampler.vary(tolerance=0).refine("a moon")
    assert first.image_change < first.trajectory_change
    between = sampler.vary(tolerance=(first.image_change + first.trajectory_change) / 2)
    stopped = between("a moon")
    assert len(stopped.refinements) == 2 and stopped.stop_reason == "tolerance"
    assert len(between.vary(stop_rule="trajectory")("a moon").refinements) > 2
    bound = sampler.vary(tolerance=0, max_iterations=1)("a moon")
    assert len(bound.refinements) == 2 and bound.stop_reason == "max-iterations"


def test_trajectory_change_is_the_largest_over_boundaries_in_grey_levels():
    old, new = torch.randn(2, 4, 3, 5, 5)
    change = max(127.5 * (new[i] - old[i]).abs().mean() / new[i].std(correction=0) for i in (1, 2, 3))
    assert trajectory_change(new, old) == pytest.approx(float(change))


@pytest.mark.slow
def test_compiled_calls_have_few_shapes():
    pipeline, shapes = stable_diffusion(), []
    pipeline.unet.register_forward_pre_hook(lambda unet, inputs: shapes.append(len(inputs[0])))
    pipeline.unet.compile(backend="eager")
    sampler = Sampler(pipeline, SMALL)
    sampler.warm_up()
    list(sampler.iterates("a"))
    assert set(shapes) == {2, 4, 6}
    shapes.clear()
    list(sampler.vary(max_batch=1).iterates("a"))
    assert set(shapes) == {2}
    shapes.clear()
    list(sampler.batch(THREE))
    assert max(shapes) == 18 and {*shapes} <= {2, 4, 8, 16, 18}
