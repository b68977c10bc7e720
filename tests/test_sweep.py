"""Experiments in one command: sweeps over settings, measures of images, the preview."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import main
import pipelines
import sampler as door
from conftest import contents, files, pixels, run_record
from models import scenes
from models.families import StableDiffusion
from sampler import Sampler, Settings
from study import metrics, preparation, preview, run
from study.earlier import LOCK
from study.forecast import Forecast

PROMPTS = ["a moon", "a sun"]
CLIP_SEED = 8
SHORT = ["-fs", "6", "--max-iterations", "2"]


def sweep(out, model, *more, prompts=PROMPTS):
    """A command line in which no setting but the guidance is given."""
    texts = [word for text in prompts for word in ("--prompt", text)]
    return ["-o", str(out), "--model", str(model), "--device", "cpu", "-gs", "2", "--no-report", *texts, *more]


@pytest.fixture
def counted(monkeypatch):
    """What was called how often: a model loaded, a text encoded, a ground truth sampled."""
    calls = []

    def count(owner, name, what=lambda *args, **how: True):
        original = getattr(owner, name)

        def counting(*args, **how):
            calls.extend([name] if what(*args, **how) else [])
            return original(*args, **how)

        monkeypatch.setattr(owner, name, counting)

    count(preparation, "load_pipeline")
    count(Sampler, "sequential", lambda *args, coarse=False, **how: not coarse)
    count(StableDiffusion, "encode", lambda self, pipeline, prompt, *how: prompt in PROMPTS)
    return lambda: {name: calls.count(name) for name in ("load_pipeline", "sequential", "encode")}


def test_a_sweep_shares_what_its_settings_share_and_changes_no_result(tiny, tmp_path, counted, capsys):
    swept = ["--sweep", "coarse-steps=2,3", "--sweep", "tol=0,100", *SHORT]
    assert main.main(sweep(tmp_path / "sweep", tiny, *swept, "--seeds", "3,5", prompts=PROMPTS[:1])) == 0
    assert counted() == {"load_pipeline": 1, "sequential": 2, "encode": 1}
    printed = capsys.readouterr().out
    assert "sweep: 4 settings of 2 samples, 8 to sample; 2 ground truths, 12 evaluations" in printed
    assert "foretold from one sample of each: " in printed
    means = [line for line in printed.splitlines() if line.startswith("coarse_steps=2, tolerance=0  ")]
    assert len(means) == 1 and means[0].split()[2:4] == ["2", "0"] and " ± " in means[0]
    results = run_record(tmp_path / "sweep")["prompts"]
    settings = [(result["settings"]["coarse_steps"], result["settings"]["tolerance"]) for result in results]
    assert settings == [(2, 0), (2, 100), (3, 0), (3, 100)] * 2
    assert results[6]["setting"] == "coarse_steps=3, tolerance=0" and results[6]["seed"] == 5
    assert results[6]["folder"] == "006-a-moon-seed-5-coarse-steps-3-tolerance-0"
    alone = ["-cs", "3", "-tol", "0", "--seed", "5", *SHORT]
    assert main.main(sweep(tmp_path / "alone", tiny, *alone, prompts=PROMPTS[:1])) == 0
    single, own = tmp_path / "alone", tmp_path / "sweep" / results[6]["folder"]
    for name in files(single) - {"run.json", "result.json", "results.csv"}:
        same = pixels if name.endswith(".png") else lambda path: pd.read_csv(path, index_col=0).to_numpy()
        named = "filmstrip" in name or "plot" in name  # in the pictures of a sweep
        assert named or np.allclose(same(single / name), same(own / name), atol=1e-4)


def test_a_sweep_starts_from_its_prompts_or_from_the_same_sweep(tiny, tmp_path, capsys):
    kept = ["--keep-trajectories", "--no-ground-truth", *SHORT]
    assert main.main(sweep(tmp_path / "plain", tiny, "-cs", "2", *kept)) == 0
    swept = ["--sweep", "cs=2,3", "--no-ground-truth", *SHORT]
    assert (
        main.main(
            sweep(tmp_path / "sweep", tiny, *swept, "--keep-trajectories", "--start-from", str(tmp_path / "plain"))
        )
        == 0
    )
    assert main.main(sweep(tmp_path / "again", tiny, *swept, "--start-from", str(tmp_path / "sweep"))) == 0
    assert main.main(sweep(tmp_path / "other", tiny, "-cs", "2", "--start-from", str(tmp_path / "sweep"))) == 2
    assert "is of another sweep" in capsys.readouterr().err


def test_a_sweep_is_one_tidy_table(tiny, tmp_path):
    assert main.main(sweep(tmp_path, tiny, "--sweep", "cs=2,auto", "--sweep", "method=srds", *SHORT)) == 0
    table = pd.read_csv(tmp_path / "results.csv")
    assert set(table.setting) == {"coarse_steps=2, method=srds", "coarse_steps=auto, method=srds"}
    assert table[table.setting.str.contains("=2")].coarse_steps.eq(2).all()
    finals = table[table.final].groupby(["prompt", "setting"]).image_error.mean()
    assert len(finals) == 4 and (table.widest_tick <= table.coarse_steps).all() and (table.widest_tick > 1).any()
    assert run_record(tmp_path)["settings"]["sweep"] == {"coarse_steps": [2, "auto"], "method": ["srds"]}


def test_the_widest_tick_is_what_the_network_sees(tiny, monkeypatch):
    seen, predict = [], StableDiffusion.predict
    watching = lambda self, pipeline, x, *rest, **how: seen.append(len(x)) or predict(self, pipeline, x, *rest, **how)
    sampler = Sampler.from_pretrained(tiny, Settings(fine_steps=9, coarse_steps=3, guidance_scale=1.0, tolerance=0))
    monkeypatch.setattr(StableDiffusion, "predict", watching)
    for refinement in sampler.refine("a"):
        assert refinement.widest_tick == max(seen)


@pytest.mark.parametrize(
    "words, told",
    [
        (["coarse_steps"], "--sweep: 'coarse_steps' is not usable; give a setting and its values"),
        (["model=a,b"], "--sweep: 'model=a,b' is not usable"),
        (["seed=1,2"], "--sweep: 'seed=1,2' is not usable"),
        (["cs=2,x"], "--coarse-steps/-cs: 'x' is not usable; give a whole number"),
        (["cs=2,200"], "--coarse-steps/-cs: 200 is more than the 100 fine steps"),
        (["cs=2,2"], "'cs=2,2' has a value twice"),
        (["cs=2", "coarse_steps=3"], "'coarse_steps=3' is of coarse_steps, as another is"),
        (["guidance_scale=1,2"], "'guidance_scale=1,2' is given beside --guidance-scale; give one of them"),
        (["solver=ddim,euler"], "--solver: 'euler' cannot be used with"),
        (["method=srds,collocation", "nodes=4,5"], "--nodes: 4 is of collocation, not srds"),
        ([f"tolerance={','.join(map(str, range(501)))}"], "makes 1002 samples, more than 1000; give fewer values, or"),
    ],
)  # fmt: skip
def test_all_values_of_a_sweep_are_checked_before_any_is_sampled(words, told, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    assert main.main(sweep(tmp_path / "out", tiny, *(word for each in words for word in ("--sweep", each)))) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_setting_that_fails_is_a_row_with_its_error_and_the_others_go_on(tiny, tmp_path, monkeypatch, capsys):
    warm_up, predict = Sampler.warm_up, StableDiffusion.predict

    def failing(sampler):
        if sampler.settings.coarse_steps == 3:
            raise FloatingPointError("the network's output is not finite in float32")
        warm_up(sampler)

    def out_of_memory(self, pipeline, x, *rest, **how):
        if len(x) > 4:
            raise MemoryError
        return predict(self, pipeline, x, *rest, **how)

    monkeypatch.setattr(Sampler, "warm_up", failing)
    monkeypatch.setattr(StableDiffusion, "predict", out_of_memory)
    assert main.main(sweep(tmp_path, tiny, "--sweep", "cs=2,3,4", *SHORT)) == 1
    table = pd.read_csv(tmp_path / "results.csv")
    errors = table[table.final].groupby("coarse_steps").error.first()
    assert "not finite" in errors[3] and "out of memory" in errors[4] and pd.isna(errors[2])
    assert table[table.coarse_steps == 2].image_error.notna().all()
    assert "4 of 6 samples failed; the first, of coarse_steps=3: the network's" in capsys.readouterr().err


def test_a_plan_that_fails_is_a_failed_setting(tiny, tmp_path, monkeypatch):
    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr(door, "make_plan", no_memory)
    assert main.main(sweep(tmp_path, tiny, "--sweep", "cs=2,auto", *SHORT, prompts=PROMPTS[:1])) == 1
    errors = pd.read_csv(tmp_path / "results.csv").groupby("setting").error.first()
    assert "out of memory" in errors["coarse_steps=auto"] and pd.isna(errors["coarse_steps=2"])


def test_a_truth_that_fails_does_so_once_and_a_sweep_of_failures_ends_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    made = []

    def fail(*args, **how):
        made.append(1)
        raise MemoryError

    monkeypatch.setattr(Sampler, "sequential", fail)
    assert main.main(sweep(tmp_path, tiny, "--sweep", "tolerance=1,2,3", "-cs", "2", *SHORT, prompts=PROMPTS[:1])) == 1
    captured = capsys.readouterr()
    assert len(made) == 1 and captured.err.count("\n") == 1 and "3 of 3 samples failed" in captured.err
    assert "tolerance=3" in captured.out.splitlines()[-1]


def test_a_sweep_that_fails_at_all_settings_leaves_what_was_there(tiny, tmp_path, monkeypatch, capsys):
    assert main.main(sweep(tmp_path, tiny, "-cs", "2", *SHORT)) == 0
    before = contents(tmp_path)
    fail = lambda sampler: (_ for _ in ()).throw(FloatingPointError("not finite in float32"))
    monkeypatch.setattr(Sampler, "warm_up", fail)
    assert main.main(sweep(tmp_path, tiny, "--sweep", "cs=2,3", *SHORT)) == 1
    assert contents(tmp_path) == before


def test_a_sweep_that_is_cut_short_resumes_to_what_a_whole_one_leaves(tiny, tmp_path, monkeypatch, capsys):
    argv = ["--sweep", "cs=2,auto", "--no-ground-truth", *SHORT]
    plan = {"blocks": 3, "schedule": "pipelined", "refinements": 2, "srds": 1.0, "sequential": 2.0, "calls": {}}
    monkeypatch.setattr(door, "make_plan", lambda *args: plan)
    assert main.main(sweep(tmp_path / "whole", tiny, *argv)) == 0
    sample, made = run.sample, []

    def cut(*args, **how):
        if len(made) in (1, 3):
            made.append("cut")
            raise KeyboardInterrupt
        made.append("sample")
        return sample(*args, **how)

    monkeypatch.setattr(run, "sample", cut)
    for status in (130, 130, 0):
        assert main.main(sweep(tmp_path / "out", tiny, *argv, "--resume")) == status
        monkeypatch.setattr(door, "make_plan", lambda *args: pytest.fail("a plan was made again"))
    assert made.count("sample") == 4 and contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert main.main(sweep(tmp_path / "out", tiny, *argv[2:], "--sweep", "cs=2,4", "--resume")) == 2
    assert "--resume: finds other prompts in the earlier run, or seeds or settings" in capsys.readouterr().err


def test_a_sweep_is_extended_by_values_seeds_and_settings(tiny, tmp_path, monkeypatch, capsys):
    """Results, folders and plans stay; what tells a result from the others is that of the whole sweep."""
    argv, plan = ["--no-ground-truth", "-fs", "6"], {"blocks": 3, "schedule": "pipelined", "refinements": 2}
    monkeypatch.setattr(door, "make_plan", lambda *args: {**plan, "srds": 1.0, "sequential": 2.0, "calls": {}})
    assert main.main(sweep(tmp_path, tiny, *argv, "--sweep", "cs=auto,2")) == 0
    before = run_record(tmp_path)["prompts"]
    monkeypatch.setattr(door, "make_plan", lambda *args: pytest.fail("a plan was made again"))
    more = ["--sweep", "cs=1,auto,2", "--seeds", "41-42", "--resume"]
    assert main.main(sweep(tmp_path, tiny, *argv, *more)) == 0
    assert "4 of 12 samples are complete" in capsys.readouterr().out
    results = run_record(tmp_path)["prompts"]
    assert [result["setting"] for result in results] == ["coarse_steps=1", "coarse_steps=auto", "coarse_steps=2"] * 4
    assert [result["seed"] for result in results] == [41, 41, 41, 42, 42, 42] * 2
    assert [results[i] for i in (4, 5, 10, 11)] == before and results[0]["folder"].startswith("004-a-moon-seed-41-")
    assert main.main(sweep(tmp_path, tiny, *argv, "--sweep", "cs=1,2", "--seeds", "41-42", "--resume")) == 2
    second = ["--sweep", "gs=2,3", "--sweep", "cs=1,auto,2", "--seeds", "41-42", "--resume"]
    argv = [word for word in sweep(tmp_path, tiny, *argv, *second) if word not in ("-gs", "2")]
    monkeypatch.setattr(door, "make_plan", lambda *args: {**plan, "srds": 1.0, "sequential": 2.0, "calls": {}})
    assert main.main(argv) == 0
    results = run_record(tmp_path)["prompts"]
    assert [result["setting"] for result in results[:2]] == [
        "guidance_scale=2, coarse_steps=1", "guidance_scale=2, coarse_steps=auto",
    ]  # fmt: skip
    assert "12 of 24 samples are complete" in capsys.readouterr().out


def test_a_setting_whose_plan_failed_is_no_other_setting_and_is_planned_again(tiny, tmp_path, monkeypatch, capsys):
    """And where a plan comes to what is also asked for, each has its own folder."""
    argv, plan = ["--no-ground-truth", "-fs", "6"], {"blocks": 3, "schedule": "pipelined", "refinements": 2}
    working = lambda *args: {**plan, "srds": 1.0, "sequential": 2.0, "calls": {}}

    def no_memory(*args):
        raise MemoryError

    runs = [("cs=auto,1", no_memory), ("cs=1,auto", no_memory), ("cs=1,auto", working), ("cs=3,1,auto", working)]
    for words, make_plan in runs:
        monkeypatch.setattr(door, "make_plan", make_plan)
        status = main.main(sweep(tmp_path, tiny, *argv, "--sweep", words, "--resume", prompts=PROMPTS[:1]))
        results = run_record(tmp_path)["prompts"]
        fails = make_plan is no_memory
        assert status == fails and all(("error" in each) == (fails and "auto" in each["setting"]) for each in results)
        assert all(each["folder"].endswith(each["setting"][-1:]) for each in results)
    assert "2 of 3 samples are complete" in capsys.readouterr().out


def test_scores_are_paired_with_each_samples_own_ground_truth(tmp_path, capsys):
    prompt = "a red sun over purple mountains at dusk"
    short = ["-fs", "4", "-cs", "2", "--metrics", "scene"]
    assert main.main(sweep(tmp_path, "demo", *short, prompts=[prompt, "fog"])) == 0
    table = pd.read_csv(tmp_path / "results.csv")
    asked = table[table.prompt == prompt]
    assert asked.scene.isin([0, 1 / 3, 2 / 3, 1]).all() and table[table.prompt == "fog"].scene.isna().all()
    truth = np.asarray(Image.open(tmp_path / run_record(tmp_path)["folders"][0] / "srds_ddim_gt.png"))
    assert np.allclose(asked.scene - asked.scene_difference, metrics.scene(truth, prompt))
    assert "  scene less sequential's  " in capsys.readouterr().out


def test_the_share_of_a_scene_is_that_of_what_the_prompt_asks():
    image = scenes.render(np.random.default_rng(0), "dusk", "red sun", "green hills")
    assert metrics.scene(image, "a red sun over green hills at dusk") == 1
    assert metrics.scene(image, "a red sun over purple mountains at noon") == 1 / 3
    assert metrics.scene(image, "a red sun") == 1 and metrics.scene(image, "a cat") is None


@pytest.fixture
def tiny_clip(monkeypatch):
    """In place of the hub's CLIP, one with random weights, of a seed whose scores are above 0, where they are cut."""
    torch.manual_seed(CLIP_SEED)
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
    found = measure(images[0], images[1], "a cat")
    other = measure(images[1], None, "a cat")
    assert 0 < found["clip"] < 100 and found["clip_difference"] != 0 and other["clip_difference"] is None
    assert found["clip_difference"] == pytest.approx(found["clip"] - other["clip"], abs=1e-4)
    model, processor = tiny_clip
    read = processor(images=[images[0]], text=["a cat"], return_tensors="pt")
    with torch.no_grad():
        features = model(**read)
    cosine = torch.cosine_similarity(features.image_embeds, features.text_embeds)
    assert found["clip"] == pytest.approx(100 * float(cosine), abs=1e-3)


