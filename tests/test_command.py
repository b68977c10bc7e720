"""The command, as its users run it: `main(argv)` in this process, and as a process of its own."""

import contextlib
import functools
import io
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, strategies
from matplotlib.figure import Figure
from PIL import Image
from test_processes import assert_equal_runs
from test_sequences import REFINEMENT, RESULT, RUN, make_task

import main
import pipelines
import utils
from conftest import arguments, files, pixels, run_record, sample_folders, sample_records
from models import loading
from refinement import difference
from sampler import Sampler
from settings import ROWS, Call, Failure, Settings, in_one_line, words_of
from study import bench
from study.folder import pack

ROOT = Path(main.__file__).parent
SET = {"srds_initialized.png", "srds_final.png", "srds_filmstrip.png"}
OWN = {"srds_refinements.webp"}  # of one sample
TRUTH = {"srds_ddim_gt.png", "srds_ddim_course.png", "trajectory_errors_plot.png", "trajectory_errors_table.csv"}
TOP = {"run.json", "results.csv"}


def iterations(count):
    return {f"srds_iteration_{k}.png" for k in range(1, count + 1)}


def top(out):
    """The names of the files in an output directory, without those of the samples."""
    return {path.name for path in out.iterdir() if path.is_file()}


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Run the command on the tiny model into tmp_path/out: (exit status, output folder, stdout)."""

    def run(*more, model=tiny, out="out"):
        status = main.main(arguments(tmp_path / out, model, "-gs", "2", *more, prompts=[]))
        return status, tmp_path / out, capsys.readouterr().out

    run.out = tmp_path / "out"
    return run


# What a run leaves


@pytest.fixture(scope="module")
def exact_run(tiny, tmp_path_factory):
    """The output directory of one prompt that ran to exactness."""
    out = tmp_path_factory.mktemp("exact")
    more = ["-gs", "2", "--tolerance", "0", "--fixed-batch"]
    assert main.main(arguments(out, tiny, *more, prompts=["A red sun, 夜"])) == 0
    return out


def test_one_sample_is_in_its_folder_and_the_same_files_show_it_at_the_top(exact_run):
    (folder,) = sample_folders(exact_run)
    own = SET | OWN | TRUTH | iterations(3)
    assert files(folder) == own | {"result.json"} and top(exact_run) == own | TOP
    assert files(exact_run) == top(exact_run) | {f"samples/{folder.name}/{name}" for name in files(folder)}
    for name in own:
        assert (exact_run / name).read_bytes() == (folder / name).read_bytes()
    assert folder.name.startswith("a-red-sun-42-")


def test_a_result_has_what_made_it_and_what_each_refinement_took(exact_run):
    (record,) = sample_records(exact_run)
    made, result = record["made_by"], record["result"]
    assert (made["prompt"], made["seed"], made["schedule"], made["nodes"]) == ("A red sun, 夜", 42, "pipelined", None)
    assert {each.name for each in fields(Settings)} <= made.keys() and result["stop_reason"] == "exact"
    assert record["files"] == {
        path.name: path.stat().st_size for path in sample_folders(exact_run)[0].iterdir() if path.name != "result.json"
    }
    entries = result["refinements"]
    assert [(entry["k"], entry["serial_evaluations"]) for entry in entries] == [(0, 3), (1, 5), (2, 7), (3, 9)]
    assert [entry["verdict"] for entry in entries] == 3 * ["continuing"] + ["converged"]
    assert entries[0]["image_change"] is None and entries[0]["trajectory_change"] is None
    assert entries[-1]["difference"] == 0 < entries[0]["difference"] and entries[-1]["total_evaluations"] == 18
    assert entries[-1]["seconds"] > 0 and result["sequential_seconds"] > 0


def test_the_error_table_is_zero_where_a_boundary_is_exact(exact_run):
    table = pd.read_csv(exact_run / "trajectory_errors_table.csv", index_col=0)
    assert list(table.index) == ["Iteration_1", "Iteration_2", "Iteration_3"]
    assert list(table.columns) == ["Boundary_1", "Boundary_2", "Boundary_3"]
    assert (table.values == 0).tolist() == [[i <= k for i in range(3)] for k in range(3)]


def test_results_have_a_row_for_each_refinement_and_a_column_for_each_setting(exact_run):
    table = pd.read_csv(exact_run / "results.csv")
    names = "prompt seed folder k final verdict serial_evaluations total_evaluations network_calls widest_tick seconds "
    names += "sequential_seconds peak_memory_mib difference psnr ssim image_change trajectory_change "
    assert list(table.columns)[:20] == f"{names} damping error".split()
    assert {each.name for each in fields(Settings)} <= {*table} and table.k.tolist() == [0, 1, 2, 3]
    assert table.final.tolist() == [False, False, False, True] and table.serial_evaluations.tolist() == [3, 5, 7, 9]
    assert set(table.folder) == {sample_folders(exact_run)[0].name} and table.error.isna().all()


def test_what_runs_is_said_first_then_each_refinement_and_a_table_closes(run):
    _, out, printed = run("--prompt", "a moon", "--tolerance", "0")
    first, second, *lines, header, row = [line for line in printed.splitlines() if line]
    assert first.startswith("srds, ddim, N = 9, B = 3, damped, pipelined, tolerance 0 on ")
    assert second == "sample 1 of 1: a moon"
    assert [line[:29] for line in lines] == [f"  k = {k}: {3 + 2 * k} serial evaluations" for k in range(4)]
    assert "difference" in lines[0] and lines[-1].endswith("converged")
    assert row.split()[:4] == ["a", "moon", "3", "9"] and row.endswith(" exact") and len(row) <= 100


def test_a_run_records_its_settings_and_a_command_that_makes_the_same_samples(run, tmp_path, monkeypatch, capsys):
    """As its words and by --config, whatever has become of the file of prompts and of the defaults."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\\# 3\n-b\n")
    _, out, _ = run("-p", str(prompts), *"--seeds 7-8 --no-ground-truth --eta 0.5 --sweep tol=1,0 --again".split())
    record = run_record(out)
    assert record["settings"].keys() >= ROWS.keys() - {each.name for each in fields(Call)}
    assert record["settings"]["coarse_steps"] == "3" and record["settings"]["seed"] == "7, 8"
    assert record["environment"]["device"] == "cpu" and record["environment"]["torch"] in torch.__version__
    assert shlex.split(record["command"])[2:4] == ["-o", str(out)]
    monkeypatch.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    prompts.write_text("another\n")
    assert main.main(shlex.split(record["reproduce"])[2:]) == 0
    assert "8 of 8 samples are there already" in capsys.readouterr().out
    names = [each.name for each in fields(Settings)]
    edited = dict(zip(names, Settings.__init__.__defaults__)) | {"solver": "dpmsolver++", "max_iterations": 7}
    monkeypatch.setattr(Settings.__init__, "__defaults__", (*edited.values(),))
    assert main.main(["--config", str(out / "run.json"), "-o", str(out)]) == 0
    assert "8 of 8 samples are there already" in capsys.readouterr().out
    assert run_record(out)["reproduce"] == record["reproduce"] and "--again" not in record["reproduce"]


