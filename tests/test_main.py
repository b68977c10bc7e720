"""The command, as its users run it: `main(argv)` in-process, and once each as a process of its own."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import diffusion
import main
import utils
from conftest import record
from families import StableDiffusion
from pipelines import stable_diffusion
from srds import SCHEDULES

ROOT = Path(main.__file__).parent
SMALL = ["-cs", "3", "-fs", "9", "-gs", "2"]
RECORDS = {"run.json", "result.json"}
SET = {"srds_initialized.png", "srds_final.png", "srds_filmstrip.png"}
TRUTH = {"srds_ddim_gt.png", "srds_ddim_course.png", "trajectory_errors_plot.png", "trajectory_errors_table.csv"}


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def iterations(count):
    return {f"srds_iteration_{i}.png" for i in range(count)}


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Run the command on the tiny model into tmp_path/out: (exit status, output folder, stdout)."""

    def run(*more, model=tiny):
        status = main.main(["-o", str(tmp_path / "out"), "--model", str(model), *SMALL, *more])
        return status, tmp_path / "out", capsys.readouterr().out

    return run


def test_one_prompt_fills_the_output_directory(run):
    status, out, printed = run("--prompt", "A red sun, 夜", "--tolerance", "0", "--fixed-batch")
    assert status == 0
    assert files(out) == SET | TRUTH | iterations(3) | RECORDS

    (result,) = record(out)["prompts"]
    assert (result["prompt"], result["seed"], result["folder"]) == ("A red sun, 夜", 42, "")
    assert (result["converged"], result["stop_reason"]) == (True, "exact")
    assert (result["serial_evaluations"], result["total_evaluations"]) == (9, 18)
    assert [at["iteration"] for at in result["iterations"]] == [-1, 0, 1, 2]
    assert [at["serial_evaluations"] for at in result["iterations"]] == [3, 5, 7, 9]
    first, *_, last = result["iterations"]
    assert first["image_change"] is None and first["trajectory_change"] is None
    assert last["image_error"] == result["image_error"] == 0
    assert result["trajectory_change"] == last["trajectory_change"]
    assert result["seconds"]["srds"] > 0 and result["seconds"]["ground_truth"] > 0

    images = {name: pixels(out / f"srds_{name}.png") for name in ("ddim_gt", "final", "initialized", "iteration_0")}
    assert images["final"].shape == (64, 64, 3)
    assert (images["final"] == images["ddim_gt"]).all() and (
        pixels(out / "srds_iteration_2.png") == images["final"]
    ).all()
    assert first["image_error"] == pytest.approx(abs(images["initialized"] - images["ddim_gt"]).mean())
    change = abs(images["iteration_0"] - images["initialized"]).mean()
    assert result["iterations"][1]["image_change"] == pytest.approx(change)

    text = Image.open(out / "srds_final.png").text
    assert text["prompt"] == "A red sun, 夜" and text["seed"] == "42"
    assert json.loads(text["settings"]) == record(out)["settings"]

    table = pd.read_csv(out / "trajectory_errors_table.csv", index_col=0)
    assert list(table.index) == [f"Iteration_{i}" for i in range(3)]
    assert list(table.columns) == [f"Timestep_{i}" for i in range(3)]
    assert (table.values == 0).tolist() == [[i <= k for i in range(3)] for k in range(3)]

    lines = [line for line in printed.splitlines() if line.startswith("  iteration")]
    assert len(lines) == 3 and "converged" in lines[-1] and "5 serial evaluations" in lines[0]
    assert "9 of 9" in printed.splitlines()[-1] and "yes (exact)" in printed.splitlines()[-1]


def test_settings_and_environment_are_recorded(run, tiny):
    _, out, _ = run("--prompt", "a", "--seed", "7", "--no-ground-truth")
    settings, environment = record(out)["settings"], record(out)["environment"]
    assert settings["coarse_steps"] == 3 and settings["seed"] == 7 and settings["height"] == settings["width"] == 64
    assert environment["device"] == "cpu" and environment["dtype"] == "float32"
    assert environment["torch"] == torch.__version__ and {"python", "diffusers"} <= set(environment)
    assert record(out)["model"]["name"] == str(tiny)