def test_lpips_is_the_distance_to_the_ground_truth(monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, image, truth):
            assert image.shape == truth.shape == (1, 3, 8, 8) and image.max() <= 1
            return (image - truth).abs().mean()

    monkeypatch.setattr(metrics, "LearnedPerceptualImagePatchSimilarity", lambda *args, **how: Network())
    image = np.full((8, 8, 3), 255, np.uint8)
    assert metrics.Metrics(["lpips"]).measure(image, image // 5, "a")["lpips"] == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["lpips", "clip"])
def test_weights_of_a_metric_that_cannot_be_had_are_one_line(name, tiny, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **how):
        raise OSError("no connection")

    monkeypatch.setattr(CLIPModel, "from_pretrained", unreachable)
    monkeypatch.setattr(metrics, "LearnedPerceptualImagePatchSimilarity", unreachable)
    monkeypatch.setattr(preparation, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    assert main.main(sweep(tmp_path / "out", tiny, "--metrics", name)) == 2
    error = capsys.readouterr().err
    assert f"argument --metrics: '{name}' needs" in error and "no connection" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "more, told",
    [
        (["lpips", "--no-ground-truth"], "'lpips' is a distance to the ground truth"),
        (["scene"], "'scene' reads what the demo draws"),
        (["fid"], "'fid' is not usable; give one of lpips, clip, scene"),
    ],
)
def test_metrics_that_cannot_be_measured_are_one_line(more, told, tiny, tmp_path, capsys):
    assert main.main(sweep(tmp_path / "out", tiny, "--metrics", *more)) == 2
    assert told in capsys.readouterr().err


def test_a_preview_is_there_while_the_run_lasts_and_shows_the_last_refinement(tiny, tmp_path, monkeypatch):
    shown, show = [], preview.show

    def showing(folder, *rest):
        show(folder, *rest)
        shown.append(Image.open(folder / preview.NAME).size)

    monkeypatch.setattr(preview, "show", showing)
    assert main.main(sweep(tmp_path, tiny, "-cs", "2", *SHORT, "--preview")) == 0
    iterations = sum(len(result["iterations"]) for result in run_record(tmp_path)["prompts"])
    assert len(shown) == iterations and min(min(size) for size in shown) >= 256
    assert preview.NAME not in files(tmp_path)


def test_a_preview_of_a_killed_run_goes_and_anothers_picture_stays(tiny, tmp_path, capsys):
    argv = sweep(tmp_path, tiny, "-cs", "2", *SHORT, "--no-ground-truth")
    shown = ["a"], np.zeros((8, 8, 3), np.uint8), "iteration 0"
    preview.show(tmp_path, "0" * 16, *shown)
    assert files(tmp_path) == set(), "the run has no lock, or no longer"
    (tmp_path / LOCK).write_text("0" * 16)
    preview.show(tmp_path, "0" * 16, *shown)
    assert preview.NAME in files(tmp_path)
    assert main.main(argv) == 0 and preview.NAME not in files(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / preview.NAME)
    before = (tmp_path / preview.NAME).read_bytes()
    assert main.main(argv) == 0 and main.main([*argv, "--preview"]) == 2
    assert "is there and of no run" in capsys.readouterr().err and (tmp_path / preview.NAME).read_bytes() == before
    (tmp_path / preview.NAME).unlink()
    os.mkfifo(tmp_path / preview.NAME)
    assert main.main(argv) == 0 and (tmp_path / preview.NAME).is_fifo()


def test_a_forecast_counts_each_setting_by_what_there_is_of_it():
    forecast = Forecast(left=[0, 1, 2, 3, 4], steps=[10, 100])
    assert forecast.time_left() == "" and not forecast.known
    forecast.add(0, seconds=1.0, evaluations=20)
    assert not forecast.known and forecast.time_left() == "roughly 22 seconds left", "by their steps"
    forecast.add(1, seconds=30.0, evaluations=150)
    assert forecast.known and forecast.time_left() == "about 32 seconds left"
    assert str(forecast) == "360 evaluations but for ground truths, 63 seconds"
    forecast.add(2, seconds=1.0, evaluations=20)
    forecast.add(3, seconds=30.0, evaluations=150)
    assert forecast.time_left() == "about 1 seconds left"
