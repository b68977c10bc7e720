"""Every family: parity with diffusers' own pipeline, refinements, and the whole command."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging

import diffusion
import main
import pipelines

logging.set_verbosity_error()
FAMILIES = {
    "StableDiffusion": pipelines.stable_diffusion,
    "StableDiffusionXL": pipelines.stable_diffusion_xl,
    "StableDiffusion3": pipelines.stable_diffusion_3,
    "Flux-dev": pipelines.flux,
    "Flux-schnell": pipelines.schnell,
    "PixArt-Alpha": pipelines.pixart_alpha,
    "PixArt-Sigma": pipelines.pixart,
    "Unconditional": pipelines.pixels,
}
LATENT = [name for name in FAMILIES if name != "Unconditional"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family's pipeline."""
    root = tmp_path_factory.mktemp("families")
    for name, build in FAMILIES.items():
        build().save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def arguments(folder, *settings):
    size = [] if folder.name == "Unconditional" else ["--height", "64", "--width", "96"]
    return ["--device", "cpu", "--model", str(folder), "-cs", "3", "-fs", "8", *size, *settings]


def load(folder, *settings):
    argv = arguments(folder, "-o", "output", "--prompt", "a red sun", *settings)
    return main.load(main.parse_arguments(argv), main.Processes())[0]


def sequential(problem, text="a red sun"):
    points = range(problem.args.fine_steps + 1)
    return diffusion.sequential(problem.x, problem.denoiser(text), problem.step, points, problem.boundaries)


def theirs(folder, problem, output_type, **settings):
    """What the family's own pipeline makes of the same noise, under its own scheduler or trailing DDIM."""
    pipeline, x = DiffusionPipeline.from_pretrained(folder), problem.x
    pipeline.set_progress_bar_config(disable=True)
    if not problem.model.family.flow:
        config = pipeline.scheduler.config
        pipeline.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    if "Flux" in folder.name:
        x = pipeline._pack_latents(x, *x.shape)
    if "PixArt" in folder.name:
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    settings |= {"num_inference_steps": 8, "latents": x, "height": 64, "width": 96}
    images = pipeline("a red sun", output_type=output_type, **settings).images
    if output_type == "latent" and "Flux" in folder.name:
        images = pipeline._unpack_latents(images, 64, 96, pipeline.vae_scale_factor)
    return images[0]


@pytest.mark.parametrize(
    "family, guidance",
    [(name, scale) for name in LATENT if name != "Flux-schnell" for scale in (1.0, 4.0)] + [("Flux-schnell", None)],
)
def test_sequential_equals_diffusers_own_pipeline(family, guidance, folders):
    """To float32's rounding: 1e-4 of the latents' scale, and one grey level of the image."""
    problem = load(folders[family], *([] if guidance is None else ["-gs", str(guidance)]))
    settings = {} if guidance is None else {"guidance_scale": guidance}
    ours, truth = sequential(problem)[-1], theirs(folders[family], problem, "latent", **settings)
    torch.testing.assert_close(ours, truth, atol=1e-4 * float(truth.std()), rtol=1e-4)
    image = np.asarray(theirs(folders[family], problem, "pil", **settings)).astype(int)
    assert abs(problem.image(ours[None]) - image).max() <= 1


