"""The door for Python: what a pipeline in memory is sampled to, when a run stops, and what stays as it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

import diffusion
import sampler as door
from models.families import StableDiffusion
from models.loading import ModelError
from pipelines import SD, flux, pixels, stable_diffusion
from refinement import difference, judge, trajectory_change
from sampler import Sampler
from settings import SettingError, Settings

SMALL = Settings(fine_steps=9, coarse_steps=3, guidance_scale=2.0, negative_prompt="rain")
V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(stable_diffusion(), SMALL)


def theirs(pipeline, sampler, steps, **scheduler):
    """The latent of diffusers' own pipeline and trailing DDIM, whose settings the test states."""
    settings = {"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1}
    scheduler = DDIMScheduler(**SD, **settings, **scheduler)
    other = StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    asked = sampler.settings
    return other(
        "a red sun", negative_prompt=asked.negative_prompt, num_inference_steps=steps,
        guidance_scale=asked.guidance_scale, latents=sampler.noise(), height=64, width=64, output_type="latent",
    ).images  # fmt: skip


# Samples


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "shipped, expected",
    [
        (DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1), {"set_alpha_to_one": False}),
        (DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True, steps_offset=1), {"set_alpha_to_one": True}),
        (DDIMScheduler(**SD, clip_sample=True, **V), V),
        (DDIMScheduler(**SD, prediction_type="sample"), {"prediction_type": "sample"}),
        (DDIMScheduler(**SD, **V, **ZERO), {**V, **ZERO}),
        (DDIMScheduler(**SD, prediction_type="sample", **ZERO), {"prediction_type": "sample", **ZERO}),
        (EulerDiscreteScheduler(**SD), {}),
        (EulerDiscreteScheduler(**SD, **V, **ZERO), {**V, **ZERO}),
        (DPMSolverMultistepScheduler(**SD, **V), V),
        (PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False), {"set_alpha_to_one": False}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "-".join(map(str, value.values())),
)
def test_sequential_equals_diffusers_pipeline(shipped, expected, guidance_scale):
    """To 1e-4 of a latent's scale: float32 rounding, which epsilon prediction enlarges by 1 / sqrt(alpha) = 15."""
    pipeline = stable_diffusion(shipped)
    for steps in (4, 10):
        sampler = Sampler(pipeline, Settings(steps, 2, guidance_scale=guidance_scale, negative_prompt="rain"))
        truth = theirs(pipeline, sampler, steps, **expected)
        ours = sampler.sequential("a red sun").states[-1:]
        torch.testing.assert_close(ours, truth, atol=1e-4 * float(truth.std()), rtol=1e-4)


@pytest.mark.parametrize("N, B", [(100, 10), (25, 5), (1000, 8)])
def test_coarse_baseline_is_diffusers_sampler_with_as_many_steps(N, B, sampler):
    varied = sampler.vary(fine_steps=N, coarse_steps=B)
    truth = theirs(sampler.pipeline, varied, B, set_alpha_to_one=False)
    ours = varied.sequential("a red sun", coarse=True).states[-1:]
    torch.testing.assert_close(ours, truth, atol=1e-4 * float(truth.std()), rtol=1e-4)


def test_an_image_is_the_one_that_diffusers_decodes(sampler):
    pipeline, x = sampler.pipeline, sampler.noise()
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline("a", num_inference_steps=2, latents=x, height=64, width=64, output_type="pil").images[0]
    latent = pipeline("a", num_inference_steps=2, latents=x, height=64, width=64, output_type="latent").images
    assert np.array_equal(sampler.image(latent), np.asarray(expected))


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
    first, second, third, _ = sampler.vary(tolerance=0).refine("a red sun")
    assert first.image_change is first.trajectory_change is first.predicted_change is second.predicted_change is None
    assert second.image_change == pytest.approx(abs(second.image.astype(int) - first.image).mean())
    assert second.trajectory_change == trajectory_change(second.states, first.states)
    assert third.predicted_change == pytest.approx(third.image_change**2 / second.image_change)


