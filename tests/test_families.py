"""Pipelines of every kind in memory: parity with diffusers' own call, refinements, adapters, offloading."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

import pipelines
from pipelines import FAMILIES, LATENT
from refinement import difference, trajectory_change
from sampler import Sampler
from settings import Settings

pytestmark = pytest.mark.slow  # test_loop has each kind of pipeline in a second
LORA = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux-dev", "Flux-schnell")


def make(family, pipeline=None, **changes):
    size = {} if family == "Unconditional" else {"height": 64, "width": 96}
    return Sampler(pipeline or FAMILIES[family](), Settings(fine_steps=8, coarse_steps=3), size).vary(**changes)


def red_sun(family, sampler):
    """A prompt; PixArt is not to resize images to the sizes that it was trained for."""
    return sampler.encode("a red sun", **{"use_resolution_binning": False} if "PixArt" in family else {})


def theirs(family, sampler, output_type, **settings):
    """What the family's own pipeline makes of the same seed, under its own scheduler or trailing DDIM."""
    pipeline, kept = sampler.pipeline, sampler.pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    settings |= {"generator": torch.Generator().manual_seed(sampler.settings.seed), "num_inference_steps": 8}
    if family == "Unconditional":
        scheduler = DDIMScheduler.from_config(kept.config, timestep_spacing="trailing")
        assert scheduler.config.clip_sample
        pipeline = DDIMPipeline(pipeline.unet, scheduler)
        pipeline.scheduler = scheduler  # the constructor makes one of its own
        pipeline.set_progress_bar_config(disable=True)
        (image,) = pipeline(**settings, output_type="np" if output_type == "latent" else "pil").images
        return torch.from_numpy(image).permute(2, 0, 1) * 2 - 1 if output_type == "latent" else image
    if not sampler.model.flow:
        pipeline.scheduler = DDIMScheduler.from_config(kept.config, timestep_spacing="trailing", clip_sample=False)
    if "PixArt" in family:
        settings |= {"use_resolution_binning": False}
    (image,) = pipeline("a red sun", output_type=output_type, height=64, width=96, **settings).images
    pipeline.scheduler = kept
    return image


def assert_parity(family, sampler, guidance=None):
    """To float32's rounding: 2e-4 of the latents' scale, and one grey level of the image."""
    settings = {} if guidance is None else {"guidance_scale": guidance}
    ours, truth = sampler.sequential(red_sun(family, sampler)), theirs(family, sampler, "latent", **settings)
    torch.testing.assert_close(ours.states[-1], truth, atol=2e-4 * float(truth.std()), rtol=2e-4)
    image = np.asarray(theirs(family, sampler, "pil", **settings)).astype(int)
    assert abs(ours.image - image).max() <= 1
    return ours.states[-1]


@pytest.mark.parametrize(
    "family, guidance",
    [(name, scale) for name in LATENT if name != "Flux-schnell" for scale in (1.0, 4.0)]
    + [("Flux-schnell", None), ("Unconditional", None)],
)
def test_sequential_equals_diffusers_own_pipeline(family, guidance):
    assert_parity(family, make(family, guidance_scale=guidance), guidance)


@pytest.mark.parametrize("family", LORA)
def test_a_pipeline_with_a_lora_is_sampled_as_it_is_fused_or_not(family, tmp_path):
    """With weights that peft and the family's own pipeline made and saved, none of them zero."""
    plain, other, adapted = make(family), FAMILIES[family](), FAMILIES[family]()
    part = "unet" if hasattr(other, "unet") else "transformer"
    network, layers = getattr(other, part), ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False), network)
    type(other).save_lora_weights(tmp_path, **{f"{part}_lora_layers": get_peft_model_state_dict(network)})
    adapted.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors", adapter_name="other")
    adapted.set_adapters(["other"], [0.7])
    ours = assert_parity(family, make(family, adapted))
    assert (ours - plain.sequential("a red sun").states[-1]).abs().mean() > 1e-4
    adapted.fuse_lora()
    assert_parity(family, make(family, adapted))


@pytest.mark.parametrize("family", LATENT)
def test_an_offloaded_pipeline_is_sampled_as_any_other(family):
    """With the CPU for an accelerator, as its hooks run there all the same."""
    plain = make(family)
    plain = plain.sequential(red_sun(family, plain)).states
    pipeline = FAMILIES[family]()
    pipeline.enable_model_cpu_offload(device="cpu")
    hooks = list(pipeline._all_hooks)
    sampler = make(family, pipeline)
    prompt = red_sun(family, sampler)
    torch.testing.assert_close(sampler.sequential(prompt).states, plain, atol=1e-5, rtol=1e-5)
    sampler(prompt)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert pipeline._all_hooks == hooks and all(hasattr(part, "_hf_hook") for part in parts)
    assert theirs(family, sampler, "latent").isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_refinements_of_both_methods_end_at_the_sequential_sample(family):
    """SRDS to 1e-4 of the states' scale: kernels for other batch shapes round differently."""
    sampler = make(family)
    prompt = red_sun(family, sampler)
    truth = sampler.sequential(prompt).states
    limit, plain = 1e-4 * float(truth.std()), list(sampler.iterates(prompt))
    assert plain[-1].exact and plain[-1].ticks == 8
    torch.testing.assert_close(plain[-1].states, truth, atol=limit, rtol=1e-4)
    varied = sampler.vary(method="collocation", fine_steps=12, nodes=12, window=4, tolerance=0)
    last, truth = varied(prompt).refinements[-1], varied.sequential(prompt)
    assert last.all_nodes and difference(last.image, truth.image) < 0.1
    assert trajectory_change(last.states, truth.states) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", LATENT)
def test_a_pipeline_in_half_precision_stays_so_and_is_near_float32(family, dtype):
    half, whole = make(family, FAMILIES[family]().to(dtype)), make(family)
    x, n = whole.loop(red_sun(family, whole)).x, torch.tensor([0])
    ours, truth = (each.loop(red_sun(family, each)).denoise(x, n) for each in (half, whole))
    assert (ours - truth).abs().mean() < 0.1 * truth.abs().mean() and ours.dtype == torch.float32
    modules = [part for part in half.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {value.dtype for part in modules for value in part.parameters()} == {dtype}


def test_pixel_models_with_their_files_at_the_top_load(tmp_path):
    """As google/ddpm-church-256 keeps them, pickled weights included."""
    pipelines.pixels().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    (tmp_path / "flat").mkdir()
    for path in (tmp_path / "pickled").rglob("*.*"):
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    assert (tmp_path / "flat" / "diffusion_pytorch_model.bin").exists()
    settings = Settings(fine_steps=8, coarse_steps=3)
    loaded = Sampler.from_pretrained(tmp_path / "flat", settings, device="cpu").sequential("").states
    torch.testing.assert_close(
        loaded, Sampler(pipelines.pixels(), settings).sequential("").states, atol=1e-4, rtol=1e-4
    )