def test_sequential_of_pixels_equals_diffusers_own_pipeline_clipping_included(folders):
    problem = load(folders["Unconditional"])
    pipeline = DDIMPipeline.from_pretrained(folders["Unconditional"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    assert pipeline.scheduler.config.clip_sample
    generator = torch.Generator().manual_seed(problem.args.seed)
    (image,) = pipeline(generator=generator, num_inference_steps=8, output_type="np").images
    ours = (sequential(problem)[-1] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    np.testing.assert_allclose(ours, image, atol=1e-4)


@pytest.mark.parametrize("family", LATENT)
def test_prompts_change_the_image_and_negative_ones_do_where_they_are_taken(family, folders):
    problem = load(folders[family])
    ours = sequential(problem)[-1]
    others = [sequential(problem, "snow at night")[-1]]
    if problem.model.family.guidance == "classifier-free":
        others.append(sequential(problem.vary(negative_prompt="rain"))[-1])
    assert all((ours - other).abs().mean() > 1e-4 for other in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_refinements_equal_sequential_and_micro_batches_do_not_matter(family, folders):
    """To 1e-4 of the states' scale: kernels for other batch shapes round differently."""
    problem = load(folders[family])
    truth = sequential(problem)
    limit = 1e-4 * float(truth.std())
    plain = list(problem.iterates(problem.denoiser("a red sun")))
    assert plain[-1].exact and plain[-1].ticks == 8
    torch.testing.assert_close(plain[-1].states, truth, atol=limit, rtol=1e-4)
    parted = problem.vary(max_batch=2)
    for one, other in zip(plain, parted.iterates(parted.denoiser("a red sun"))):
        torch.testing.assert_close(one.states, other.states, atol=limit, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_writes_every_output(family, folders, tmp_path, capsys):
    argv = arguments(folders[family], "-o", str(tmp_path), "--prompt", "a red sun", "--prompt", "snow")
    tiling = [] if family == "Unconditional" else ["--vae-tiling"]
    assert main.main([*argv, *tiling, "--max-iterations", "2"]) == 0, capsys.readouterr().err
    run = json.loads((tmp_path / "run.json").read_text())
    assert all((tmp_path / file).stat().st_size for file in run["files"])
    prompted = family != "Unconditional"
    assert [result["seed"] for result in run["prompts"]] == ([42, 42] if prompted else [42, 43])
    assert run["settings"]["solver"] == ("euler" if family.startswith(("StableDiffusion3", "Flux")) else "ddim")


@pytest.mark.parametrize(
    "family, argv, words",
    [
        ("StableDiffusion", ["--solver", "euler"], "--solver: euler does not sample"),
        ("StableDiffusion3", ["--solver", "ddim"], "give euler or dpmsolver++"),
        ("Flux-dev", ["--solver", "ddpm"], "give euler or dpmsolver++"),
        ("Flux-dev", ["--eta", "0.5"], "--eta: 0.5 is for --solver ddim"),
        ("StableDiffusion", ["--solver", "ddpm", "--eta", "0.5"], "--eta: 0.5 is for --solver ddim"),
        ("StableDiffusion", ["--eta", "1.5"], "--eta: 1.5"),
        ("StableDiffusion", ["--eta", "-1"], "--eta"),
        ("Flux-schnell", ["-gs", "3"], "--guidance-scale/-gs: 3"),
        ("Unconditional", ["-gs", "3"], "--guidance-scale/-gs: 3"),
        ("Flux-dev", ["--negative-prompt", "rain"], "--negative-prompt: 'rain'"),
        ("StableDiffusion3", ["--height", "72"], "--height: 72 is not a multiple of 16"),
        ("StableDiffusion3", ["--height", "512"], "--height: 512 is more than"),
        ("StableDiffusion3", ["-fs", "100000"], "--fine-steps/-fs: 100000"),
        ("Unconditional", ["--vae-tiling"], "--vae-tiling"),
        ("Unconditional", ["--height", "15"], "--height: 15 is not a multiple of 2"),
        ("StableDiffusion", ["--offload"], "--offload"),
    ],
)
def test_what_a_family_cannot_do_is_one_line_and_status_2(family, argv, words, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffusion, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    assert main.main(arguments(folders[family], "-o", str(tmp_path), "--prompt", "a", *argv)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


def test_sizes_and_guidance_are_the_familys_own(folders):
    found = {name: diffusion.find_model(str(folder)).family for name, folder in folders.items()}
    assert {name: (family.default_size, family.guidance_scale) for name, family in found.items()} == {
        "StableDiffusion": ((64, 64), 7.5),
        "StableDiffusionXL": ((64, 64), 5.0),
        "StableDiffusion3": ((64, 64), 7.0),
        "Flux-dev": ((1024, 1024), 3.5),
        "Flux-schnell": ((1024, 1024), None),
        "PixArt-Alpha": ((1024, 1024), 4.5),
        "PixArt-Sigma": ((64, 64), 4.5),
        "Unconditional": ((16, 16), None),
    }


def test_pixel_models_with_their_files_at_the_top_load(folders, tmp_path):
    """As google/ddpm-church-256 keeps them, pickled weights included."""
    flat = tmp_path / "Unconditional"
    flat.mkdir()
    pipelines.pixels().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for path in (tmp_path / "pickled").rglob("*.*"):
        (flat / path.name).write_bytes(path.read_bytes())
    assert (flat / "diffusion_pytorch_model.bin").exists() and not list(flat.glob("*.safetensors"))
    torch.testing.assert_close(*map(sequential, (load(folders["Unconditional"]), load(flat))), atol=1e-4, rtol=1e-4)


def test_offloading_changes_nothing_but_where_the_parts_are(folders):
    """With the CPU for an accelerator, as its hooks run there all the same."""
    model = diffusion.find_model(str(folders["StableDiffusionXL"]))
    pipeline = diffusion.load_pipeline(model, "cpu", torch.float32, offload=True)
    assert hasattr(pipeline.unet, "_hf_hook") and hasattr(pipeline.text_encoder_2, "_hf_hook")
    assert not hasattr(pipeline.vae, "_hf_hook")
    first, *_, last = pipeline._all_hooks
    assert first.model is pipeline.text_encoder and first.hook.prev_module_hook.model is pipeline.unet is last.model
    plain = load(folders["StableDiffusionXL"])
    offloaded = main.Problem(plain.args, model, pipeline, plain.device, main.Processes())
    torch.testing.assert_close(sequential(plain), sequential(offloaded), atol=1e-4, rtol=1e-4)


def test_code_of_a_models_own_is_not_run(folders, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "OwnPipeline"]}))
    with pytest.raises(diffusion.ModelError, match="OwnPipeline.*this program samples"):
        diffusion.find_model(str(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_runs_and_is_near_float32(family, dtype, folders):
    half, whole = (load(folders[family], "--dtype", kind) for kind in (dtype, "float32"))
    assert getattr(half.pipeline, half.model.family.network).dtype == getattr(torch, dtype)
    if dtype == "float16" and family in ("StableDiffusionXL", "PixArt-Sigma"):
        assert half.pipeline.vae.dtype == torch.float32
    ours, truth = sequential(half)[1], sequential(whole)[1]
    assert (ours - truth).abs().mean() < 0.1 * truth.abs().mean() and half.image(ours[None]).shape[2] == 3
