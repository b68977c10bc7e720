"""Experiments in one command: sweeps over settings, plans, tables and measures of images."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import main
import pipelines
from conftest import pixels, run_record, sample_folders, sample_records
from models import scenes
from models.families import StableDiffusion
from sampler import Sampler
from study import bench, metrics

PROMPTS = ["a moon", "a sun"]
SHORT = ["-fs", "6", "--max-iterations", "2"]
PLAN = {"blocks": 3, "schedule": "sweep", "refinements": 2, "srds": 1.0, "sequential": 2.0, "calls": {1: 0.1}}


def run(out, model, *more, prompts=PROMPTS):
    """The exit status of a command in which no setting but the guidance is given."""
    texts = [word for text in prompts for word in ("--prompt", text)]
    fixed = ["-o", str(out), "--model", str(model), "--device", "cpu", "-gs", "2", "--no-report"]
    return main.main([*fixed, *texts, *more])


@pytest.fixture
def counted(monkeypatch):
    """What was called how often: a model loaded, a text encoded, a ground truth sampled."""
    calls = []

    def count(owner, name, what=lambda *args, **how: True):
        original = getattr(owner, name)
        counting = lambda *args, **how: calls.extend([name] * what(*args, **how)) or original(*args, **how)
        monkeypatch.setattr(owner, name, counting)

    count(bench, "load_pipeline")
    count(Sampler, "sequential", lambda *args, coarse=False, **how: not coarse)
    count(StableDiffusion, "encode", lambda self, pipeline, prompt, *how: prompt in PROMPTS)
    return lambda: {name: calls.count(name) for name in ("load_pipeline", "sequential", "encode")}


@pytest.mark.slow
def test_a_sweep_shares_what_its_settings_share_and_changes_no_result(tiny, tmp_path, counted, capsys):
    swept = ["--sweep", "cs=2,3", "--sweep", "tol=0,100", *SHORT]
    assert run(tmp_path / "sweep", tiny, *swept, "--seeds", "3,5", prompts=PROMPTS[:1]) == 0
    assert counted() == {"load_pipeline": 1, "sequential": 2, "encode": 1}
    printed = capsys.readouterr().out
    assert "; sweep of coarse_steps, tolerance: 4 settings\n" in printed
    means = [line.split() for line in printed.splitlines() if "coarse steps 2, tolerance 0" in line]
    assert len(means) > 1 and means[-1][5:7] == ["2", "0"] and "±" in means[-1], "two samples, none failed"
    records = [each["made_by"] for each in sample_records(tmp_path / "sweep")]
    assert [(each["coarse_steps"], each["tolerance"]) for each in records] == [(2, 0), (2, 100), (3, 0), (3, 100)] * 2
    assert pd.read_csv(tmp_path / "sweep" / "results.csv").final.sum() == 8
    alone = ["-cs", "3", "-tol", "0", "--seed", "5", *SHORT]
    assert run(tmp_path / "alone", tiny, *alone, prompts=PROMPTS[:1]) == 0
    (single,), own = sample_folders(tmp_path / "alone"), sample_folders(tmp_path / "sweep")[6]
    assert single.name == own.name
    assert all(abs(pixels(single / path.name) - pixels(path)).max() <= 1 for path in own.glob("srds_[!f]*.png"))
    assert run(tmp_path / "sweep", tiny, *alone, prompts=PROMPTS[:1]) == 0
    assert "1 of 1 samples are there already" in capsys.readouterr().out


def test_settings_are_swept_in_step(tiny, tmp_path):
    argv = ["--sweep", "fine-steps:coarse-steps=9:3,4:2,6:sqrt", "--no-ground-truth", "--max-iterations", "1"]
    assert run(tmp_path, tiny, *argv, "--sweep", "tolerance=5,1", prompts=PROMPTS[:1]) == 0
    steps = [(each["made_by"]["fine_steps"], each["made_by"]["coarse_steps"]) for each in sample_records(tmp_path)]
    assert steps == [(9, 3), (9, 3), (4, 2), (4, 2), (6, 2), (6, 2)]


@pytest.mark.parametrize(
    "words, told",
    [
        (["coarse_steps"], "--sweep: 'coarse_steps' is not usable; give a setting and its values"),
        (["model=a,b"], "--sweep: 'model=a,b' is not usable"),
        (["seed=1,2"], "--sweep: 'seed=1,2' is not usable"),
        (["cs=2,x"], "--coarse-steps/-cs: 'x' is not usable; give a whole number"),
        (["cs=2,200"], "--coarse-steps/-cs: 200 is more than the 100 fine steps"),
        (["cs=2,2"], "'cs=2,2' repeats a setting or value"),
        (["cs=2", "coarse_steps=3"], "'coarse_steps=3' repeats coarse_steps"),
        (["guidance_scale=1,2"], "cannot be given together with --sweep; give one of them"),
        (["solver=ddim,euler"], "--solver: 'euler' cannot be used with"),
        (["method=srds,collocation", "nodes=4,5"], "--nodes: 4 is for collocation, not srds"),
        (["cs=2,auto", "method=srds,collocation"], "'auto' is for srds, not collocation; give a number"),
    ],
)
def test_all_values_of_a_sweep_are_checked_before_any_is_sampled(words, told, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    assert run(tmp_path / "out", tiny, *(word for each in words for word in ("--sweep", each))) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_truth_that_fails_does_so_once_and_a_sweep_of_failures_ends_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    made = []

    def fail(*args, **how):
        made.append(1)
        raise MemoryError

    monkeypatch.setattr(Sampler, "sequential", fail)
    assert run(tmp_path, tiny, "--sweep", "tolerance=1,2,3", "-cs", "2", *SHORT, prompts=PROMPTS[:1]) == 1
    captured = capsys.readouterr()
    assert len(made) == 1 and captured.err.count("\n") == 1 and "3 of 3 samples failed" in captured.err


def test_a_plan_is_a_number_from_then_on_and_one_that_fails_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "make_plan", lambda *args: PLAN)
    argv = ["-fs", "6", "--no-ground-truth"]
    assert run(tmp_path, tiny, *argv, "--sweep", "cs=auto,2") == 0
    made = [(each["made_by"]["coarse_steps"], each["made_by"]["schedule"]) for each in sample_records(tmp_path)]
    assert made == [(3, "sweep"), (2, "pipelined")] * 2 and capsys.readouterr()
    assert run(tmp_path, tiny, *argv, "-cs", "3", "--schedule", "sweep") == 0
    assert "2 of 2 samples are there already" in capsys.readouterr().out

    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr(bench, "make_plan", no_memory)
    assert run(tmp_path, tiny, *argv, "-cs", "auto", "--expected-refinements", "1") == 1
    error = capsys.readouterr().err
    assert "out of memory; try a smaller --max-batch" in error and error.count("\n") == 1


def test_scores_are_paired_with_each_samples_own_ground_truth(tmp_path, capsys):
    prompt = "a red sun over purple mountains at dusk"
    assert run(tmp_path, "demo", "-fs", "4", "-cs", "2", "--metrics", "scene", prompts=[prompt, "fog"]) == 0
    table = pd.read_csv(tmp_path / "results.csv")
    asked = table[table.prompt == prompt]
    assert asked.scene.isin([0, 1 / 3, 2 / 3, 1]).all() and table[table.prompt == "fog"].scene.isna().all()
    truth = pixels(sample_folders(tmp_path)[0] / "srds_ddim_gt.png").astype(np.uint8)
    assert np.allclose(asked.scene - asked.scene_difference, metrics.scene(truth, prompt))
    assert "scene - truth's" in capsys.readouterr().out
    image = scenes.render(np.random.default_rng(0), "dusk", "red sun", "green hills")
    assert metrics.scene(image, "a red sun over green hills at dusk") == 1
    assert metrics.scene(image, "a red sun over purple mountains at noon") == 1 / 3
    assert metrics.scene(image, "a red sun") == 1 and metrics.scene(image, "a cat") is None


@pytest.fixture
def tiny_clip(monkeypatch):
    """In place of the hub's CLIP, one with random weights, of a seed whose scores are above 0, where they are cut."""
    torch.manual_seed(8)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    words = {"vocab_size": 54, "max_position_embeddings": 24, "eos_token_id": 53, **size}
    config = CLIPConfig(text_config=words, vision_config={"image_size": 32, "patch_size": 16, **size}, projection_dim=8)
    model, images = CLIPModel(config), CLIPImageProcessorPil(size=32, crop_size=32)
    processor = CLIPProcessor(images, pipelines.clip()[1])
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda name: model)
    monkeypatch.setattr(CLIPProcessor, "from_pretrained", lambda name: processor)
    return model.eval(), processor