def record_of(folder, **reproduce):
    """A run.json in a folder, of a command with these values; its path."""
    folder.mkdir(exist_ok=True)
    words = " ".join(words_of(reproduce))
    (folder / "run.json").write_bytes(pack({**RUN, "reproduce": f"python main.py {words}"}))
    return str(folder / "run.json")


SWEEP, CALL = ("fs:cs=9:3,16:4", "tol=1,2"), ("strength=0.5", "clip-skip=1")


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], {}),
        (["-fs", "20", "--prompt", "c"], {"fine_steps": 20, "prompt": ("c",), "sweep": SWEEP[1:]}),
        (["-p", "good.txt"], {"prompts": "good.txt", "prompt": None}),
        (["--seed", "5"], {"seed": 5, "seeds": None}),
        (["-tol", "3"], {"tolerance": 3, "sweep": SWEEP[:1]}),
        (["--sweep", "eta=0,1"], {"eta": "left out", "sweep": (*SWEEP, "eta=0,1")}),
        (["--call", "strength=0.9"], {"call": (CALL[1], "strength=0.9")}),
        (["--sweep", "strength=1,0.9", "-cs", "2"], {"call": CALL[1:], "sweep": (SWEEP[1], "strength=1,0.9")}),
        (["--call", "guidance_scale=3"], {"guidance_scale": None, "call": (*CALL, "guidance_scale=3")}),
    ],
)
def test_what_is_given_beside_config_replaces_what_is_recorded_of_the_same(argv, expected, workplace):
    recorded = {"eta": 0.5, "guidance_scale": 2, "prompt": ("a", "b"), "seeds": "3,4", "call": CALL, "sweep": SWEEP}
    config = record_of(workplace / "run", output_dir="old", **recorded)
    given = main.parse(["--config", config, "-o", "new", *argv]).given
    expected = recorded | {"output_dir": "new", "solver": None} | expected
    assert {name: given.get(name, "left out") for name in expected} == expected


@pytest.mark.parametrize(
    "more, counts",
    [
        ([], "srds, N = 9, B = 3, pipelined: k = 0: 3 (6), 1: 5 (12), 2: 7 (16), 3: 9 (18); of sequential sampling: 9"),
        (["--max-iterations", "1", "--schedule", "sweep"], "srds, N = 9, B = 3, sweep: k = 0: 3 (3), 1: 7 (11);"),
        (["--method", "collocation", "--nodes", "5", "--window", "1", "--max-iterations", "0"],
         "collocation, N = 9, M = 5: k = 0: 5 (5), in the end at most 9;"),
    ],
)  # fmt: skip
def test_a_dry_run_says_what_is_made_and_what_it_takes_and_makes_nothing(more, counts, run, monkeypatch):
    argv = ["--prompt", "a moon", "-tol", "0", "--no-ground-truth", *more]
    with monkeypatch.context() as patched:
        patched.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
        status, out, printed = run("--dry-run", *argv, "--seeds", "3-14")
    assert status == 0 and not out.exists()
    named = re.findall("sample ([0-9]+) of 12: a moon, seed ([0-9]+)\n  samples/(.*)", printed)
    assert [(number, seed) for number, seed, _ in named] == [(str(i), str(i + 2)) for i in range(1, 11)]
    assert f"serial (total) evaluations of {counts}" in printed and printed.count("serial") == 1
    _, out, then = run(*argv, "--seed", "3")
    assert then.splitlines()[0] == printed.splitlines()[0] and sample_folders(out)[0].name == named[0][2]
    for k, entry in enumerate(sample_records(out)[0]["result"]["refinements"]):
        assert f"{k}: {entry['serial_evaluations']} ({entry['total_evaluations']})" in counts
    before = files(out)
    assert "1 of 1 samples are there already" in run("--dry-run", *argv, "--seed", "3")[2] and files(out) == before


