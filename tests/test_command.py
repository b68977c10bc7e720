"""The command, as its users run it: `main(argv)` in this process, and as a process of its own."""

import contextlib
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, strategies
from PIL import Image

import main
import pipelines
from conftest import arguments, files, pixels, run_record
from models import loading
from models.families import StableDiffusion
from pipelines import stable_diffusion
from sampler import Sampler
from settings import Failure, Settings, in_one_line
from study import preparation
from study.directory import pack

ROOT = Path(main.__file__).parent
RECORDS = {"run.json", "result.json", "results.csv"}
SET = {"srds_initialized.png", "srds_final.png", "srds_filmstrip.png"}
TRUTH = {"srds_ddim_gt.png", "srds_ddim_course.png", "trajectory_errors_plot.png", "trajectory_errors_table.csv"}


def iterations(count):
    return {f"srds_iteration_{i}.png" for i in range(count)}


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Run the command on the tiny model into tmp_path/out: (exit status, output folder, stdout)."""

    def run(*more, model=tiny):
        status = main.main(arguments(tmp_path / "out", model, "-gs", "2", *more, prompts=[]))
        return status, tmp_path / "out", capsys.readouterr().out

    return run


# What a run leaves


@pytest.fixture(scope="module")
def exact_run(tiny, tmp_path_factory):
    """The output directory of one prompt that ran to exactness."""
    out = tmp_path_factory.mktemp("exact")
    more = ["-gs", "2", "--tolerance", "0", "--fixed-batch"]
    assert main.main(arguments(out, tiny, *more, prompts=["A red sun, 夜"])) == 0
    return out


def test_one_prompt_fills_the_output_directory(exact_run):
    assert files(exact_run) == SET | TRUTH | iterations(3) | RECORDS


def test_a_result_has_what_each_refinement_took(exact_run):
    (result,) = run_record(exact_run)["prompts"]
    assert (result["prompt"], result["seed"], result["folder"]) == ("A red sun, 夜", 42, "")
    assert (result["converged"], result["stop_reason"]) == (True, "exact")
    assert (result["serial_evaluations"], result["total_evaluations"]) == (9, 18)
    assert [entry["iteration"] for entry in result["iterations"]] == [-1, 0, 1, 2]
    assert [entry["serial_evaluations"] for entry in result["iterations"]] == [3, 5, 7, 9]
    first, *_, last = result["iterations"]
    assert first["image_change"] is None and first["trajectory_change"] is None
    assert last["image_error"] == result["image_error"] == 0
    assert result["trajectory_change"] == last["trajectory_change"]
    assert result["seconds"]["srds"] > 0 and result["seconds"]["ground_truth"] > 0


def test_the_keys_of_the_records_are_those_of_earlier_versions(exact_run):
    record = run_record(exact_run)
    assert list(record) == [
        "run", "begun", "command", "settings", "texts", "environment", "model", "keeps_bits", "folders", "prompts",
        "overview", "files", "made_by", "checksum",
    ]  # fmt: skip
    result = json.loads((exact_run / "result.json").read_text())
    assert list(result) == ["complete", "files", "result", "errors", "made_by", "run", "begun", "checksum"]
    assert list(record["prompts"][0]) == [
        "prompt", "ignored", "seed", "converged", "stop_reason", "serial_evaluations", "total_evaluations",
        "image_error", "trajectory_change", "damping", "seconds", "iterations", "folder",
    ]  # fmt: skip
    assert list(record["prompts"][0]["iterations"][0]) == [
        "iteration", "serial_evaluations", "total_evaluations", "widest_tick", "image_change", "trajectory_change",
        "predicted_change", "damping", "image_error", "seconds", "peak_memory_mib", "verdict", "settled", "psnr",
        "ssim",
    ]  # fmt: skip
    assert record["settings"].keys() == {
        "prompts", "prompt", "output_dir", "no_ground_truth", "parallel", "model", "device", "dtype", "variant", "lora",
        "textual_inversion", "offload", "vae_tiling", "compile", "fine_steps", "coarse_steps", "solver", "eta",
        "tolerance", "schedule", "correction", "stop_rule", "max_iterations", "method", "nodes", "window",
        "guidance_scale", "negative_prompt", "height", "width", "seed", "max_batch", "fixed_batch", "keep_trajectories",
        "start_from", "seeds", "sweep", "metrics",
    }  # fmt: skip


def test_images_are_those_that_the_results_speak_of(exact_run):
    (result,) = run_record(exact_run)["prompts"]
    names = ("ddim_gt", "final", "initialized", "iteration_0", "iteration_2")
    images = {name: pixels(exact_run / f"srds_{name}.png") for name in names}
    assert images["final"].shape == (64, 64, 3)
    assert (images["final"] == images["ddim_gt"]).all() and (images["iteration_2"] == images["final"]).all()
    first, second, *_ = result["iterations"]
    assert first["image_error"] == pytest.approx(abs(images["initialized"] - images["ddim_gt"]).mean())
    assert second["image_change"] == pytest.approx(abs(images["iteration_0"] - images["initialized"]).mean())


def test_images_say_what_they_were_made_by(exact_run):
    text = Image.open(exact_run / "srds_final.png").text
    assert text["prompt"] == "A red sun, 夜" and text["seed"] == "42"
    assert json.loads(text["settings"]) == run_record(exact_run)["settings"]
    prompt, last = text["parameters"].split("\n")
    assert prompt == "A red sun, 夜"
    assert last.startswith("Steps: 9, Sampler: DDIM, CFG scale: 2.0, Seed: 42, Size: 64x64, Model: ")


def test_the_table_is_zero_where_a_boundary_is_exact(exact_run):
    table = pd.read_csv(exact_run / "trajectory_errors_table.csv", index_col=0)
    assert list(table.index) == [f"Iteration_{i}" for i in range(3)]
    assert list(table.columns) == [f"Timestep_{i}" for i in range(3)]
    assert (table.values == 0).tolist() == [[i <= k for i in range(3)] for k in range(3)]


def test_each_refinement_is_printed_and_a_table_closes_the_run(run):
    _, _, printed = run("--prompt", "a moon", "--tolerance", "0")
    lines = [line for line in printed.splitlines() if line.startswith("  iteration")]
    assert len(lines) == 3 and "converged" in lines[-1] and "5 serial evaluations" in lines[0]
    assert "9 of 9" in printed.splitlines()[-1] and "yes (exact)" in printed.splitlines()[-1]


def test_settings_and_environment_are_recorded(run, tiny):
    _, out, _ = run("--prompt", "a", "--seed", "7", "--no-ground-truth")
    settings, environment = run_record(out)["settings"], run_record(out)["environment"]
    assert settings["coarse_steps"] == 3 and settings["seed"] == 7 and settings["height"] == settings["width"] == 64
    assert environment["device"] == "cpu" and environment["dtype"] == "float32"
    assert environment["torch"] == torch.__version__ and {"python", "diffusers"} <= set(environment)
    assert run_record(out)["model"]["name"] == str(tiny)


def test_several_prompts_have_a_folder_each_and_an_overview(run, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red sun\r\n\r\nüber / the: hills\r\na moon\r\n".encode())
    status, out, printed = run("-p", str(tmp_path / "p.txt"), "-tol", "0", "--max-iterations", "2")
    assert status == 0
    results = run_record(out)["prompts"]
    folders = [result["folder"] for result in results]
    assert folders == ["000-a-red-sun", "001-uber-the-hills", "002-a-moon"]
    overview, one = SET | TRUTH | iterations(2), SET | TRUTH | iterations(2) | {"result.json"}
    sets = {f"{folder}/{file}" for folder in folders for file in one}
    assert files(out) == overview | sets | {"run.json", "results.csv"}
    assert set(run_record(out)["files"]) == files(out) - {"run.json"}

    cells = [pixels(out / folder / "srds_iteration_1.png") for folder in folders]
    overview = pixels(out / "srds_iteration_1.png")
    assert overview.shape == (132, 132, 3) and (overview[64:68] == 255).all() and (overview[:, 64:68] == 255).all()
    assert (overview[:64, :64] == cells[0]).all() and (overview[:64, 68:] == cells[1]).all()
    assert (overview[68:, :64] == cells[2]).all() and (overview[68:, 68:] == 255).all()

    tables = [pd.read_csv(out / folder / "trajectory_errors_table.csv", index_col=0) for folder in ["", *folders]]
    np.testing.assert_allclose(tables[0].values, np.sqrt(sum(table.values**2 for table in tables[1:])), rtol=1e-6)
    assert not any(result["converged"] for result in results) and results[0]["stop_reason"] == "max-iterations"
    assert printed.count("no (max-iterations)") == 3


def test_an_image_does_not_depend_on_the_other_prompts(run):
    _, out, _ = run("--prompt", "a moon", "--fixed-batch", "--no-ground-truth")
    alone = pixels(out / "srds_final.png")
    _, out, _ = run("--prompt", "a sea", "--prompt", "a moon", "--fixed-batch", "--no-ground-truth")
    assert (pixels(out / "001-a-moon" / "srds_final.png") == alone).all()


def test_without_ground_truth_only_samples(run):
    status, out, printed = run("--prompt", "a moon", "--no-ground-truth", "-tol", "0")
    assert status == 0 and files(out) == SET | iterations(3) | RECORDS
    (result,) = run_record(out)["prompts"]
    assert result["image_error"] is None and result["seconds"]["ground_truth"] is None
    *refinements, header, row = printed.splitlines()
    assert "difference" in header and not any("difference" in line or "error" in line for line in refinements)
    assert "error" not in row and row.split()[-4] == "-"


def test_blocks_of_one_step_need_no_refinement(run):
    status, out, _ = run("--prompt", "a moon", "-cs", "9", "--fixed-batch")
    assert status == 0 and files(out) == SET | TRUTH | RECORDS
    (result,) = run_record(out)["prompts"]
    assert result["stop_reason"] == "exact" and result["serial_evaluations"] == 9 and result["image_error"] == 0
    assert pd.read_csv(out / "trajectory_errors_table.csv", index_col=0).shape == (0, 9)


def test_from_python_a_run_is_the_commands_to_the_bit(run, tiny):
    """Images, counts, changes and the distance to the truth."""
    more = ["--solver", "ddpm", "--stop-rule", "predicted", "--seed", "3", "--negative-prompt", "rain"]
    _, out, _ = run("--prompt", "a moon", *more)
    settings = Settings(9, 3, solver="ddpm", stop_rule="predicted", seed=3, guidance_scale=2, negative_prompt="rain")
    sampler = Sampler.from_pretrained(tiny, settings, device="cpu")
    sample, truth = sampler("a moon"), sampler.sequential("a moon")
    (result,) = run_record(out)["prompts"]
    assert (result["serial_evaluations"], result["total_evaluations"], result["stop_reason"]) == (
        sample.serial_evaluations, sample.total_evaluations, sample.stop_reason,
    )  # fmt: skip
    for refinement, entry in zip(sample.refinements, result["iterations"], strict=True):
        for name in ("image_change", "trajectory_change", "predicted_change", "damping"):
            assert entry[name] == getattr(refinement, name)
        name = f"iteration_{refinement.k - 1}" if refinement.k else "initialized"
        assert (pixels(out / f"srds_{name}.png") == refinement.image).all()
    assert (pixels(out / "srds_ddim_gt.png") == truth.image).all()
    table = pd.read_csv(out / "trajectory_errors_table.csv", index_col=0)
    errors = [(each.states - truth.states)[1:].flatten(1).norm(dim=1) for each in sample.refinements[1:]]
    np.testing.assert_allclose(table.values, torch.stack(errors), rtol=1e-6)


def test_collocation_leaves_what_srds_leaves_and_is_resumed(run):
    more = ["--prompt", "a moon", "--method", "collocation", "-fs", "20", "-tol", "0", "--nodes", "6"]
    status, out, printed = run(*more)
    assert status == 0 and files(out) == SET | TRUTH | iterations(2) | RECORDS and "settled" not in printed
    (result,) = run_record(out)["prompts"]
    assert result["stop_reason"] == "exact" and result["image_error"] < 0.1 and result["serial_evaluations"] <= 20
    assert pd.read_csv(out / "trajectory_errors_table.csv", index_col=0).shape == (2, 3)
    assert run(*more, "--resume")[0] == 0 and run("--prompt", "a moon", "-fs", "20", "-tol", "0", "--resume")[0] == 2


@pytest.mark.parametrize("method", ["srds", "collocation"])
def test_a_run_starts_from_the_trajectories_that_another_kept(method, run, tiny, tmp_path, capsys):
    earlier, kept = tmp_path / "earlier", "trajectory.safetensors"
    both, more = ["--prompt", "a moon", "--prompt", "a sun"], ["--method", method, "-gs", "2", "--no-ground-truth"]
    assert main.main(arguments(earlier, tiny, *both, *more, "--keep-trajectories", prompts=[])) == 0
    assert [path.name for path in sorted(earlier.glob("*/*.safetensors"))] == [kept, kept]
    assert main.main(arguments(earlier, tiny, *both, *more, "--keep-trajectories", "--resume", prompts=[])) == 0
    ticks = [result["serial_evaluations"] for result in run_record(earlier)["prompts"]]

    status, out, _ = run(*both, *more, "--start-from", str(earlier))
    assert status == 0 and run_record(out)["settings"]["start_from"] == str(earlier)
    assert all(now["serial_evaluations"] < was for now, was in zip(run_record(out)["prompts"], ticks))
    assert not list(out.rglob(kept))

    again = ["--start-from", str(earlier), "--resume"]
    assert run(*both, *more, *again)[0] == 0 and run(*both, *more, "--resume")[0] == 2, "it is another run"

    assert run("--prompt", "a moon", *more, "--keep-trajectories")[0] == 0 and (out / kept).is_file()
    assert main.main(arguments(earlier, tiny, *both, *more, "--start-from", str(out), prompts=[])) == 0, "of one prompt"
    assert not list(earlier.glob(f"0*/{kept}")) and list(earlier.glob(f"earlier/*/*/{kept}")), "set aside"
    note = "note: what it starts from has seed 42, not 43; other noise costs more than it saves"
    capsys.readouterr()
    assert main.main(arguments(earlier, tiny, *more, "--start-from", str(out), "--seed", "43")) == 0
    assert note in capsys.readouterr().out


def test_starts_that_do_not_fit_are_one_line_and_status_2(tiny, tmp_path, monkeypatch, capsys):
    earlier, more = tmp_path / "earlier", ["--no-ground-truth", "--max-iterations", "1"]
    assert main.main(arguments(earlier, tiny, *more, "--keep-trajectories", prompts=["a", "b"])) == 0
    pipelines.pixels().save_pretrained(tmp_path / "pixels")
    monkeypatch.setattr(preparation, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    capsys.readouterr()
    for argv, words in (
        (["--prompt", "a"], "has 2 prompts; give a run of one, or of 1 as here"),
        (["--prompt", "a", "--prompt", "b", "--height", "128"], "(4, 8, 8) is of other states than (4, 16, 8)"),
        (["--prompt", "a", "--prompt", "b", "--model", str(tmp_path / "pixels")], "is another model than"),
    ):
        assert main.main(arguments(tmp_path / "out", tiny, *argv, "--start-from", str(earlier), prompts=[])) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("main.py: error: argument --start-from: "), err
        assert words in err
    kept = next(earlier.glob("*/*.safetensors"))
    whole, tensors = kept.read_bytes(), safetensors.torch.load_file(kept)
    for broken in (
        whole[:50],
        safetensors.torch.save(tensors),
        safetensors.torch.save(tensors, {"model": "tiny", "seed": "some"}),
        safetensors.torch.save({**tensors, "boundaries": torch.tensor([0, 9])}, {"model": "tiny", "seed": "42"}),
        safetensors.torch.save({**tensors, "clean": tensors["clean"] * torch.nan}, {"model": "tiny", "seed": "42"}),
    ):
        kept.write_bytes(broken)
        assert main.main(arguments(tmp_path / "out", tiny, "--start-from", str(earlier), prompts=["a", "b"])) == 2
        assert f"does not serve: {kept} holds no trajectory; give the output directory" in capsys.readouterr().err
    kept.unlink()
    assert main.main(arguments(tmp_path / "out", tiny, "--start-from", str(earlier), prompts=["a", "b"])) == 2
    assert f"does not serve: there is no {kept}; give the output directory" in capsys.readouterr().err


def test_collocation_that_does_not_settle_says_so(run):
    """Noise in every step makes the clean image too rough for few ticks."""
    noisy = ["--method", "collocation", "--solver", "ddpm", "--window", "1", "-tol", "0", "--no-ground-truth"]
    _, out, printed = run("--prompt", "a", *noisy, "-fs", "12", "--nodes", "6")
    (result,) = run_record(out)["prompts"]
    assert result["serial_evaluations"] == 12 and not result["converged"] and "growing" in printed
    assert "note: it did not settle within 12 serial evaluations, which is what the sequential sampler takes" in printed


def test_a_model_that_reads_no_prompts_says_that_each_line_is_a_seed(tmp_path, capsys):
    pipelines.pixels().save_pretrained(tmp_path / "model")
    argv = ["--no-ground-truth", "--max-iterations", "1", "--keep-trajectories", "--seed", "7"]
    assert main.main(arguments(tmp_path / "out", tmp_path / "model", *argv, prompts=["a", "b"])) == 0
    assert "model reads no prompts: seeds rise from 7, one a line" in capsys.readouterr().out
    assert [result["seed"] for result in run_record(tmp_path / "out")["prompts"]] == [7, 8]


def test_control_characters_do_not_reach_the_terminal(tmp_path, tiny, capsys):
    more = ["--no-ground-truth", "--max-iterations", "1"]
    prompts = ["a\x1b[2Jsun" + 100 * " \x1b]0;owned\x07", "moon"]
    assert main.main(arguments(tmp_path / "out", tiny, *more, prompts=prompts)) == 0
    assert main.main(arguments(tmp_path / "out", "\x1b[2J", *more)) == 1
    out, err = capsys.readouterr()
    assert (
        "\x1b" not in out + err and "\x07" not in out + err and r"a\x1b[2Jsun" in out and r"\x1b[2J is neither" in err
    )


def test_a_long_prompt_is_not_repeated_in_every_image(tmp_path, tiny, capsys):
    long = "word " * 20_000
    assert main.main(arguments(tmp_path, tiny, "--no-ground-truth", "--max-iterations", "1", prompts=[long])) == 0
    assert len(capsys.readouterr().err) < 400 and (tmp_path / "srds_final.png").stat().st_size < 40_000
    assert run_record(tmp_path)["prompts"][0]["prompt"] == long.strip()


def test_a_fixed_batch_is_promised_bits_only_where_the_device_keeps_them(run, monkeypatch):
    argv = ["--prompt", "a", "--fixed-batch", "-tol", "0"]
    _, out, printed = run(*argv)
    assert run_record(out)["keeps_bits"] is True and "yes (exact)" in printed and "rounding" not in printed
    predict = StableDiffusion.predict

    def by_place(self, pipeline, x, t, **conditions):
        return predict(self, pipeline, x, t, **conditions) + 1e-7 * torch.arange(len(x)).reshape(-1, 1, 1, 1)

    monkeypatch.setattr(StableDiffusion, "predict", by_place)
    _, out, printed = run(*argv, "--overwrite")
    assert run_record(out)["keeps_bits"] is False and "yes (exact to rounding)" in printed
    assert printed.count("note: on this device a network call's bits depend on its other lanes") == 1


def test_several_seeds_are_a_sample_each(run, tiny, tmp_path):
    prompts = ["--prompt", "a moon", "--prompt", "a sun", "--no-ground-truth"]
    status, out, printed = run(*prompts, "--seeds", "7-8,3")
    assert status == 0 and "sample 2 of 6: a moon, seed 8" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[-4:-2]] == ["a sun, seed 8", "a sun, seed 3"]
    results = run_record(out)["prompts"]
    assert [(result["prompt"][2:], result["seed"]) for result in results] == [
        (prompt, seed) for prompt in ("moon", "sun") for seed in (7, 8, 3)
    ]
    assert results[5]["folder"] == "005-a-sun-seed-3" and run_record(out)["settings"]["seeds"] == [7, 8, 3]
    assert len(pd.read_csv(out / "results.csv").groupby(["prompt", "seed"])) == 6
    assert run(*prompts, "--seeds", "7-8,3", "--resume")[2].startswith("6 of 6 samples are complete")
    alone = arguments(tmp_path / "alone", tiny, "-gs", "2", "--seed", "3", "--no-ground-truth", prompts=["a sun"])
    assert main.main(alone) == 0
    assert (pixels(tmp_path / "alone" / "srds_final.png") == pixels(out / "005-a-sun-seed-3" / "srds_final.png")).all()


def test_unsettled_trajectories_are_noted(run):
    _, out, _ = run("--prompt", "a moon", "-tol", "0", "--no-ground-truth")
    first = run_record(out)["prompts"][0]["iterations"][1]
    between = ["--no-ground-truth", "-tol", str((first["image_change"] + first["trajectory_change"]) / 2)]
    assert "note: the image has settled, but the trajectory" in run("--prompt", "a moon", *between)[2]
    assert "note:" not in run("--prompt", "a moon", *between, "--stop-rule", "trajectory")[2]


@pytest.mark.slow
def test_damping_is_recorded_and_shown(run):
    """On the demo model, as random weights turn nothing round."""
    strong = ["--prompt", "a red sun", *"-cs 5 -fs 25 -gs 7.5 --max-iterations 2 --no-ground-truth".split()]
    _, out, printed = run(*strong, model="demo")
    (result,) = run_record(out)["prompts"]
    per_refinement = [entry["damping"] for entry in result["iterations"]]
    assert per_refinement[0] == 0 and result["damping"] == max(per_refinement) > 0
    assert f"damping {per_refinement[1]:.2f}" in printed and f"{result['damping']:.2f}" in printed.splitlines()[-1]
    _, out, printed = run(*strong, "--correction", "paper", model="demo")
    assert run_record(out)["prompts"][0]["damping"] == 0 and "damping 0" not in printed


def test_a_plan_is_printed_and_recorded(run):
    status, out, printed = run("--prompt", "a", "-fs", "16", "-cs", "auto", "--no-ground-truth")
    plan, settings = run_record(out)["plans"][0], run_record(out)["settings"]
    assert status == 0 and f"plan: {plan['blocks']} blocks, {plan['schedule']}: about" in printed
    assert (settings["coarse_steps"], settings["schedule"]) == (plan["blocks"], plan["schedule"])


def test_a_lora_reaches_the_images_and_the_record(run, tiny, tmp_path):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(16, 2)}
    safetensors.torch.save_file(weights, tmp_path / "lora.safetensors")
    plain = pixels(run("--prompt", "a", "--no-ground-truth")[1] / "srds_final.png")
    lora = f"{tmp_path / 'lora.safetensors'}:4"
    status, out, _ = run("--prompt", "a", "--no-ground-truth", "--lora", lora)
    assert status == 0 and run_record(out)["settings"]["lora"] == [lora]
    assert (pixels(out / "srds_final.png") != plain).any()
    assert run("--prompt", "a", "--no-ground-truth", "--lora", lora, "--resume")[0] == 0
    assert run("--prompt", "a", "--no-ground-truth", "--resume")[0] == 2
    assert run("--prompt", "a", "--lora", str(tmp_path / "missing.safetensors"))[0] == 2
    assert (pixels(out / "srds_final.png") != plain).any(), "a refused run left the earlier one"


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(tiny, tmp_path, capsys):
    argv = arguments(tmp_path, tiny, "--max-iterations", "1", prompts=["abcdefgh " * 3 + "xyz"])
    assert main.main(argv) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "yz" in warnings[0]
    assert run_record(tmp_path)["prompts"][0]["ignored"].endswith("yz")


# Bad input

BAD = [
    (["--prompt", "a", "-cs", "auto", "--compile"], "'auto' measures calls of many sizes, a compiled network has few"),
    (["--prompt", "a", "-cs", "auto", "--fixed-batch"], "'auto' measures calls of many sizes, a fixed batch has one"),
    (["--prompt", "a", "-cs", "few"], "-cs: 'few' is not usable; give a whole number from 1 up"),
    (["-p", "missing.txt"], "--prompts/-p: 'missing.txt' cannot be read (No such file"),
    (["-p", "folder"], "--prompts/-p: 'folder' cannot be read (Is a directory"),
    (["-p", "empty.txt"], "--prompts/-p: 'empty.txt' holds no prompt"),
    (["-p", "blank.txt"], "--prompts/-p: 'blank.txt' holds no prompt"),
    (["-p", "latin.txt"], "--prompts/-p: 'latin.txt' is not UTF-8"),
    ([], "--prompts/-p or --prompt: neither"),
    (["-p", "good.txt", "--prompt", "a"], "--prompts/-p or --prompt: both"),
    (["--prompt", " "], "--prompt: ' ' is blank"),
    (["--prompt", "caf\udce9"], "--prompt: 'caf\\udce9' is not usable; give some text, in UTF-8"),
    (["--prompt", "a", "-cs", "0"], "--coarse-steps/-cs: 0 is not usable"),
    (["--prompt", "a", "-fs", "0"], "--fine-steps/-fs: 0 is not usable"),
    (["--prompt", "a", "-fs", "ten"], "--fine-steps/-fs: 'ten' is not usable"),
    (["--prompt", "a", "-cs", "11", "-fs", "10"], "--coarse-steps/-cs: 11 is more than the 10 fine steps"),
    (["--prompt", "a", "-fs", "1001"], "--fine-steps/-fs: 1001 exceeds"),
    (["--prompt", "a", "-tol", "-1"], "--tolerance/-tol: -1 is not usable"),
    (["--prompt", "a", "-tol", "nan"], "--tolerance/-tol: nan is not usable"),
    (["--prompt", "a", "-gs", "inf"], "--guidance-scale/-gs: inf is not usable"),
    (["--prompt", "a", "-gs", "-2"], "--guidance-scale/-gs: -2 is not usable"),
    (["--prompt", "a", "--eta", "1.5"], "--eta: 1.5 is not usable; give a number from 0 to 1"),
    (["--prompt", "a", "--solver", "foo"], "--solver: 'foo' is not usable; give one of ddim"),
    (["--prompt", "a", "--solver", "euler"], "--solver: 'euler' cannot be used with"),
    (["--prompt", "a", "--height", "0"], "--height: 0 is not usable"),
    (["--prompt", "a", "--height", "63"], "--height: 63 is not a multiple"),
    (["--prompt", "a", "--width", "-8"], "--width: -8 is not usable"),
    (["--prompt", "a", "--width", "100"], "--width: 100 is not a multiple"),
    (["--prompt", "a", "-s", "-1"], "--seed/-s: -1 is not usable"),
    (["--prompt", "a", "-s", str(2**64)], f"--seed/-s: {2**64} is not usable"),
    (
        ["--prompt", "a", "--start-from", "nowhere"],
        "--start-from: 'nowhere' holds no run; give the output directory of a",
    ),
    (
        ["--prompt", "a", "--start-from", "./out"],
        "--start-from: './out' is the output directory, which is written anew",
    ),
    (["--prompt", "a", "--max-batch", "0"], "--max-batch: 0 is not usable"),
    (["--prompt", "a", "--seeds", "few"], "--seeds: 'few' is not usable; give numbers, such as 1,5,9, or a range"),
    (["--prompt", "a", "--seeds", "9-2"], "--seeds: '9-2' has a range that does not rise"),
    (["--prompt", "a", "--seeds", "1-9999999999"], "or of more than 10000 seeds"),
    (["--prompt", "a", "--seeds", "1,1"], "--seeds: '1,1' has a seed twice"),
    (["--prompt", "a", "--seeds", "99999999999999999999"], "--seeds: 99999999999999999999 is not usable"),
    (["--prompt", "a", "--seeds", "1", "--seed", "42"], "--seeds: '1' is given beside --seed; give one of them"),
    (["--prompt", "a", "--max-batch", "1" + 30 * "0"], "from 1 up to 1000000000"),
    (["--prompt", "a", "--height", "1" + 30 * "0"], "from 1 up to 65536"),
    (["--prompt", "a", "-gs", "1e308"], "--guidance-scale/-gs: 1e+308 is not usable; give a number from 0 to 1000"),
    (
        ["--prompt", "a", "--height", "65536", "--width", "65536"],
        "--height: 65536 makes images of 65536 x 65536 pixels",
    ),
    (["--prompts", "wide.txt"], "--prompts/-p: 'wide.txt' holds NUL bytes"),
    (["--prompt", "a\0b"], "without NUL"),
    (["--prompt", "a", "--max-iterations", "0"], "--max-iterations: 0 is not usable"),
    (["--prompt", "a", "--schedule", "fast"], "--schedule: 'fast' is not usable; give one of pipelined, sweep"),
    (["--prompt", "a", "--parallel", "both"], "--parallel: 'both' is not usable; give one of lanes, prompts"),
    (["--prompt", "a", "--device", "tpu"], "--device: 'tpu' is not on this machine"),
    (["--prompt", "a", "--device", "cpu:3"], "--device: 'cpu:3' is not on this machine"),
    (["--prompt", "a", "--offload"], "--offload: has nowhere to offload to"),
    (["--prompt", "a", "--lora", ""], "--lora: '' is not usable"),
    (["--prompt", "a", "--model", ""], "--model: '' is not usable; give a hub id, a folder or demo"),
    (["--prompt", "a", "--unknown"], "--unknown"),
    (["--prompt", "a", "-o", "good.txt"], "--output-dir/-o: 'good.txt' is not a directory"),
    (["--prompt", "a", "-o", "good.txt/out"], "--output-dir/-o: 'good.txt/out' cannot be used"),
    (["--prompt", "a", "-o", ""], "--output-dir/-o: '' is empty"),
    (["--prompt", "a", "-o", "x" * 300], "--output-dir/-o: 'xxx"),
    (["--prompt", "a", "-o", "dangling"], "--output-dir/-o: 'dangling' is a broken link"),
    (["--prompt", "a", "--negative-prompt", "caf\udce9"], "--negative-prompt: 'caf\\udce9' is not usable"),
    (["--prompt", "a", "--two\nlines"], "--two lines"),
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with prompt files of all kinds and an output directory with an earlier run's files in it."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    blank = b"\xef\xbb\xbf \r\n\n"
    for name, data in {
        "good": b"a moon\n",
        "empty": b"",
        "blank": blank,
        "latin": b"caf\xe9\n",
        "wide": "a".encode("utf-16-le"),
    }.items():
        Path(f"{name}.txt").write_bytes(data)
    Path("dangling").symlink_to("nowhere/at-all")
    Path("out").mkdir()
    record = {"run": "a", "begun": "", "settings": {}, "folders": [""], "prompts": [], "overview": {}}
    made_by = {"common": {}, "each": {}}
    Path("out/run.json").write_bytes(pack({**record, "files": ["srds_final.png"], "made_by": made_by}))
    Path("out/srds_final.png").write_text("an image")
    return tmp_path


@pytest.mark.parametrize("argv, words", BAD, ids=[words.split(" is ")[0][:40] for _, words in BAD])
def test_bad_input_is_one_line_and_status_2(argv, words, workplace, tiny, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    before = {name: Path(name).read_bytes() for name in files(workplace)}
    model = [] if "--model" in argv else ["--model", str(tiny)]
    assert main.main(["-o", "out", *model, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert {name: Path(name).read_bytes() for name in files(workplace)} == before


FLAGS = [name for group in main.ARGUMENTS.values() for names, *_ in group for name in names.split()]


@given(strategies.lists(strategies.sampled_from(FLAGS) | strategies.text(max_size=20), max_size=6))
def test_no_command_line_ends_in_anything_but_a_command_or_one_line(words):
    parser, flags = main.make_parser()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main.parse_arguments(parser, flags, ["-o", "out", *words])
    except Failure as error:
        assert error.status == 2 and "\n" not in in_one_line(main.one_line(error, flags))
    except SystemExit as shown:
        assert shown.code == 0


def test_tiling_without_an_autoencoder_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, capsys):
    pipelines.pixels().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "_from_pretrained", lambda *args: pytest.fail("weights were loaded"))
    assert main.main(arguments(tmp_path / "out", tmp_path / "model", "--vae-tiling")) == 2
    assert "--vae-tiling: is of no use" in capsys.readouterr().err


def test_arguments_are_checked_before_the_device_and_the_device_before_the_model(workplace, capsys):
    both = ["-o", "out", "--prompt", "a", "--model", "nowhere/at-all"]
    for more, words in ((["-cs", "0", "--device", "tpu"], "-cs"), (["--device", "tpu"], "--device")):
        assert main.main([*both, *more]) == 2
        assert words in capsys.readouterr().err


def test_output_directory_must_be_writable(workplace, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not hold root back
    assert main.main(["-o", "folder/out", "--prompt", "a"]) == 2
    assert "--output-dir/-o: 'folder/out' is not writable" in capsys.readouterr().err


# What fails later


def fails_with_one_line(argv, words, capsys):
    capsys.readouterr()
    assert main.main(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize(
    "model, words",
    [
        ("not a model", "neither a folder here nor a model id"),
        ("./missing", "neither a folder here nor a model id"),
        ("folder", "no readable model_index.json"),
        ("nobody/nothing", "huggingface.co cannot be reached"),
        ("stabilityai/stable-diffusion-2", "withdrawn"),
    ],
)
def test_models_that_cannot_be_had_are_one_line_and_status_1(model, words, workplace, monkeypatch, capsys):
    def unreachable(name, **kwargs):
        validate_repo_id(name)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(loading, "snapshot_download", unreachable)
    fails_with_one_line(["-o", "out", "--prompt", "a", "--model", model], words, capsys)
    assert Path("out/srds_final.png").exists()


def test_weights_that_are_missing_are_one_line_and_status_1(workplace, capsys):
    stable_diffusion().save_pretrained("pickled", safe_serialization=False)
    fails_with_one_line(arguments("out", "pickled"), "safetensors", capsys)
    stable_diffusion().save_pretrained("plain")
    fails_with_one_line(arguments("out", "plain", "--variant", "fp16"), "variant 'fp16'", capsys)
    assert Path("out/srds_final.png").exists()


def test_a_scheduler_that_is_refused_is_one_line_and_status_1(workplace, capsys):
    stable_diffusion(DDIMScheduler(thresholding=True)).save_pretrained("model")
    fails_with_one_line(arguments("out", "model"), "thresholding", capsys)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_is_one_line_and_status_1(error, monkeypatch, tiny, capsys, tmp_path):
    def fail(*args, **conditions):
        raise error

    monkeypatch.setattr(StableDiffusion, "predict", fail)
    fails_with_one_line(arguments(tmp_path / "out", tiny), "--max-batch", capsys)


def test_latents_that_are_not_finite_are_one_line_and_status_1(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(StableDiffusion, "predict", lambda self, pipeline, x, t, **conditions: x * float("nan"))
    fails_with_one_line(arguments(tmp_path, tiny), "not finite in float32; try other settings", capsys)
    fails_with_one_line(
        arguments(tmp_path, tiny, "--dtype", "bfloat16"), "--dtype: 'bfloat16': the network's output", capsys
    )


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line_and_status_1(tiny, tmp_path, monkeypatch, capsys):
    def failing(module, inputs):
        raise OSError("no compiler found")

    monkeypatch.setattr(loading, "compile_network", lambda network: network.compile(backend=failing))
    words = "argument --compile: torch cannot compile here"
    fails_with_one_line(arguments(tmp_path, tiny, "--compile"), words, capsys)


def test_a_full_disk_is_one_line_and_status_1_and_leaves_no_half_file(tiny, monkeypatch, capsys, tmp_path):
    out, whole = tmp_path / "out", []

    def full(file):
        if "filmstrip" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(28, "No space left on device")

    for seed in ("1", "2"):  # in a new directory, and where there is an earlier study
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            argv = arguments(out, tiny, "--seed", seed, prompts=["a"])
            fails_with_one_line(argv, "srds_filmstrip.png cannot be written: No space left on device", capsys)
        assert {path: path.read_bytes() for path in out.iterdir()} == whole if whole else files(out) == {"run.json"}
        assert main.main(argv) == 0
        whole = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


# As a process


def test_help_needs_no_torch():
    script = "import sys, main; status = main.main(['--help']); assert 'torch' not in sys.modules; sys.exit(status)"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--coarse-steps" in process.stdout and process.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_the_finished_prompts_complete(number, tmp_path, tiny):
    prompts = [f"moon {i}" for i in range(50)]
    argv = [sys.executable, "main.py", *arguments(tmp_path / "out", tiny, prompts=prompts)]
    # A shell's background job, as CI may be, has its children ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, cwd=ROOT, **pipes, text=True, preexec_fn=heed)
    for line in process.stdout:
        if line.startswith("prompt 3 "):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1 and "interrupted" in err
    results = run_record(tmp_path / "out")["prompts"]
    assert len(results) >= 2
    for result in results:
        Image.open(tmp_path / "out" / result["folder"] / "srds_final.png").load()
        assert TRUTH | SET <= files(tmp_path / "out" / result["folder"])


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path, tiny):
    argv = [sys.executable, "main.py", *arguments(tmp_path / "out", tiny, "--no-ground-truth")]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("prompt 1 of 4")
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and process.stderr.read() == ""
    assert len(run_record(tmp_path / "out")["prompts"]) == 4


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "there can be no such processes: RANK='x', WORLD_SIZE='2'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "there can be no such processes: RANK='0', WORLD_SIZE='0'"),
        ({"RANK": "3", "WORLD_SIZE": "1"}, "there can be no such processes: RANK='3', WORLD_SIZE='1'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR or MASTER_PORT, where processes meet, is not set"),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(variables, words, tmp_path, tiny, monkeypatch, capsys):
    for name, value in {"LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main.main(arguments(tmp_path / "out", tiny)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(tmp_path, tiny):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        argv = [sys.executable, "main.py", *arguments(tmp_path / "out", tiny)]
        environment = {"env": {**os.environ, **launch}, "timeout": 90}
        process = subprocess.run(argv, cwd=ROOT, **environment, capture_output=True, text=True)
    lines = [line for line in process.stderr.splitlines() if line.startswith("main.py: error:")]
    assert process.returncode == 1 and len(lines) == 1 and "cannot meet at localhost:" in lines[0], process.stderr
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