def test_clip_scores_are_cosines_of_image_and_prompt(tiny_clip):
    measure = metrics.Metrics(["clip"]).measure
    images = np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3), np.uint8)
    found, other = measure(images[0], images[1], "a cat"), measure(images[1], None, "a cat")
    assert 0 < found["clip"] < 100 and found["clip_difference"] != 0 and other["clip_difference"] is None
    assert found["clip_difference"] == pytest.approx(found["clip"] - other["clip"], abs=1e-4)
    model, processor = tiny_clip
    with torch.no_grad():
        features = model(**processor(images=[images[0]], text=["a cat"], return_tensors="pt"))
    cosine = torch.cosine_similarity(features.image_embeds, features.text_embeds)
    assert found["clip"] == pytest.approx(100 * float(cosine), abs=1e-3)


def test_lpips_is_the_distance_to_the_ground_truth(monkeypatch):
    monkeypatch.setattr(metrics, "lpips", lambda: lambda image, truth: (image - truth).abs().mean())
    image = np.full((8, 8, 3), 255, np.uint8)
    assert metrics.Metrics(["lpips"]).measure(image, image // 5, "a")["lpips"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "more, told",
    [
        (["lpips"], "argument --metrics: 'lpips' needs torchvision"),
        (["clip"], "argument --metrics: 'clip' needs the weights of openai/clip"),
        (["lpips", "--no-ground-truth"], "'lpips' is a distance to the ground truth"),
    ],
)
def test_metrics_that_cannot_be_measured_are_one_line(more, told, tiny, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **how):
        raise OSError("no connection")

    monkeypatch.setattr(CLIPModel, "from_pretrained", unreachable)
    monkeypatch.setattr(metrics, "LearnedPerceptualImagePatchSimilarity", unreachable)
    monkeypatch.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    assert run(tmp_path / "out", tiny, "--metrics", *more) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_sweep_over_steps_is_reproduced_without_the_blocks_of_one_of_them(tiny, tmp_path):
    assert run(tmp_path, tiny, "--sweep", "fine-steps=4,12", "--max-iterations", "1") == 0
    assert "--coarse-steps" not in run_record(tmp_path)["reproduce"]