@pytest.mark.parametrize("settings", [{"max_batch": m} for m in (1, 2, 3, 100)] + [{"schedule": "sweep"}])
def test_iterates_do_not_depend_on_batches_or_schedules(settings, sampler):
    """To 1e-4: kernels for other batch shapes round differently, and epsilon prediction enlarges it."""
    for plain, other in zip(sampler.iterates("a"), sampler.vary(**settings).iterates("a"), strict=True):
        torch.testing.assert_close(other.states, plain.states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_batch, guidance_scale", [(None, 3.0), (8, 3.0), (6, 3.0), (1, 3.0), (None, 1.0)])
def test_with_fixed_batch_all_refinements_equal_sequential_bit_for_bit(max_batch, guidance_scale, sampler):
    varied = sampler.vary(
        fine_steps=15, coarse_steps=5, fixed_batch=True, max_batch=max_batch, guidance_scale=guidance_scale, tolerance=0
    )
    prompt = varied.encode("a red sun")
    assert varied(prompt).refinements[-1].states.equal(varied.sequential(prompt).states)


@pytest.mark.parametrize("settings, widths", [({"max_batch": 1}, {1}), ({"max_batch": 4}, {2, 4}), ({}, {2, 4, 6})])
@pytest.mark.parametrize("fixed", [False, True])
def test_batch_settings_reach_the_network(settings, widths, fixed, sampler, monkeypatch):
    seen, predict = [], StableDiffusion.predict

    def counting(self, pipeline, x, *rest, **conditions):
        seen.append(len(x))
        return predict(self, pipeline, x, *rest, **conditions)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    list(sampler.vary(fixed_batch=fixed, **settings).iterates("a"))
    assert set(seen) == ({settings.get("max_batch", 8)} if fixed else widths)


def collocated(sampler, **settings):
    return sampler.vary(method="collocation", tolerance=0, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"max_batch": 1}, {"max_batch": 3}, {"fixed_batch": True}, {"window": 6}])
def test_collocation_ends_at_the_sequential_sample_whatever_the_batches(settings, sampler):
    varied = collocated(sampler, fine_steps=25, nodes=5, **settings)
    sample, truth = varied("a red sun"), varied.sequential("a red sun")
    assert [refinement.k for refinement in sample.refinements] == [0, 1, 2], "the second changed it by much"
    assert sample.stop_reason == "exact" and sample.serial_evaluations <= 25
    assert difference(sample.image, truth.image) < 0.1 and sample.refinements[-1].states.shape == truth.states.shape
    assert trajectory_change(sample.refinements[-1].states, truth.states) < 0.1