def test_several_prompts_have_a_folder_each_and_an_overview(run, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red sun\r\n\r\nüber / the: hills\r\na moon\r\n".encode())
    status, out, printed = run("-p", str(tmp_path / "p.txt"), "-tol", "0", "--max-iterations", "2")
    assert status == 0
    results = record(out)["prompts"]
    folders = [result["folder"] for result in results]
    assert folders == ["000-a-red-sun", "001-uber-the-hills", "002-a-moon"]
    overview, one = SET | TRUTH | iterations(2), SET | TRUTH | iterations(2) | {"result.json"}
    assert files(out) == overview | {f"{folder}/{file}" for folder in folders for file in one} | {"run.json"}
    assert set(record(out)["files"]) == files(out) - {"run.json"}

    cells = [pixels(out / folder / "srds_iteration_1.png") for folder in folders]
    overview = pixels(out / "srds_iteration_1.png")
    assert overview.shape == (128, 128, 3)
    assert (overview[:64, :64] == cells[0]).all() and (overview[:64, 64:] == cells[1]).all()
    assert (overview[64:, :64] == cells[2]).all() and (overview[64:, 64:] == 255).all()

    tables = [pd.read_csv(out / folder / "trajectory_errors_table.csv", index_col=0) for folder in ["", *folders]]
    np.testing.assert_allclose(tables[0].values, np.sqrt(sum(table.values**2 for table in tables[1:])), rtol=1e-6)
    assert not any(result["converged"] for result in results) and results[0]["stop_reason"] == "max-iterations"
    assert printed.count("no (max-iterations)") == 3


def test_an_image_does_not_depend_on_the_other_prompts(run):
    _, out, _ = run("--prompt", "a moon", "--fixed-batch")
    alone = pixels(out / "srds_final.png")
    _, out, _ = run("--prompt", "a sea", "--prompt", "a moon", "--fixed-batch")
    assert (pixels(out / "001-a-moon" / "srds_final.png") == alone).all()


def test_without_ground_truth_only_samples(run):
    status, out, printed = run("--prompt", "a moon", "--no-ground-truth", "-tol", "0")
    assert status == 0 and files(out) == SET | iterations(3) | RECORDS
    (result,) = record(out)["prompts"]
    assert result["image_error"] is None and result["seconds"]["ground_truth"] is None
    *refinements, header, row = printed.splitlines()
    assert "difference" in header and not any("difference" in line or "error" in line for line in refinements)
    assert "error" not in row and row.split()[-4] == "-"


def test_blocks_of_one_step_need_no_refinement(run):
    status, out, _ = run("--prompt", "a moon", "-cs", "9", "--fixed-batch")
    assert status == 0 and files(out) == SET | TRUTH | RECORDS
    (result,) = record(out)["prompts"]
    assert result["stop_reason"] == "exact" and result["serial_evaluations"] == 9 and result["image_error"] == 0
    assert pd.read_csv(out / "trajectory_errors_table.csv", index_col=0).shape == (0, 9)


def test_a_run_removes_what_the_earlier_one_wrote_and_nothing_else(run):
    _, out, _ = run("--prompt", "a sea", "--prompt", "a moon", "-tol", "0")
    mine = {"notes.txt", "000-a-sea/notes.txt", "srds_mine.png"}
    for name in mine:
        (out / name).write_text("keep")
    earlier = record(out)
    earlier["files"] += ["../outside.png", "notes.txt", "000-a-sea/notes.txt", "/etc/srds_x.png"]
    (out / "run.json").write_text(json.dumps(earlier))
    (out.parent / "outside.png").write_text("keep")
    _, out, _ = run("--prompt", "a hill", "--no-ground-truth", "--max-iterations", "1")
    assert files(out) == SET | iterations(1) | mine | RECORDS
    assert (out.parent / "outside.png").exists() and not (out / "001-a-moon").exists()


@pytest.mark.parametrize(
    "more", [["--max-batch", "1"], ["--max-batch", "4"], ["--max-batch", "4", "--fixed-batch"], []]
)
def test_schedule_and_batch_options_reach_the_network(more, run, monkeypatch):
    widths, predict = [], StableDiffusion.predict

    def counting(self, pipeline, x, t, **conditions):
        widths.append(len(x))
        return predict(self, pipeline, x, t, **conditions)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    status, out, _ = run("--prompt", "a", "-tol", "0", "--schedule", "sweep", "--no-ground-truth", *more)
    (result,) = record(out)["prompts"]
    assert status == 0 and [at["serial_evaluations"] for at in result["iterations"]] == [3, 7, 10, 12]
    most = int(more[1]) if more else 6
    assert max(widths) == most and ("--fixed-batch" not in more or set(widths) == {most})


def test_auto_plans_blocks_and_schedule_and_says_what_it_expects(run):
    status, out, printed = run("--prompt", "a", "-fs", "16", "-cs", "auto", "--no-ground-truth")
    found = record(out)
    plan, settings = found["plan"], found["settings"]
    assert status == 0 and f"plan: {plan['blocks']} blocks, {plan['schedule']}: about" in printed
    assert (settings["coarse_steps"], settings["schedule"]) == (plan["blocks"], plan["schedule"])
    assert ("SRDS is not the faster" in printed) == (plan["srds"] >= plan["sequential"])
    _, out, _ = run("--prompt", "a", "-fs", "16", "-cs", "auto", "--schedule", "sweep", "--no-ground-truth")
    assert record(out)["plan"]["schedule"] == "sweep"


def test_the_plan_is_the_cheapest_sum_over_ticks(tiny, monkeypatch):
    """On a device whose calls all take a second the fewest ticks win; where each lane does, the fewest lane-steps."""
    argv = ["--prompt", "a", "-o", "out", "--model", str(tiny), "-fs", "100"]
    one, _ = main.load(main.parse_arguments(argv), main.Processes())
    one.args.schedule = None
    monkeypatch.setattr(main, "measure_calls", lambda problem, widest: ({1: 1.0, widest: 1.0}, 0.0))
    plan = main.make_plan(one)
    keys = "blocks", "schedule", "refinements", "srds", "sequential"
    assert [plan[key] for key in keys] == [20, "pipelined", 3, 32, 100]
    monkeypatch.setattr(main, "measure_calls", lambda problem, widest: ({1: 1.0, widest: float(widest)}, 0.0))
    plan = main.make_plan(one)
    assert plan["schedule"] == "sweep" and plan["srds"] > plan["sequential"]
    assert main.describe_plan(plan).endswith("on this device SRDS is not the faster")


def test_compiled_calls_have_few_shapes(run, monkeypatch):
    shapes = []

    def traced(unet):
        unet.register_forward_pre_hook(lambda unet, inputs: shapes.append(len(inputs[0])))

    monkeypatch.setattr(diffusion, "compile_network", traced)
    status, out, _ = run("--prompt", "a", "-tol", "0", "--no-ground-truth", "--compile")
    assert status == 0 and set(shapes) == {2, 4, 6}
    (compiled,) = record(out)["prompts"]
    shapes.clear()
    assert run("--prompt", "a", "-tol", "0", "--compile", "--max-batch", "1")[0] == 0 and set(shapes) == {1}
    (plain,) = record(run("--prompt", "a", "-tol", "0", "--no-ground-truth")[1])["prompts"]
    assert plain["total_evaluations"] == compiled["total_evaluations"]


def test_a_compiler_that_fails_is_one_line_and_status_1(tiny, tmp_path, monkeypatch, capsys):
    def failing(module, inputs):
        raise OSError("no compiler found")

    monkeypatch.setattr(diffusion, "compile_network", lambda unet: unet.compile(backend=failing))
    argv = ["--prompt", "a", "-o", str(tmp_path), "--model", str(tiny), *SMALL, "--compile"]
    assert main.main(argv) == 1
    assert "argument --compile: torch cannot compile here" in capsys.readouterr().err


def test_damping_is_recorded_and_shown(run):
    """On the demo model, as random weights turn nothing round."""
    strong = ["--prompt", "a red sun", *"-cs 5 -fs 25 -gs 7.5 --max-iterations 2 --no-ground-truth".split()]
    _, out, printed = run(*strong, model="demo")
    (result,) = record(out)["prompts"]
    per_refinement = [at["damping"] for at in result["iterations"]]
    assert per_refinement[0] == 0 and result["damping"] == max(per_refinement) > 0
    assert f"damping {per_refinement[1]:.2f}" in printed and f"{result['damping']:.2f}" in printed.splitlines()[-1]
    _, out, printed = run(*strong, "--correction", "paper", model="demo")
    assert record(out)["prompts"][0]["damping"] == 0 and "damping 0" not in printed


def test_negative_prompt_guidance_and_seed_change_the_image(run):
    images = []
    for more in ([], ["--negative-prompt", "rain"], ["-gs", "1"], ["--seed", "1"]):
        _, out, _ = run("--prompt", "a moon", "--no-ground-truth", "--max-iterations", "1", *more)
        images.append(pixels(out / "srds_final.png"))
    assert all((images[0] != other).any() for other in images[1:])


def test_table_is_the_distance_to_the_sequential_trajectory(run, tiny):
    _, out, _ = run("--prompt", "a moon", "-tol", "0")
    argv = ["-o", str(out), "--model", str(tiny), *SMALL, "--prompt", "a moon"]
    problem, _ = main.load(main.parse_arguments(argv), main.Processes())
    denoise = problem.denoiser("a moon")
    truth = diffusion.sequential(problem.x, denoise, problem.step, range(10), problem.boundaries)
    iterate = list(problem.iterates(denoise))[1]
    row = pd.read_csv(out / "trajectory_errors_table.csv", index_col=0).loc["Iteration_0"]
    expected = (iterate.states - truth)[1:].flatten(1).norm(dim=1)
    np.testing.assert_allclose(row.values, expected, rtol=1e-3, atol=1e-4)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(tiny, tmp_path, capsys):
    argv = [
        "-o",
        str(tmp_path),
        "--model",
        str(tiny),
        *SMALL,
        "--prompt",
        "abcdefgh " * 3 + "xyz",
        "--max-iterations",
        "1",
    ]
    assert main.main(argv) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "yz" in warnings[0]


# Bad input

BAD = [
    (["--prompt", "a", "-cs", "auto", "--compile"], "auto measures calls of many sizes, --compile leaves few"),
    (["--prompt", "a", "-cs", "few"], "'few' is not usable; give a whole number from 1 up, or auto"),
    (["-p", "missing.txt"], "--prompts/-p: 'missing.txt': No such file"),
    (["-p", "folder"], "--prompts/-p: 'folder': Is a directory"),
    (["-p", "empty.txt"], "--prompts/-p: 'empty.txt': holds no prompt"),
    (["-p", "blank.txt"], "--prompts/-p: 'blank.txt': holds no prompt"),
    (["-p", "latin.txt"], "--prompts/-p: 'latin.txt': is not UTF-8"),
    ([], "--prompts/-p or --prompt: neither"),
    (["-p", "good.txt", "--prompt", "a"], "--prompts/-p or --prompt: both"),
    (["--prompt", " "], "--prompt: '' is blank"),
    (["--prompt", "caf\udce9"], "--prompt: 'caf\\udce9' is not UTF-8"),
    (["--prompt", "a", "-cs", "0"], "--coarse-steps/-cs: '0'"),
    (["--prompt", "a", "-fs", "0"], "--fine-steps/-fs: '0'"),
    (["--prompt", "a", "-fs", "ten"], "--fine-steps/-fs: 'ten'"),
    (["--prompt", "a", "-cs", "11", "-fs", "10"], "--coarse-steps/-cs: 11"),
    (["--prompt", "a", "-fs", "1001"], "--fine-steps/-fs: 1001"),
    (["--prompt", "a", "-tol", "-1"], "--tolerance/-tol: '-1'"),
    (["--prompt", "a", "-tol", "nan"], "--tolerance/-tol: 'nan'"),
    (["--prompt", "a", "-gs", "inf"], "--guidance-scale/-gs: 'inf'"),
    (["--prompt", "a", "-gs", "-2"], "--guidance-scale/-gs: '-2'"),
    (["--prompt", "a", "--height", "0"], "--height: '0'"),
    (["--prompt", "a", "--height", "63"], "--height: 63"),
    (["--prompt", "a", "--width", "-8"], "--width: '-8'"),
    (["--prompt", "a", "--width", "100"], "--width: 100"),
    (["--prompt", "a", "-s", "-1"], "--seed/-s: '-1'"),
    (["--prompt", "a", "-s", str(2**64)], f"--seed/-s: '{2**64}'"),
    (["--prompt", "a", "--max-batch", "0"], "--max-batch: '0'"),
    (["--prompt", "a", "--max-iterations", "0"], "--max-iterations: '0'"),
    (["--prompt", "a", "--schedule", "fast"], "--schedule: invalid choice: 'fast'"),
    (["--prompt", "a", "--device", "tpu"], "--device: 'tpu'"),
    (["--prompt", "a", "--device", "cpu:3"], "--device: 'cpu:3'"),
    (["--prompt", "a", "--unknown"], "--unknown"),
    (["--prompt", "a", "-o", "good.txt"], "--output-dir/-o: 'good.txt'"),
    (["--prompt", "a", "-o", "good.txt/out"], "--output-dir/-o: 'good.txt/out'"),
    (["--prompt", "a", "-o", ""], "--output-dir/-o: ''"),
    (["--prompt", "a", "-o", "x" * 300], "--output-dir/-o: 'xxx"),
    (["--prompt", "a", "-o", "dangling"], "--output-dir/-o: 'dangling' is a broken link"),
    (["--prompt", "a", "--negative-prompt", "caf\udce9"], "--negative-prompt: 'caf\\udce9' is not UTF-8"),
    (["--prompt", "a", "--two\nlines"], "--two lines"),
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with prompt files of all kinds and an output directory with an earlier run's files in it."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name, data in {
        "good": b"a moon\n",
        "empty": b"",
        "blank": b"\xef\xbb\xbf \r\n\n",
        "latin": b"caf\xe9\n",
    }.items():
        Path(f"{name}.txt").write_bytes(data)
    Path("dangling").symlink_to("nowhere/at-all")
    Path("out").mkdir()
    Path("out/run.json").write_text('{"files": ["srds_final.png"]}')
    Path("out/srds_final.png").write_text("an image")
    return tmp_path


@pytest.mark.parametrize("argv, words", BAD, ids=[words.split(" is ")[0][:40] for _, words in BAD])
def test_bad_input_is_one_line_and_status_2(argv, words, workplace, tiny, monkeypatch, capsys):
    monkeypatch.setattr(diffusion, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    before = {name: Path(name).read_bytes() for name in files(workplace)}
    model = [] if "--model" in argv else ["--model", str(tiny)]
    assert main.main(["-o", "out", *model, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert {name: Path(name).read_bytes() for name in files(workplace)} == before


def test_arguments_are_checked_before_the_device_and_the_device_before_the_model(workplace, capsys):
    both = ["-o", "out", "--prompt", "a", "--model", "nowhere/at-all"]
    for more, words in ((["-cs", "0", "--device", "tpu"], "-cs"), (["--device", "tpu"], "--device")):
        assert main.main([*both, *more]) == 2
        assert words in capsys.readouterr().err


def test_output_directory_must_be_writable(workplace, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not hold root back
    assert main.main(["-o", "folder/out", "--prompt", "a"]) == 2
    assert "--output-dir/-o: 'folder/out' is not writable" in capsys.readouterr().err


def fails_with_one_line(argv, words, capsys):
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
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name, **kwargs):
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(name)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(diffusion, "snapshot_download", unreachable)
    fails_with_one_line(["-o", "out", "--prompt", "a", "--model", model], words, capsys)
    assert Path("out/srds_final.png").exists()


def test_weights_that_are_missing_are_one_line_and_status_1(workplace, capsys):
    stable_diffusion().save_pretrained("pickled", safe_serialization=False)
    argv = ["-o", "out", "--prompt", "a", *SMALL]
    fails_with_one_line([*argv, "--model", "pickled"], "safetensors", capsys)
    stable_diffusion().save_pretrained("plain")
    fails_with_one_line([*argv, "--model", "plain", "--variant", "fp16"], "variant 'fp16'", capsys)
    assert Path("out/srds_final.png").exists()


def test_a_scheduler_that_is_refused_is_one_line_and_status_1(workplace, capsys):
    stable_diffusion(DDIMScheduler(thresholding=True)).save_pretrained("model")
    fails_with_one_line(["-o", "out", "--prompt", "a", "--model", "model", *SMALL], "thresholding", capsys)


@pytest.mark.parametrize(
    "error, words",
    [(torch.OutOfMemoryError("CUDA out of memory."), "--max-batch"), (MemoryError(), "--max-batch")],
)
def test_out_of_memory_is_one_line_and_status_1(error, words, monkeypatch, tiny, capsys, tmp_path):
    def fail(*args, **conditions):
        raise error

    monkeypatch.setattr(StableDiffusion, "predict", fail)
    fails_with_one_line(["-o", str(tmp_path / "out"), "--model", str(tiny), *SMALL, "--prompt", "a"], words, capsys)


def test_latents_that_are_not_finite_are_one_line_and_status_1(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(StableDiffusion, "predict", lambda self, pipeline, x, t, **conditions: x * float("nan"))
    argv = ["-o", str(tmp_path), "--model", str(tiny), *SMALL, "--prompt", "a"]
    fails_with_one_line(argv, "--dtype", capsys)


def test_a_full_disk_is_one_line_and_status_1_and_leaves_no_half_file(tiny, monkeypatch, capsys, tmp_path):
    whole = Path.write_bytes

    def full(path, data):
        if "filmstrip" in path.name:
            whole(path, data[:10])
            raise OSError(28, "No space left on device")
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    argv = ["-o", str(tmp_path / "out"), "--model", str(tiny), *SMALL, "--prompt", "a"]
    fails_with_one_line(argv, "No space left", capsys)
    assert files(tmp_path / "out") == RECORDS


# When to stop


def test_schedules_are_the_engines():
    assert main.SCHEDULES == SCHEDULES


def history(*changes):
    found = []
    for image, trajectory in [(None, None), *changes]:
        predicted = image**2 / found[-1]["image_change"] if len(found) > 1 else None
        found.append({"image_change": image, "trajectory_change": trajectory, "predicted_change": predicted})
    return found


@pytest.mark.parametrize(
    "changes, final, trajectory, predicted",
    [
        ([(5, 5)], "continuing", "continuing", "continuing"),
        ([(0.05, 0.05)], "converged", "converged", "continuing"),  # one change foretells nothing
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
def test_stop_rules(changes, final, trajectory, predicted):
    assert main.judge(history(*changes), "predicted", 0.1) == predicted
    assert main.judge(history(*changes), "final", 0.1) == final
    assert main.judge(history(*changes), "trajectory", 0.1) == trajectory


def test_final_stops_where_trajectory_goes_on(run):
    """A tolerance between the last image change and the trajectory's is such a case, made for this model."""
    _, out, _ = run("--prompt", "a moon", "-tol", "0")
    first = record(out)["prompts"][0]["iterations"][1]
    assert first["image_change"] < first["trajectory_change"]
    between = ["-tol", str((first["image_change"] + first["trajectory_change"]) / 2)]
    _, out, printed = run("--prompt", "a moon", *between, "--stop-rule", "final")
    (stopped,) = record(out)["prompts"]
    assert len(stopped["iterations"]) == 2 and stopped["stop_reason"] == "tolerance" and "note:" in printed
    _, out, printed = run("--prompt", "a moon", *between, "--stop-rule", "trajectory")
    (went_on,) = record(out)["prompts"]
    assert len(went_on["iterations"]) > 2 and "note:" not in printed


def test_trajectory_change_is_the_largest_over_boundaries_in_grey_levels():
    old, new = torch.randn(2, 4, 3, 5, 5)
    change = max(127.5 * (new[i] - old[i]).abs().mean() / new[i].std(correction=0) for i in (1, 2, 3))
    assert main.trajectory_change(new, old) == pytest.approx(float(change))


# What is written


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("A red sun", "003-a-red-sun"),
        ("Ünïcode ☃ café", "003-unicode-cafe"),
        ("夜", "003-prompt"),
        ("../../etc/passwd\0", "003-etc-passwd"),
        ("con aux " + "x" * 300, "003-con-aux-" + "x" * 68),
        ("one two three four five six seven eight nine", "003-one-two-three-four-five-six-seven-eight"),
    ],
)
def test_folder_names_are_safe(prompt, name):
    assert utils.folder_name(3, prompt) == name


def test_table_keeps_tiny_errors_apart_from_zero():
    table = utils.error_table(np.array([[1.0, 2.0], [0.0, 1.23456789e-30]]))
    assert table == ",Timestep_0,Timestep_1\nIteration_0,0,1.23456789e-30\n"


def test_a_prompt_that_stopped_earlier_keeps_its_last_state():
    together = utils.combine_errors([np.array([[3.0], [3.0]]), np.array([[4.0], [4.0], [0.0]])])
    assert together.tolist() == [[5.0], [5.0], [3.0]]


def test_filmstrip_has_a_column_for_each_image_and_plots_show_every_point(run, monkeypatch):
    figures, draw = [], utils.Figure.savefig
    monkeypatch.setattr(
        utils.Figure, "savefig", lambda self, *rest, **more: (figures.append(self), draw(self, *rest, **more))
    )
    _, out, _ = run("--prompt", "a moon", "-tol", "0", "--schedule", "sweep", "--fixed-batch")
    strip = Image.open(out / "srds_filmstrip.png")
    assert strip.width == 8 + 6 * (utils.CELL + 8)  # initialised, three iterations, final, ground truth
    assert (np.asarray(strip) < 255).any(axis=(0, 2)).mean() > 0.8

    assert Image.open(out / "trajectory_errors_plot.png").size == (1320, 504)
    left, right = figures[0].axes
    assert [text.get_text() for text in left.get_legend().texts] == [
        "initialised",
        *(f"iteration {i}" for i in range(3)),
    ]
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == ["exactly 0"]
        low = min(
            line.get_ydata().min() for line in axes.lines if line.get_marker() != "None" and len(line.get_ydata())
        )
        assert low == axes.texts[0].xy[1] > axes.get_ylim()[0]
    assert right.get_xlim()[1] > 12  # sweep's ticks, which are more than N


# As a process


def test_help_answers_in_under_half_a_second():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "--coarse-steps" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_ctrl_c_leaves_the_finished_prompts_complete(tmp_path, tiny):
    prompts = [word for i in range(50) for word in ("--prompt", f"moon {i}")]
    argv = [sys.executable, "main.py", "-o", str(tmp_path / "out"), "--model", str(tiny), *SMALL, *prompts]
    # A shell's background job, as CI may be, has its children ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, cwd=ROOT, **pipes, text=True, preexec_fn=heed)
    for line in process.stdout:
        if line.startswith("prompt 3 "):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1 and "interrupted" in err
    results = record(tmp_path / "out")["prompts"]
    assert len(results) >= 2
    for result in results:
        Image.open(tmp_path / "out" / result["folder"] / "srds_final.png").load()
        assert TRUTH | SET <= files(tmp_path / "out" / result["folder"])
