"""Arguments of the pipeline's own call: from the command, from Python, swept and recorded; images and videos."""

import copy
import io
import os

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from peft import LoraConfig
from PIL import Image

import main
import utils
from asked import read_call
from conftest import arguments, pixels, sample_records
from pipelines import ltx, stable_diffusion
from refinement import difference
from sampler import Sampler
from settings import SettingError, Settings
from study import bench

IMAGE_TO_IMAGE = ["--pipeline", "StableDiffusionImg2ImgPipeline", "-gs", "2"]


def photo(path, seed=0):
    """Write an image with an alpha channel, and return it as pipelines receive it."""
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 4), np.uint8)
    Image.fromarray(values).save(path)
    return Image.fromarray(values).convert("RGB")


@pytest.fixture
def run(tiny, tmp_path):
    def run(*more, model=tiny, out="out"):
        return main.main(arguments(tmp_path / out, model, *more, prompts=["a moon"])), tmp_path / out

    return run


def test_image_to_image_from_the_command_and_from_python_equals_the_pipelines_own(run, tiny, tmp_path):
    picture = photo(tmp_path / "photo.png")
    given = ["--call", f"image={tmp_path / 'photo.png'}", "--call", "strength=0.6", "-tol", "0"]
    status, out = run(*IMAGE_TO_IMAGE, *given)
    (record,) = sample_records(out)
    assert status == 0 and record["result"]["steps"] == 5, "0.6 of nine"
    how = {"image": picture, "strength": 0.6, "guidance_scale": 2.0}
    recorded = record["made_by"]["arguments"]
    assert recorded.pop("image").startswith("photo.png ") and recorded == {"guidance_scale": 2.0, "strength": 0.6}
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(tiny)
    sampler = Sampler(pipeline, Settings(fine_steps=9, coarse_steps=3, tolerance=0))
    sample = sampler("a moon", **how)
    assert (pixels(out / "srds_final.png") == sample.image).all() and sample.serial_evaluations == 5
    pipeline.scheduler, generator = sampler.model.scheduler, torch.Generator().manual_seed(42)
    (image,) = pipeline("a moon", num_inference_steps=9, generator=generator, output_type="np", **how).images
    assert difference(sample.image, np.round(image * 255)) < 0.1
    assert difference(sampler("a moon", **how | {"strength": 0.9}).image, sample.image) > 0.5