def test_collocation_of_dpmsolver_ends_at_diffusers_own_which_never_restarts(sampler):
    varied = collocated(sampler, fine_steps=20, solver="dpmsolver++")
    config = {"timestep_spacing": "trailing", "steps_offset": 1}
    scheduler = DPMSolverMultistepScheduler(**SD, **config)
    pipeline = StableDiffusionPipeline(
        **{**sampler.pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    truth = pipeline(
        "a red sun", negative_prompt="rain", num_inference_steps=20, guidance_scale=2.0, latents=varied.noise(),
        height=64, width=64, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(varied("a red sun").refinements[-1].states[-1:], truth, atol=2e-3, rtol=1e-3)


def test_nodes_window_and_max_iterations_reach_collocation(sampler, monkeypatch):
    seen, predict = [], StableDiffusion.predict

    def counting(self, pipeline, x, *rest, **conditions):
        seen.append(len(x) // 2)
        return predict(self, pipeline, x, *rest, **conditions)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    sample = collocated(sampler, fine_steps=25, nodes=7, window=3, max_iterations=1)("a")
    assert len(sample.refinements) == 2 and sample.stop_reason == "max-iterations"
    first = sample.refinements[0].serial_evaluations
    assert max(seen[:first]) == 3 and seen[first] == 6, "six intervals between seven nodes"
    assert (sum(seen), len(seen)) == (sample.total_evaluations, sample.serial_evaluations)


def test_settings_left_open_are_those_of_the_method():
    pipeline = stable_diffusion()
    ours = [Sampler(pipeline, Settings(9, 3, method=method)).settings for method in ("srds", "collocation")]
    seen = [(each.schedule, each.correction, each.nodes, each.window) for each in ours]
    assert seen == [("pipelined", "damped", None, None), (None, None, None, None)]


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


@pytest.mark.parametrize("method", ["srds", "collocation"])
def test_any_start_ends_at_the_sequential_sample(method, sampler):
    """Of another prompt, number of steps, number of blocks, solver and seed."""
    other = sampler.vary(fine_steps=14, coarse_steps=4, solver="dpmsolver++")
    start = other.trajectory(other.sequential("a dog", seed=5).states, seed=5)
    varied = sampler.vary(method=method, tolerance=0)
    sample, truth = varied("a red sun", start=start), varied.sequential("a red sun")
    assert sample.stop_reason == "exact" and difference(sample.image, truth.image) < 0.1


def test_blocks_of_one_step_are_sequential_whatever_the_start(sampler):
    varied = sampler.vary(coarse_steps=9)
    start = varied.trajectory(torch.zeros_like(varied.sequential("a").states))
    sample = varied("a", start=start)
    assert sample.serial_evaluations == 9 and (sample.image == varied.sequential("a").image).all()


def test_a_start_that_does_not_fit_is_refused(sampler):
    start = sampler.trajectory(sampler.sequential("a").states)
    for other, words in (
        (sampler.vary(height=128), r"start_from: \(4, 8, 8\) is of other states than \(4, 16, 8\)"),
        (Sampler(pixels(), Settings(9, 3)), "start_from: 'StableDiffusionPipeline' is another model than DDPMPipeline"),
    ):
        with pytest.raises(SettingError, match=words):
            next(other.refine("a", start=start))
    sample = sampler("a")
    for given in (sample, sample.states):
        with pytest.raises(SettingError, match=r"start: '(Sample|Tensor)' is no trajectory; give what `trajectory`"):
            next(sampler.refine("a", start=given))
    for states in (sample.states[1:], sample):
        with pytest.raises(SettingError, match=r"states: .* is not the shape of this sampler's, \(4, 4, 8, 8\)"):
            sampler.trajectory(states)


def test_the_schedule_reaches_the_engine(sampler):
    assert [iterate.ticks for iterate in sampler.vary(schedule="sweep").iterates("a")] == [3, 7, 10, 12]


@pytest.mark.parametrize("settings", [{"solver": "ddpm"}, {"eta": 0.5}, {"solver": "dpmsolver++"}])
def test_the_solver_reaches_the_sample(settings, sampler):
    plain, other = (each.sequential("a").states[-1] for each in (sampler, sampler.vary(**settings)))
    assert (plain - other).abs().mean() > 1e-3


def test_what_is_asked_of_loading_reaches_the_pipeline(tiny):
    pipeline = Sampler.from_pretrained(tiny, SMALL, device="cpu", dtype="bfloat16", vae_tiling=True).pipeline
    assert pipeline.dtype == torch.bfloat16 and pipeline.vae.use_tiling
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("prompt", [["a red sun", "snow"], None, 3, "caf\udce9"])
def test_what_is_no_text_is_refused(prompt, sampler):
    with pytest.raises(SettingError, match="prompt: .* is not usable; give some text"):
        sampler.vary(guidance_scale=1)(prompt)


def test_a_prompt_of_another_pipeline_is_encoded_again(sampler):
    pipeline = stable_diffusion()
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(9))
    other = Sampler(pipeline, SMALL)
    assert other.sequential(sampler.encode("a")).states.equal(other.sequential("a").states)
    assert not other.sequential("a").states.equal(sampler.sequential("a").states)


def test_a_varied_sampler_plans_again_only_for_what_a_plan_is_of():
    sampler = Sampler(stable_diffusion(), Settings(16, "auto", guidance_scale=1))
    assert sampler.vary(tolerance=1).plan is sampler.plan
    swept = sampler.vary(schedule="sweep")
    assert swept.plan is not sampler.plan and swept.settings.schedule == "sweep"
    assert sampler.vary(coarse_steps=2).plan is None


def test_from_pretrained_samples_what_the_pipeline_in_memory_is_sampled_to(tiny):
    """To rounding, as the loaded network's memory is laid out for speed."""
    memory = Sampler(StableDiffusionPipeline.from_pretrained(tiny), SMALL)
    loaded = Sampler.from_pretrained(tiny, SMALL, device="cpu")
    for one, other in zip(memory("a red sun").refinements, loaded("a red sun").refinements, strict=True):
        torch.testing.assert_close(one.states, other.states, atol=1e-4, rtol=1e-4)


def test_negative_prompt_guidance_and_seed_change_the_image(sampler):
    image = sampler.sequential("a moon").image
    others = [sampler.vary(**more) for more in ({"negative_prompt": ""}, {"guidance_scale": 1})]
    images = [sampler.sequential("a moon", seed=1).image, *(other.sequential("a moon").image for other in others)]
    assert all((image != other).any() for other in images)


# One prompt, many uses


def test_a_prompt_is_encoded_once_for_truth_and_refinements(sampler, monkeypatch):
    texts, encode = [], StableDiffusion.encode
    counting = lambda self, pipeline, text, *rest: texts.append(text) or encode(self, pipeline, text, *rest)
    monkeypatch.setattr(StableDiffusion, "encode", counting)
    prompt = sampler.encode("a moon")
    sampler.sequential(prompt)
    sampler.sequential(prompt, seed=1, coarse=True)
    list(sampler.refine(prompt, seed=2))
    sampler.vary(coarse_steps=2, tolerance=5)(prompt)
    assert texts == ["a moon"]
    sampler.vary(negative_prompt="snow")(prompt)  # for which it was not encoded
    assert texts == ["a moon"] * 2


def test_a_seed_does_not_rebuild_tables(sampler, monkeypatch):
    def refuse(*args):
        pytest.fail("tables were built again")

    monkeypatch.setattr(diffusion, "Solver", refuse)
    monkeypatch.setattr(diffusion, "diffusion_grid", refuse)
    prompt = sampler.encode("a moon")
    assert not sampler(prompt, seed=1).refinements[0].states.equal(sampler(prompt, seed=2).refinements[0].states)
    sampler.sequential(prompt, seed=3)


@pytest.mark.parametrize("settings", [{"solver": "ddpm"}, {"eta": 0.5}, {}])
def test_a_seed_that_is_passed_is_the_settings_seed(settings, sampler):
    passed, set_before = sampler.vary(**settings), sampler.vary(seed=5, **settings)
    assert passed.sequential("a", seed=5).states.equal(set_before.sequential("a").states)
    assert passed("a", seed=5).image.tobytes() == set_before("a").image.tobytes() and set_before("a").seed == 5
    with pytest.raises(SettingError, match="seed: -1"):
        sampler("a", seed=-1)


def test_refinements_are_lazy_and_each_tick_is_told(sampler):
    ticks = []
    refinements = sampler.vary(tolerance=0).refine("a", on_tick=lambda lanes: ticks.append(1))
    assert not ticks
    assert next(refinements).serial_evaluations == len(ticks) == 3
    assert next(refinements).serial_evaluations == len(ticks) == 5
    refinements.close()
    ticks.clear()
    sampler.sequential("a", on_tick=lambda lanes: ticks.append(1))
    assert len(ticks) == 9


def test_what_the_caller_does_between_refinements_is_not_in_its_seconds(sampler, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(door, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for refinement in sampler.refine("a", on_tick=lambda lanes: now.__setitem__(0, now[0] + 1)):
        assert refinement.seconds == refinement.serial_evaluations
        now[0] += 100


def test_what_a_prompt_is_cut_to_is_known(sampler):
    assert sampler.encode("a moon").ignored == ""
    assert sampler.encode("abcdefgh " * 3 + "xyz").ignored.endswith("yz")
    assert Sampler(pixels(), Settings(4, 2)).encode("x" * 999).ignored == ""


# What is asked, and what is refused


def test_what_was_asked_and_what_was_resolved_are_two_values():
    asked = Settings(fine_steps=9, coarse_steps=3)
    sampler = Sampler(stable_diffusion(), asked)
    assert sampler.asked is asked and asked == Settings(fine_steps=9, coarse_steps=3)
    assert (sampler.settings.guidance_scale, sampler.settings.height, sampler.settings.solver) == (7.5, 64, "ddim")
    assert sampler.vary(solver="ddpm").asked.guidance_scale is None


def test_what_cannot_be_is_refused_before_anything_is_sampled(tiny, monkeypatch):
    with pytest.raises(SettingError, match="height: 60"):
        Sampler(stable_diffusion(), Settings(height=60))
    with pytest.raises(ModelError, match="thresholding"):
        Sampler(stable_diffusion(DDIMScheduler(**SD, thresholding=True)))
    monkeypatch.setattr(door, "load_pipeline", lambda *args: pytest.fail("weights were loaded"))
    for arguments in ({"settings": Settings(height=60)}, {"dtype": "half"}):
        with pytest.raises(SettingError):
            Sampler.from_pretrained(tiny, **arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"device": "tpu"}, "device: 'tpu' is not on this machine"),
        ({"device": "cpu", "offload": True}, "offload: True has nowhere to offload to"),
        ({"device": "cpu", "variant": "fp16"}, "variant 'fp16' cannot be loaded"),
    ],
)
def test_what_a_model_cannot_be_loaded_with_is_refused(arguments, words, tiny):
    with pytest.raises((SettingError, ModelError), match=words):
        Sampler.from_pretrained(tiny, **arguments)


def test_numbers_that_are_not_finite_are_an_error(sampler, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "predict", lambda self, pipeline, x, t, **conditions: x * float("nan"))
    with pytest.raises(FloatingPointError, match="not finite in float32"):
        sampler("a")


# When to stop


def changes(image, trajectory, before):
    predicted = image**2 / before.image_change if before and before.image_change else None
    return SimpleNamespace(image_change=image, trajectory_change=trajectory, predicted_change=predicted, settled=True)


@pytest.mark.parametrize(
    "history, final, trajectory, predicted",
    [
        ([(5, 5)], "continuing", "continuing", "continuing"),
        ([(0.05, 0.05)], "converged", "converged", "continuing"),  # one change predicts nothing
        ([(5, 9), (0.05, 2)], "converged", "continuing", "converged"),  # an inner boundary still moves
        ([(5, 2), (0.05, 9)], "converged", "growing", "converged"),
        ([(5, 9), (0.6, 1)], "continuing", "continuing", "converged"),  # 0.6 * 0.6 / 5 is to come
        ([(5, 9), (1, 1)], "continuing", "continuing", "continuing"),
        ([(5, 9), (8, 3)], "growing", "growing", "growing"),
        ([(0.02, 0.01), (0.04, 0.05)], "converged", "converged", "converged"),  # grew, but both are below
        ([(0.02, 0.01), (0.2, 0.05)], "growing", "growing", "growing"),
        ([(0.1, 0.1)], "continuing", "continuing", "continuing"),
    ],
)
def test_stop_rules(history, final, trajectory, predicted):
    earlier, last = None, changes(None, None, None)
    for image, moved in history:
        earlier, last = last, changes(image, moved, last)
    verdicts = [judge(last, earlier, rule, 0.1) for rule in ("final", "trajectory", "predicted")]
    assert verdicts == [final, trajectory, predicted]


def test_an_initialisation_is_never_converged():
    first = changes(None, None, None)
    assert [judge(first, None, rule, 100) for rule in ("final", "trajectory", "predicted")] == ["continuing"] * 3


def test_what_did_not_settle_is_growing_however_little_it_changed():
    unsettled = changes(0.01, 0.01, None)
    unsettled.settled = False
    assert [judge(unsettled, changes(None, None, None), rule, 0.1) for rule in ("final", "trajectory")] == [
        "growing"
    ] * 2


def test_final_stops_where_trajectory_goes_on(sampler):
    """A tolerance between the first image change and the trajectory's is such a case, made for this model."""
    _, first, *_ = sampler.vary(tolerance=0).refine("a moon")
    assert first.image_change < first.trajectory_change
    between = sampler.vary(tolerance=(first.image_change + first.trajectory_change) / 2)
    stopped = between("a moon")
    assert len(stopped.refinements) == 2 and stopped.stop_reason == "tolerance"
    assert len(between.vary(stop_rule="trajectory")("a moon").refinements) > 2


def test_a_bound_ends_a_run_that_has_not_converged(sampler):
    sample = sampler.vary(tolerance=0, max_iterations=1)("a moon")
    assert len(sample.refinements) == 2 and sample.stop_reason == "max-iterations"


def test_blocks_of_one_step_need_no_refinement(sampler):
    sample = sampler.vary(coarse_steps=9)("a moon")
    assert len(sample.refinements) == 1 and sample.stop_reason == "exact" and sample.serial_evaluations == 9


def test_trajectory_change_is_the_largest_over_boundaries_in_grey_levels():
    old, new = torch.randn(2, 4, 3, 5, 5)
    change = max(127.5 * (new[i] - old[i]).abs().mean() / new[i].std(correction=0) for i in (1, 2, 3))
    assert trajectory_change(new, old) == pytest.approx(float(change))


def test_difference_is_in_grey_levels():
    assert difference(np.full((2, 2, 3), 255, np.uint8), np.full((2, 2, 3), 1, np.uint8)) == 254


# Plans and compiled networks


def test_auto_plans_blocks_and_schedule():
    sampler = Sampler(stable_diffusion(), Settings(fine_steps=16, coarse_steps="auto", guidance_scale=1))
    assert (sampler.settings.coarse_steps, sampler.settings.schedule) == (
        sampler.plan["blocks"], sampler.plan["schedule"],
    )  # fmt: skip
    assert sampler.vary(seed=1).plan is sampler.plan and sampler.asked.coarse_steps == "auto"
    swept = Sampler(sampler.pipeline, Settings(fine_steps=16, coarse_steps="auto", schedule="sweep"))
    assert swept.plan["schedule"] == swept.settings.schedule == "sweep"


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
    assert set(shapes) == {1}
    with pytest.raises(SettingError, match="a compiled network has few"):
        sampler.vary(coarse_steps="auto")


# What stays as it was


def state(pipeline):
    """What a caller could find changed."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    weights = {
        (name, key): (value.dtype, value.device, value.stride(), value.double().sum().item())
        for name, part in modules.items() for key, value in part.state_dict().items()
    }  # fmt: skip
    hooks = {
        (name, key): (type(getattr(module, "_hf_hook", None)), len(module._forward_pre_hooks), module.training)
        for name, part in modules.items() for key, module in part.named_modules()
    }  # fmt: skip
    config = {key: value for key, value in pipeline.scheduler.config.items()}
    scheduler = {key: str(value) for key, value in vars(pipeline.scheduler).items()}
    return weights, hooks, config, scheduler, id(pipeline.scheduler), dict(pipeline.config), list(vars(pipeline))


@pytest.mark.parametrize("build", [stable_diffusion, flux, pixels])
def test_a_pipeline_stays_as_it_was_and_goes_on_being_used(build):
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    prompted = {} if build is pixels else {"prompt": "a moon", "height": 64, "width": 64}

    def use():
        generator = torch.Generator().manual_seed(1)
        return pipeline(**prompted, num_inference_steps=3, generator=generator, output_type="np").images

    image, before = use(), state(pipeline)
    size = {} if build is pixels else {"height": 64, "width": 64}
    sampler = Sampler(pipeline, Settings(fine_steps=8, coarse_steps=2, **size))
    sampler("a moon")
    sampler.sequential("a moon")
    assert state(pipeline) == before
    assert np.array_equal(use(), image)


def test_sampling_makes_no_gradients_and_leaves_them_on(sampler):
    assert not sampler("a moon").refinements[-1].states.requires_grad and torch.is_grad_enabled()