@pytest.mark.slow
def test_several_samples_are_shown_side_by_side(run, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red sun\r\n# note\r\n\r\nüber / the: hills\r\n\\# 3\r\n".encode())
    status, out, printed = run("-p", str(tmp_path / "p.txt"), "-tol", "0", "--max-iterations", "2")
    folders = sample_folders(out)
    prompts = [record["made_by"]["prompt"] for record in sample_records(out)]
    assert status == 0 and prompts == ["a red sun", "über / the: hills", "# 3"]
    assert [folder.name[:-9] for folder in folders] == ["a-red-sun-42", "uber-the-hills-42", "3-42"]
    own = SET | TRUTH | iterations(2)
    assert top(out) == own | TOP
    assert all(files(folder) == own | OWN | {"result.json"} for folder in folders)
    overview, (size, below) = pixels(out / "srds_iteration_1.png"), (192, 18 + 4)  # a cell's image, and its caption
    assert overview.shape == (2 * (size + below) + 4, 2 * size + 4, 3)
    places = [overview[y:, x:] for y in (0, size + below + 4) for x in (0, size + 4)]
    for folder, place in zip(folders, places):
        image = Image.open(folder / "srds_iteration_1.png").resize((size, size), Image.Resampling.BICUBIC)
        assert (place[:size, :size] == np.asarray(image)).all()
        caption = place[size : size + below, :size]
        assert (caption == 255).mean() > 0.8 and caption.min() < 128
    assert (places[3] == 255).all()
    tables = [pd.read_csv(folder / "trajectory_errors_table.csv", index_col=0) for folder in [out, *folders]]
    np.testing.assert_allclose(tables[0].values, np.sqrt(sum(table.values**2 for table in tables[1:])), rtol=1e-6)
    assert printed.count(" max-iterations\n") == 3


def filmstrip(refinements, truth=100):
    """The filmstrip of samples with so many refinements beyond k = 0, whose images are grey, as pixels.

    Refinement k differs from the ground truth by 20, 5 and then 0 grey levels.
    """
    errors = RESULT["errors"] if truth else None
    entries = lambda count: [REFINEMENT | {"k": k, "difference": 1.0 if truth else None} for k in range(count + 1)]
    results = [{**RESULT, "refinements": entries(count), "errors": errors} for count in refinements]
    records = [{"made_by": make_task(seed=i).made_by, "result": result} for i, result in enumerate(results)]
    shades = {"srds_initialized": 120, "srds_iteration_1": 105}
    image_of = lambda record, name: np.full((192, 192, 3), shades.get(name, 100), np.uint8)
    return np.asarray(Image.open(io.BytesIO(utils.pictures(records, image_of, alike=False)["srds_filmstrip.png"])))


def test_the_filmstrip_has_the_difference_times_20_below_each_image_and_nothing_after_the_last():
    strip, step = filmstrip([2, 1]), 192 + 4
    title, caption = 8 + 18 + 4, 3 * 18 + 4
    row = title + 2 * step + caption
    assert strip.shape == (2 * row, 4 * step - 4, 3)
    means = lambda top: [strip[top : top + 192, c * step : c * step + 192].mean() for c in range(4)]
    assert means(title) == [120, 105, 100, 100] and means(title + step) == [255, 100, 0, 0]
    assert means(row + title) == [120, 105, 255, 100] and means(row + title + step) == [255, 100, 255, 0]
    alone = filmstrip([2], truth=None)
    assert alone.shape == (title + step + caption - 18, 3 * step - 4, 3)
    assert alone[title + step - 4 :].mean() > 200, "only the captions are below the images"


def test_the_filmstrip_has_at_most_six_images_a_row_and_sixteen_rows_and_says_what_it_leaves_out():
    step, row = 192 + 4, 8 + 18 + 4 + 2 * (192 + 4) + 3 * 18 + 4
    few, many = filmstrip([12] * 16), filmstrip([12] * 20)
    assert few.shape == (16 * row, 6 * step - 4, 3) and many.shape == (16 * row + 8 + 18 + 4, 6 * step - 4, 3)
    assert (many[: 16 * row] == few).all() and many[16 * row :].min() < 128


def test_on_a_plots_logarithmic_axis_zeros_have_a_line_of_their_own_below_whole_decades():
    axes = Figure().subplots()
    utils.log_scale(axes, [[0, 3e-5], [0.02, 0.2]])
    places = axes.transAxes.inverted().transform(axes.transData.transform([(0, 10.0**e) for e in range(-5, 1)]))[:, 1]
    zero = axes.transAxes.inverted().transform(axes.transData.transform((0, 0)))[1]
    assert 0 < zero < places[0] - 0.02 and places[-1] == pytest.approx(1)
    np.testing.assert_allclose(np.diff(places), np.diff(places)[0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", *(f"$10^{{{e}}}$" for e in range(-5, 1))]


def test_the_plot_has_root_mean_squares_and_is_also_written_as_svg_without_sampling_again(run, monkeypatch):
    argv = ["--prompt", "a moon", "--prompt", "a sun", "--max-iterations", "1"]
    _, out, _ = run(*argv)
    before, table = files(out), pd.read_csv(out / "trajectory_errors_table.csv", index_col=0).values
    monkeypatch.setattr(utils, "error_plot", Mock(side_effect=utils.error_plot))
    status, _, printed = run(*argv, "--plot-format", "svg")
    assert status == 0 and "2 of 2 samples are there already" in printed
    assert files(out) == before | {"trajectory_errors_plot.svg"}
    errors = utils.error_plot.call_args.args[0]
    np.testing.assert_allclose(errors[1:], table / np.sqrt(2 * 4 * 8 * 8), rtol=1e-6)  # two samples of 4 x 8 x 8
    text = (out / "trajectory_errors_plot.svg").read_text()
    assert ", srds, ddim, N = 9, B = 3, samples: 2<" in text and "L2" not in text and "prompt" not in text
    assert "sequential, N = 9<" in text and utils.COLORS["srds"] in text and utils.COLORS["collocation"] not in text
    assert run(*argv)[0] == 0 and files(out) == before


def test_an_animation_shows_a_samples_refinements_and_then_the_ground_truth_a_second_each(exact_run):
    with Image.open(exact_run / "srds_refinements.webp") as animation:
        frames = [(animation.seek(i), np.asarray(animation), animation.info["duration"])[1:] for i in range(5)]
        assert animation.n_frames == 4 + 1 and {duration for _, duration in frames} == {1000}
    for (frame, _), name in zip(
        frames, ["srds_initialized", *(f"srds_iteration_{k}" for k in (1, 2, 3)), "srds_ddim_gt"]
    ):
        image = np.asarray(Image.open(exact_run / f"{name}.png").resize((192, 192)), int)
        assert frame.shape[0] > 192 and abs(frame[:192, :, :3] - image).mean() < 12


@pytest.mark.parametrize(
    "more, stop_reason, ticks, boundaries",
    [
        (["--no-ground-truth"], "exact", 9, None),
        (["-cs", "9", "--fixed-batch"], "exact", 9, 9),  # blocks of one step need no refinement
        (["--method", "collocation", "-fs", "20", "--nodes", "6"], "all nodes", 20, 3),
    ],
)
def test_a_run_leaves_an_image_a_refinement_and_its_comparison_to_the_truth(more, stop_reason, ticks, boundaries, run):
    status, out, printed = run("--prompt", "a moon", "-tol", "0", *more)
    result = sample_records(out)[0]["result"]
    count, last = len(result["refinements"]) - 1, result["refinements"][-1]
    assert status == 0 and top(out) == SET | OWN | iterations(count) | TOP | (TRUTH if boundaries else set())
    assert last["serial_evaluations"] <= ticks and (count == 0) == (boundaries == 9)
    assert result["stop_reason"] == stop_reason and f" {stop_reason}\n" in printed
    if boundaries:
        assert last["difference"] < (0.1 if stop_reason == "all nodes" else 1e-9)
        assert pd.read_csv(out / "trajectory_errors_table.csv", index_col=0).shape == (count, boundaries)
    else:
        assert result["sequential_seconds"] is None is last["difference"]
        assert not any("difference" in line for line in printed.splitlines() if line.startswith("  k"))


def test_from_python_a_sample_is_the_commands_to_the_bit(run, tiny):
    """Images, counts, changes and differences to the truth."""
    more = ["--solver", "ddpm", "--stop-rule", "trajectory", "--seed", "3", "--negative-prompt", "rain"]
    _, out, _ = run("--prompt", "a moon", *more)
    own = Settings(fine_steps=9, coarse_steps=3, solver="ddpm", stop_rule="trajectory", seed=3)
    sampler = Sampler.from_pretrained(tiny, own, {"guidance_scale": 2, "negative_prompt": "rain"}, device="cpu")
    sample, truth = sampler("a moon"), sampler.sequential("a moon")
    result = sample_records(out)[0]["result"]
    assert result["stop_reason"] == sample.stop_reason
    names = "k serial_evaluations total_evaluations image_change trajectory_change damping".split()
    for refinement, entry in zip(sample.refinements, result["refinements"], strict=True):
        assert [entry[name] for name in names] == [getattr(refinement, name) for name in names]
        name = f"iteration_{refinement.k}" if refinement.k else "initialized"
        assert (pixels(out / f"srds_{name}.png") == refinement.image).all()
        assert entry["difference"] == difference(refinement.image, truth.image)
    assert (pixels(out / "srds_final.png") == sample.image).all()
    assert (pixels(out / "srds_ddim_gt.png") == truth.image).all()
    table = pd.read_csv(out / "trajectory_errors_table.csv", index_col=0)
    rows, own = pd.read_csv(out / "results.csv"), sample.table(truth).drop(columns=["seconds", "sequential_seconds"])
    pd.testing.assert_frame_equal(rows[[*own]], own, check_dtype=False)
    errors = [(each.states - truth.states)[1:].flatten(1).norm(dim=1) for each in sample.refinements[1:]]
    np.testing.assert_allclose(table.values, torch.stack(errors), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["srds", "collocation"])
def test_a_run_starts_from_the_trajectories_that_another_kept(method, run, tmp_path):
    both, more = ["--prompt", "a moon", "--prompt", "a sun"], ["--method", method, "--no-ground-truth"]
    _, earlier, _ = run(*both, *more, "--keep-trajectories", out="earlier")
    assert all((folder / "trajectory.safetensors").is_file() for folder in sample_folders(earlier))
    ticks = lambda out: [record["result"]["refinements"][-1]["serial_evaluations"] for record in sample_records(out)]
    status, out, _ = run(*both, *more, "--start-from", str(earlier))
    assert status == 0 and all(now < was for now, was in zip(ticks(out), ticks(earlier), strict=True))
    assert not list(out.rglob("trajectory*")) and "2 of 2" in run(*both, *more, "--start-from", str(earlier))[2]
    _, one, _ = run("--prompt", "a moon", *more, "--keep-trajectories", out="one")
    assert run(*both, *more, "--seed", "43", "--start-from", str(one))[0] == 0


def test_starts_that_do_not_fit_are_one_line_and_status_2(run, tiny, tmp_path, capsys):
    both, more = ["--prompt", "a", "--prompt", "b"], ["--no-ground-truth", "--max-iterations", "1"]
    _, earlier, _ = run(*both, *more, "--keep-trajectories")

    def refused(words, *argv):
        start = [*both, *argv, "--start-from", str(earlier)]
        assert main.main(arguments(tmp_path / "other", tiny, *start, prompts=[])) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("main.py: error: argument --start-from: ") and words in err, err

    refused("has no sample of 'c' with seed 42; give a run that has it", "--prompt", "c")
    refused("is the output directory; give the directory of another run", "-o", str(earlier))
    refused("(4, 8, 8) is not the states' shape (4, 16, 8)", "--height", "128", "--width", "64")
    kept = sample_folders(earlier)[0] / "trajectory.safetensors"
    kept.write_bytes(b"not a trajectory".ljust(kept.stat().st_size))
    refused("is not the directory of a run that kept its trajectories")
    kept.unlink()
    refused("is not the directory of a run that kept its trajectories")


@pytest.mark.parametrize("prompts, seeds", [(["a", "b"], [7, 8]), ([], [7])])
def test_a_model_that_reads_no_prompts_needs_none_and_makes_each_line_a_seed(prompts, seeds, tmp_path, capsys):
    pipelines.pixels().save_pretrained(tmp_path / "model")
    argv = ["--no-ground-truth", "--max-iterations", "1", "--seed", "7"]
    assert main.main(arguments(tmp_path / "out", tmp_path / "model", *argv, prompts=prompts)) == 0
    said = "model reads no prompts: seeds rise from 7, one a line"
    assert (said in capsys.readouterr().out) == (len(prompts) > 1)
    assert [record["made_by"]["seed"] for record in sample_records(tmp_path / "out")] == seeds


def test_an_embedding_that_no_prompt_names_is_noted(run, tmp_path):
    safetensors.torch.save_file({"red": torch.randn(32)}, tmp_path / "red.safetensors")
    more = ["--textual-inversion", str(tmp_path / "red.safetensors"), "--no-ground-truth", "--max-iterations", "1"]
    assert "note: no prompt names red" in run("--prompt", "a moon", *more)[2]
    assert "no prompt names" not in run("--prompt", "a red moon", *more)[2]


def test_control_characters_do_not_reach_the_terminal(tmp_path, tiny, capsys):
    more = ["--no-ground-truth", "--max-iterations", "1"]
    prompts = ["a\x1b[2Jsun" + 100 * " \x1b]0;owned\x07", "moon"]
    assert main.main(arguments(tmp_path / "\x1b[2J", tiny, *more, prompts=prompts)) == 0
    assert main.main(arguments(tmp_path / "out", "\x1b[2J", *more)) == 1
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07"} & {*(out + err)} and r"a\x1b[2Jsun" in out and r"\x1b[2J is not a folder" in err


def test_a_long_prompt_is_cut_with_a_warning_and_not_repeated_in_every_image(tmp_path, tiny, capsys):
    long, shown = "wo\x1brd " * 1900 + "end", io.StringIO()
    with contextlib.ExitStack() as stack:
        handlers = logging.getLogger("diffusers").handlers
        for handler in (each for each in handlers if hasattr(each, "stream")):
            stack.enter_context(patch.object(handler, "stream", shown))
        assert main.main(arguments(tmp_path, tiny, "--max-iterations", "1", prompts=[long])) == 0
    (warning,) = shown.getvalue().splitlines()
    assert "was truncated" in warning and len(warning) < 500 and "\x1b" not in warning
    assert (tmp_path / "srds_final.png").stat().st_size < 40_000
    assert sample_records(tmp_path)[0]["made_by"]["prompt"] == long


def test_several_seeds_are_a_sample_each_and_one_may_be_given(run):
    prompts = ["--prompt", "a moon", "--prompt", "a sun", "--no-ground-truth"]
    status, out, printed = run(*prompts, "--seeds", "7-8,3")
    assert status == 0 and "sample 2 of 6: a moon, seed 8" in printed
    made = [(record["made_by"]["prompt"], record["made_by"]["seed"]) for record in sample_records(out)]
    assert made == [(prompt, seed) for prompt in ("a moon", "a sun") for seed in (7, 8, 3)]
    assert len(pd.read_csv(out / "results.csv").groupby(["prompt", "seed"])) == 6
    assert "2 of 2 samples are there" in run(*prompts, "--seeds", "3")[2]
    assert "2 of 2 samples are there" in run(*prompts, "--seed", "3")[2]


def test_unsettled_trajectories_are_noted_once(run):
    _, out, _ = run("--prompt", "a moon", "-tol", "0", "--no-ground-truth")
    first = sample_records(out)[0]["result"]["refinements"][1]
    between = ["--no-ground-truth", "-tol", str((first["image_change"] + first["trajectory_change"]) / 2)]
    printed = run("--prompt", "a moon", *between)[2]
    assert printed.count("note: the image has settled, but the trajectory still changes") == 1
    assert "note:" not in run("--prompt", "a moon", *between, "--stop-rule", "trajectory")[2]


@pytest.mark.slow
def test_damping_is_recorded_and_shown(run):
    """On the demo model, as random weights turn nothing round."""
    strong = ["--prompt", "a red sun", *"-cs 5 -fs 25 -gs 7.5 --max-iterations 2 --no-ground-truth".split()]
    _, out, printed = run(*strong, model="demo")
    damping = [entry["damping"] for entry in sample_records(out)[0]["result"]["refinements"]]
    assert damping[0] == 0 < damping[1] and f"damping {damping[1]:.2g}" in printed
    _, out, printed = run(*strong, "--correction", "paper", model="demo")
    assert not any(entry["damping"] for entry in sample_records(out)[0]["result"]["refinements"])
    assert not any("damping" in line for line in printed.splitlines() if line.startswith("  k"))


def test_prompts_that_tables_read_otherwise_stay_texts(run):
    texts = ["null", "NA", "=1+1", "1e3", ' "quoted", and more']
    _, out, _ = run(*[f"--prompt={text}" for text in texts], "--no-ground-truth", "--max-iterations", "1")
    table = pd.read_csv(out / "results.csv", keep_default_na=False)
    assert list(dict.fromkeys(table.prompt)) == [text.strip() for text in texts]


def test_names_that_are_not_utf_8_are_read_and_written(tiny, tmp_path):
    prompts, out = tmp_path / "p\udce9.txt", tmp_path / "lat\udce9"
    prompts.write_text("a moon\n")
    argv = arguments(out, tiny, "-p", str(prompts), "--no-ground-truth", "--max-iterations", "1", prompts=[])
    argv.remove("--no-report")
    assert main.main(argv) == 0 and run_record(out)["settings"]["prompts"]
    assert top(out) == TOP | SET | OWN | iterations(1) | {"report.html"}


def test_ctrl_c_leaves_what_is_known_of_every_sample(run, monkeypatch, capsys):
    """In the third of three samples, when the second has failed."""
    errors = torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()
    turns = iter([bench.sample, *(Mock(side_effect=error) for error in errors)])
    monkeypatch.setattr(bench, "sample", lambda *args: next(turns)(*args))
    argv = ["--prompt", "a", "--prompt", "b", "--prompt", "c", "--no-ground-truth"]
    status, out, printed = run(*argv)
    assert status == 130 and [bool(each["error"]) for each in run_record(out)["samples"]] == [False, True, False]
    table = pd.read_csv(out / "results.csv", keep_default_na=False)
    ended = table[table.final].error.tolist()
    assert ended[0] == "" and "out of memory" in ended[1] and ended[2] == "not made" and len(ended) == 3
    shown, means = printed.split("\n\n")[:2]
    assert [line.split(")")[0].split()[-1] for line in shown.splitlines()[-2:]] == ["failed", "made"]
    assert means.splitlines()[1].split()[:3] == ["all", "3", "1"], "one failed"
    monkeypatch.undo()
    assert "1 of 3 samples are there already" in run(*argv)[2]


# Side by side


def test_a_batch_leaves_what_samples_made_one_by_one_leave(run, tmp_path):
    """The same samples, which are not made again, and lines that say which sample they are about."""
    argv = ["--prompt", "a", "--prompt", "b", "--prompt", "c"]
    assert run(*argv, out="alone")[0] == 0
    status, out, printed = run(*argv, "--batch", "2")
    assert status == 0
    assert_equal_runs(tmp_path / "alone", out)
    lines = [line for line in printed.split("\n\n")[0].splitlines() if line.startswith(("sample ", "  k = "))]
    assert lines[:3] == ["sample 1 of 3: a", "sample 2 of 3: b", "sample 1 of 3: a"]
    assert sum(line.startswith("  k = ") for line in lines) == len(pd.read_csv(out / "results.csv"))
    assert "3 of 3 samples are there already" in run(*argv, "--batch", "3")[2]


def test_a_batch_larger_than_the_number_of_samples_takes_no_more_memory(run, monkeypatch):
    """The first call, before samples are timed, has as many states as there can be."""
    forward, seen = UNet2DConditionModel.forward, []
    monkeypatch.setattr(
        UNet2DConditionModel, "forward", lambda net, x, *a, **kw: seen.append(len(x)) or forward(net, x, *a, **kw)
    )
    assert run("--prompt", "a", "--prompt", "b", "--batch", "200")[0] == 0
    assert max(seen) <= 2 * 2 * 10


def test_ctrl_c_ends_a_batch_and_keeps_what_is_finished(run, monkeypatch):
    """In a call of the network, when four of six samples are being made and one is finished."""
    argv = ["--prompt", "a", "--seeds", "1-6", "--tolerance", "0", "--no-ground-truth"]
    forward = UNet2DConditionModel.forward

    def interrupted(unet, x, *rest, **more):
        if any((tmp / "result.json").is_file() for tmp in (run.out / "samples").glob("a-*")):
            raise KeyboardInterrupt
        return forward(unet, x, *rest, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", interrupted)
    status, out, printed = run(*argv, "--batch", "4")
    monkeypatch.undo()
    made = len(list((out / "samples").glob("a-*")))
    assert status == 130 and 0 < made < 6
    assert not [each for each in threading.enumerate() if "(run)" in each.name], "the threads of samples; tqdm has one"
    assert f"{made} of 6 samples are there already" in run(*argv)[2]


# Bad input

A = ["--prompt", "a"]
NOT_USABLE = {
    "--coarse-steps/-cs": ["few", 0], "--tolerance/-tol": [-1, "nan"], "--guidance-scale/-gs": ["inf", "1e308"],
    "--seed/-s": [-1, 2**64], "--seeds": ["few"], "--parallel": ["both"], "--lora": [""], "--model": [""],
    "--output-dir/-o": [""], "--negative-prompt": ["caf\udce9", "a\0b"],
}  # fmt: skip
FILES = {
    "missing.txt": "cannot be read (No such file or directory)", "folder": "cannot be read", "good.txt\0": "",
    "empty.txt": "holds no prompt", "blank.txt": "holds no prompt", "latin.txt": "cannot be read (it is not UTF-8)",
}  # fmt: skip
SWEEPS = {
    "coarse_steps": "--sweep: 'coarse_steps' is not usable; give a setting and its values",
    "model=a,b": "--sweep: 'model=a,b' is not usable", "seed=1,2": "--sweep: 'seed=1,2' is not usable",
    "cs=2,x": "--coarse-steps/-cs: 'x' is not usable; give a whole number",
    "cs=2,200": "--coarse-steps/-cs: 200 is more than the 100 fine steps",
    "solver=ddim,euler": "--solver: 'euler' cannot be used with",
    "method=srds,collocation nodes=4,5": "--nodes: 4 is not for srds; leave it out",
    "fine-steps:coarse-steps=25:5,100": "'fine-steps:coarse-steps=25:5,100' is not usable",
    "tolerence=1,2": "did you mean tolerance?", "cs=2,3 coarse-steps=4": "--sweep: 'coarse-steps=4' is not usable",
}  # fmt: skip
RECORDS = {
    "missing.json": "does not exist", "good.txt": "is no run.json that this version reads",
    **dict.fromkeys(["folder", "later/run.json", "torn/run.json"], "is no run.json that this version reads"),
}  # fmt: skip
BAD = [
    *(([*A, f"{flag.split('/')[0]}={value}"], f"{flag}: ") for flag, some in NOT_USABLE.items() for value in some),
    *((["-p", name], f"argument --prompts/-p: {name!r} {words}") for name, words in FILES.items()),
    *(([*A, *(f"--sweep={each}" for each in axes.split())], words) for axes, words in SWEEPS.items()),
    *(([*A, "-o", name], f"--output-dir/-o: {name!r} cannot be used (") for name in ("good.txt", "good.txt/out")),
    *(([*A, "--device", name], f"--device: {name!r} is not available on this") for name in ("tpu", "cuda:77", "x:y")),
    ([*A, "--device", "tpu", "--model", "nowhere/at-all"], "--device: 'tpu' is not available"),
    ([*A, "-o", "x" * 300], "cannot be used (File name too long)"),
    ([*A, "-cs", "11", "-fs", "10"], "--coarse-steps/-cs: 11 is more than the 10 fine steps"),
    ([], "--prompts/-p or --prompt: give one"),
    (["-p", "wide.txt"], "--prompts/-p: 'a\\x00' is not usable; give some text, in UTF-8, without NUL"),
    (["--prompt", " "], "--prompt: '' is not usable; give some text"),
    (["--prompt", "caf\udce9"], "--prompt: 'caf\\udce9' is not usable; give some text, in UTF-8"),
    (["--prompt", "a\0b"], "--prompt: 'a\\x00b' is not usable; give some text, in UTF-8, without NUL"),
    ([*A, "--seed"], "--seed/-s: expected one argument"),
    ([*A, "--seeds", "9-2"], "--seeds: '9-2' is not usable; give numbers"),
    ([*A, "--seeds", "1-9999999999"], "or ranges of at most 10000"),
    ([*A, "--seeds", f"1,{2**64}"], f"--seeds: '1,{2**64}' is not usable"),
    ([*A, "--seeds", "1", "--seed", "42"], "--seed/-s: 42 cannot be given together with --seeds"),
    ([*A, "-gs", "2", "--sweep", "guidance_scale=1,2"], "cannot be given together with --sweep; give one of them"),
    ([*A, "--height", "64"], "--height: 64 is one of two sides; give both"),
    ([*A, "--start-from", "nowhere"], "--start-from: 'nowhere' is not the directory of a run"),
    *(([*A, "--config", name], f"--config: {name!r} {why}; give the run.json of an") for name, why in RECORDS.items()),
    ([*A, "--two\nlines"], "argument --two lines is not known; --help lists all"),
    ([*A, "stray"], "argument stray is not known"),
    ([*A, "--tolerence", "1"], "argument --tolerence is not known; did you mean --tolerance?"),
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with prompt files of all kinds and an output directory with a run's files in it."""
    monkeypatch.chdir(tmp_path)
    contents = {
        "good": b"a moon\n", "empty": b"", "blank": b"\xef\xbb\xbf \r\n# note\n\n", "latin": b"caf\xe9\n",
        "wide": "a".encode("utf-16-le"), "many": b"a\nb\nc\n",
    }  # fmt: skip
    for name, data in contents.items():
        Path(f"{name}.txt").write_bytes(data)
    os.mkdir("folder")
    os.mkdir("out")
    record_of(tmp_path / "later", of_another_version=1)
    record_of(tmp_path / "torn", prompt="a 'b")
    Path("out/run.json").write_bytes(pack(RUN))
    Path("out/srds_final.png").write_text("an image")
    return tmp_path


@pytest.mark.parametrize("argv, words", BAD)
def test_bad_input_is_one_line_and_status_2(argv, words, workplace, tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    state = lambda: {(name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns) for name in files(workplace)}
    before = state()
    model = [] if "--model" in argv else ["--model", str(tiny)]
    assert main.main(["-o", "out", *model, *argv]) == 2
    out, err = capsys.readouterr()
    assert main.main(["-o", "out", *model, *argv, "--dry-run"]) == 2 and capsys.readouterr().err == err
    assert out == "" and err.startswith("main.py: error: argument ") and err.count("\n") == 1 and words in err, err
    assert any(remedy in err for remedy in ("; ", " give ", "expected one argument"))
    assert state() == before


def test_an_output_directory_must_be_given_and_be_writable(workplace, tiny, monkeypatch, capsys):
    assert main.main(A) == 2
    assert "--output-dir/-o is required; give a directory" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not hold root back
    assert main.main(["-o", "folder/out", *A, "--model", str(tiny)]) == 2
    assert "--output-dir/-o: 'folder/out' cannot be used (it is not writable); give another" in capsys.readouterr().err


FLAGS = [f"--{name.replace('_', '-')}" for name in ROWS]


@given(strategies.lists(strategies.sampled_from(FLAGS) | strategies.text(max_size=20), max_size=6))
def test_no_command_line_ends_in_anything_but_a_command_or_one_line(words):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main.parse(["-o", "out", *words])
    except Failure as error:
        assert error.status == 2 and "\n" not in in_one_line(main.one_line(error))
    except SystemExit as shown:
        assert shown.code == 0


# What fails later


@pytest.mark.parametrize(
    "more, answer, words",
    [
        (["--model", "folder"], 0.0, "has no readable model_index.json"),
        ([], torch.OutOfMemoryError("CUDA out of memory."), "out of memory; try a smaller --max-batch"),
        ([], MemoryError(), "out of memory; try a smaller --max-batch"),
        ([], float("nan"), "not finite in float32; try other settings"),
        (["--dtype", "bfloat16"], float("nan"), "not finite in bfloat16; try --dtype"),
    ],
)
def test_what_fails_later_is_one_line_and_status_1(more, answer, words, workplace, tiny, monkeypatch, capsys):
    def forward(self, x, *rest, **conditions):
        if isinstance(answer, Exception):
            raise answer
        return (x * answer,)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    assert main.main(arguments("out" if "--model" in more else "new", tiny, *more)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err, err
    assert Path("out/srds_final.png").read_text() == "an image"


def test_what_the_pipeline_itself_refuses_is_one_line_and_status_2(tiny, tmp_path, capsys):
    assert main.main(arguments(tmp_path, tiny, "--height", "63", "--width", "64")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the StableDiffusionPipeline cannot be called like this: `height` and" in err


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line_and_status_1(tiny, tmp_path, monkeypatch, capsys):
    def failing(module, inputs):
        raise OSError("no compiler found")

    monkeypatch.setattr(loading, "compile_network", lambda network: network.compile(backend=failing))
    assert main.main(arguments(tmp_path, tiny, "--compile")) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "argument --compile: torch cannot compile here" in err, err


# As a process


def test_help_has_every_flag_in_five_groups(capsys):
    assert main.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"{flag} " in out or f"{flag}\n" in out for flag in FLAGS)
    groups = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert main.main(["--version"]) == 0 and f"torch {torch.__version__}, diffusers" in capsys.readouterr().out
    assert groups[-5:] == ["model:", "sampling:", "collocation:", "experiment:", "output:"]
    assert "lines that begin with #" in " ".join(out.split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_what_is_finished(number, tmp_path, tiny):
    argv = [sys.executable, "main.py", *arguments(tmp_path / "out", tiny, prompts=[f"moon {i}" for i in range(50)])]
    # A shell's background job, as CI may be, has its children ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heed}
    how["env"] = {**os.environ, "MPLBACKEND": "module://absent.backend"}  # as a notebook's shell may set it
    process = subprocess.Popen(argv, cwd=ROOT, **how)
    next(line for line in process.stdout if line.startswith("sample 3 "))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and len(err.splitlines()) == 1 and "interrupted" in err
    finished = [folder for folder in sample_folders(tmp_path / "out") if folder.exists()]
    assert 2 <= len(finished) < 50 and all(TRUTH | SET <= files(folder) for folder in finished)
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert (table.error == "not made").sum() == 50 - len(finished)


@pytest.mark.slow
def test_a_reader_that_goes_away_sees_no_traceback(tmp_path, tiny):
    argv = [sys.executable, "main.py", *arguments(tmp_path / "out", tiny)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("srds, ddim")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait(timeout=120) is not None


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(tmp_path, tiny):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        argv = [sys.executable, "main.py", *arguments(tmp_path / "out", tiny)]
        environment = {"env": {**os.environ, **launch}, "timeout": 90}
        process = subprocess.run(argv, cwd=ROOT, **environment, capture_output=True, text=True)
    lines = [line for line in process.stderr.splitlines() if line.startswith("main.py: error:")]
    assert process.returncode == 1 and len(lines) == 1 and "cannot meet" in lines[0], process.stderr
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