def test_an_image_is_known_by_its_content_and_arguments_are_swept(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "photo.png"
    given = [*IMAGE_TO_IMAGE, "--call", f"image={path}", "--sweep", "strength=0.3,1"]
    photo(path)
    assert run(*given)[0] == 0
    assert "sweep of strength: 2 settings" in capsys.readouterr().out
    path.rename(path.with_name("same.png"))
    photo(path, seed=1)
    assert run(*given)[0] == 0
    assert "must be made again: those in the directory have image 'photo.png " in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 4
    columns = (tmp_path / "out" / "results.csv").read_text().splitlines()[0]
    assert '"guidance_scale","negative_prompt","height","width","image","strength"' in columns


REFUSED = {
    "height": "--call: 'height' is not a new argument of the pipeline's call with a value; give each",
    "call=3": "--call: 'call=3' is not a new argument", "fine_steps=3": "--call: 'fine_steps=3' is not a new argument",
    "image=nowhere.png": "image: 'nowhere.png' cannot be read (there is no such file); give one image",
    "image=pipe.png": "(there is no such file)", "image=text.png": "cannot be read (cannot identify image file",
    "image=deep.png": "cannot be read (frames: 1, pixel mode: I;16); give one image of 8 bits a channel",
    "strenght=0.5": "strenght: '0.5' cannot be given to", "output_type=pt": "output_type: 'pt' cannot be given to",
    "self=3": "self: '3' cannot be given to", "kwargs=3": "kwargs: '3' cannot be given to",
    "num_images_per_prompt=2": "num_images_per_prompt: '2' cannot be given to",
    "prompt=b": "--prompt: ('a moon',) cannot be given together with --call; give one of them",
    "guidance_scale=3": "--guidance-scale/-gs: 2 cannot be given together with --call; give one of them",
    "height=-1": "--height: -1 is not usable; give a whole number from 1",
}  # fmt: skip


@pytest.mark.parametrize("given, words", REFUSED.items())
def test_an_argument_that_cannot_be_used_is_one_line_before_a_model_is_loaded(
    given, words, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    assert run(*IMAGE_TO_IMAGE, "--call", given)[0] == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_a_pipeline_that_diffusers_does_not_have_is_refused(run, capsys):
    assert run("--pipeline", "StableDiffusionImg2Img")[0] == 2
    assert "is not a pipeline of diffusers; did you mean StableDiffusionImg2ImgPipeline?" in capsys.readouterr().err


def test_values_are_images_json_or_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = photo("a.png")
    (tmp_path / "notes").write_text("of text")
    words = ["i=a.png", 'many=["a.png", 2]', "x=0.5", "y=null", "z={}", "t=a cat", "nan=NaN", "inf=1e999", "f=notes"]
    words += ["b=False", "none=None", "half=.5", "size=(64, 64)", "quoted='1984'", "negative-prompt=1984"]
    found = read_call([*words, "clip-skip=1", "e=", "long=" + "x" * 10_000])
    assert found.pop("i") == picture and found.pop("many") == [picture, 2] and len(found.pop("long")) == 10_000
    expected = {"x": 0.5, "y": None, "z": {}, "t": "a cat", "nan": "NaN", "inf": "1e999", "f": "notes", "clip_skip": 1}
    expected |= {"e": "", "b": False, "none": None, "half": 0.5, "size": (64, 64), "quoted": "1984"}
    assert found == expected | {"negative_prompt": "1984"}
    for refused, why in ((["x=1", "x=2"], "give each once"), (['x=["b.png"]'], "there is no such file")):
        with pytest.raises(SettingError, match=why):
            read_call(refused)
    with pytest.raises(SettingError, match="give some text"):
        read_call(["t=a\0b"])


def test_a_video_is_a_sheet_of_frames_and_an_animation(run, tmp_path):
    ltx().save_pretrained(tmp_path / "ltx")
    status, out = run("--height", "64", "--width", "96", "--call", "num_frames=9", model=tmp_path / "ltx")
    (record,), sheet = sample_records(out), pixels(out / "srds_final.png")
    assert status == 0 and sheet.shape == (3 * 64 + 8, 3 * 96 + 8, 3)
    animation = Image.open(io.BytesIO((out / "srds_final.webp").read_bytes()))
    assert animation.n_frames == 9 and animation.size == (96, 64)
    sampler = Sampler(ltx(), Settings(fine_steps=9, coarse_steps=3), {"height": 64, "width": 96, "num_frames": 9})
    first, *_ = sampler.refine("a moon")
    truth = sampler.sequential("a moon").image
    assert first.image.shape == truth.shape == (9, 64, 96, 3)
    assert record["result"]["refinements"][0]["difference"] == pytest.approx(difference(first.image, truth), abs=0.01)
    assert (pixels(out / "srds_ddim_gt.png")[68:132, 100:196] - truth[4].astype(int)).max() <= 1, "the middle frame"


def test_a_video_of_one_frame_is_shown_as_an_image(run, tmp_path):
    ltx().save_pretrained(tmp_path / "ltx")
    status, out = run("--height", "64", "--width", "96", "--call", "num_frames=1", model=tmp_path / "ltx")
    assert status == 0 and pixels(out / "srds_final.png").shape == (64, 96, 3)
    assert (out / "srds_refinements.webp").exists() and not (out / "srds_final.webp").exists()


def test_a_long_videos_sheet_has_at_most_25_frames():
    video = np.arange(81, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 3)
    cells = utils.sheet(video)[::5, ::5, 0].flatten()
    assert len(cells) == 25 and (cells[0], cells[-1]) == (0, 80) and (np.diff(cells) > 0).all()


def test_given_latents_are_sampled_in_a_batch_and_as_by_the_pipeline():
    sampler = Sampler(stable_diffusion(), Settings(fine_steps=10, coarse_steps=3, tolerance=0))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    last = sampler("a moon", latents=latents).refinements[-1]
    assert last.network_calls == last.serial_evaluations < last.total_evaluations
    pipeline = copy.copy(sampler.pipeline)
    pipeline.scheduler = sampler.model.scheduler
    pipeline.set_progress_bar_config(disable=True)
    truth = pipeline("a moon", num_inference_steps=10, latents=latents, output_type="latent").images
    torch.testing.assert_close(last.states[-1:], truth, atol=1e-4 * float(truth.std()), rtol=1e-4)


def test_a_text_is_encoded_again_at_another_scale_of_a_lora():
    sampler = Sampler(stable_diffusion(), Settings(fine_steps=4, coarse_steps=2))
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    sampler.pipeline.text_encoder.add_adapter(config)
    prompt, scaled = sampler.encode("a moon"), {"cross_attention_kwargs": {"scale": 3.0}}
    plain = sampler.sequential(prompt, cross_attention_kwargs={"scale": 0.0}).states
    found = sampler.sequential(prompt, **scaled).states
    assert found.equal(sampler.sequential("a moon", **scaled).states) and not found.equal(plain)


def test_prompts_with_other_arguments_share_what_is_encoded():
    sampler, texts = Sampler(stable_diffusion(), Settings(fine_steps=4, coarse_steps=2)), []
    with sampler.pipeline.text_encoder.register_forward_pre_hook(lambda encoder, inputs: texts.append(inputs)):
        prompt = sampler.encode("a moon")
        images = [sampler.sequential(prompt, guidance_scale=scale).image for scale in (2, 4, 4)]
    assert len(texts) == 2 and (images[1] == images[2]).all() and (images[0] != images[1]).any()
