"""The demo model and its scenes."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from conftest import sample_records
from models import scenes
from models.loading import DEMO
from refinement import difference
from sampler import Sampler
from settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (ROOT / "prompts.txt").read_text().splitlines()


def test_checker_reads_scenes_back_and_captions_say_what_is_asked():
    rng = np.random.default_rng(3)
    drawn = [scenes.sample(rng) for _ in range(1000)]
    assert np.mean([scenes.read(image) == attributes for image, attributes in drawn]) >= 0.98
    one, other = (scenes.render(rng, "dusk", "red sun", "purple mountains").astype(int) for _ in range(2))
    assert abs(one - other).mean() > 2, "no two scenes of a caption are alike"
    for _ in range(50):
        text = scenes.caption(rng, sky="night", light="empty sky", land="a calm sea")
        assert "at night" in text and "an empty sky" in text and "a calm sea" in text
    assert scenes.caption(rng) == "" and scenes.caption(rng, land="green hills") == "green hills"


def test_demo_is_small_and_safe():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 20e6


def test_demo_loads_by_plain_diffusers_without_remarks_and_is_sampled_as_by_its_pipeline(caplog, recwarn, monkeypatch):
    """To a tenth of a grey level of the image's 255, and 1e-4 of the latents' scale."""
    for library in ("diffusers", "transformers"):
        caplog.set_level(logging.WARNING, library)
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO)
    # StableDiffusionPipeline's annotation names AutoencoderKL alone, and diffusers remarks on any other class.
    assert [record for record in caplog.messages if "AutoencoderTiny" not in record] == [] and not recwarn.list
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.scheduler.config.timestep_spacing == "trailing"
    pipeline.set_progress_bar_config(disable=True)
    sampler = Sampler(pipeline, Settings(fine_steps=25, coarse_steps=5), {"guidance_scale": 2})
    ours, asked = sampler.sequential(PROMPTS[0]), {"num_inference_steps": 25, "height": 64, "width": 64}
    asked |= {"guidance_scale": 2, "latents": sampler.loop("").x, "output_type": "latent"}
    theirs = pipeline(PROMPTS[0], **asked).images
    torch.testing.assert_close(ours.states[-1:], theirs, atol=1e-4 * float(theirs.std()), rtol=1e-4)
    assert difference(ours.image, sampler.image(theirs)) < 0.1


@pytest.mark.slow
def test_readme_demo_converges_to_the_ground_truth(tmp_path):
    """The README's demo command: no refinement is worse than the initialisation, and the third is within 1."""
    argv = ["--prompts", "prompts.txt", "--output-dir", str(tmp_path), "--model", "demo", "--device", "cpu"]
    process = subprocess.run([sys.executable, "main.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=480)
    assert process.returncode == 0 and process.stderr == ""
    records = sample_records(tmp_path)
    assert [record["made_by"]["prompt"] for record in records] == PROMPTS
    for refinements in (record["result"]["refinements"] for record in records):
        differences, last = [entry["difference"] for entry in refinements], refinements[-1]
        assert last["verdict"] == "converged" and last["serial_evaluations"] < 100
        assert max(differences) <= differences[0] + 0.5 and differences[:4][-1] < 1, differences


@pytest.mark.slow
def test_the_model_of_real_pixels_loads_by_name_and_without_remarks(capfd, recwarn):
    sampler = Sampler.from_pretrained("fashion", Settings(fine_steps=25, coarse_steps=5), device="cpu")
    assert sampler.shape == (1, 28, 28) and not capfd.readouterr().err and not list(recwarn)
    truth = sampler.sequential("")
    assert truth.image.shape == (28, 28, 3) and 20 < truth.image.mean() < 200 and truth.image.std() > 30
    for method in ("srds", "collocation"):
        sample = sampler.vary(method=method, tolerance=0)("")
        assert sample.stop_reason == {"srds": "exact", "collocation": "all nodes"}[method]
        assert difference(sample.image, truth.image) < 0.2


def test_the_benchmarks_have_a_row_for_each_refinement_of_each_setting(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import common

    sampler = common.load(fine_steps=4, coarse_steps=2, tolerance=0)
    table = common.refinements(sampler, [{"schedule": "sweep"}, {"method": "collocation"}], common.pairs(1))
    assert [*table[table["schedule"] == "sweep"].k] == [0, 1, 2] and 0 in [*table[table["method"] == "collocation"].k]
    assert (table.groupby("method", dropna=False)["difference"].last() < 0.1).all()
