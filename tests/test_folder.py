"""The promises of an output directory: a sample is there whole, or not there, and never lost, mixed or in the way."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies
from test_sequences import RUN, age, killing, make_files, make_task

import main
from conftest import PROMPTS, arguments, contents, files, run_record, sample_folders
from sampler import Sampler
from settings import Failure
from study import bench, key
from study.folder import PART, Folder, read_run, read_sample
from study.report import page
from study.results import results_table, summary

ROOT = Path(main.__file__).parent
SHORT = ["--max-iterations", "1", "--no-ground-truth"]


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Run the command on the tiny model into tmp_path/out: (exit status, stdout, stderr)."""

    def run(*more, prompts=PROMPTS[:1], model=tiny, out="out"):
        capsys.readouterr()
        return main.main(arguments(tmp_path / out, model, *SHORT, *more, prompts=prompts)), *capsys.readouterr()

    return run


def snapshot(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def names(out):
    return sorted(os.listdir(out / "samples"))


def announced(printed):
    return [line.split(": ", 1)[1] for line in printed.splitlines() if re.match(r"sample \d+ of", line)]


# Killed, and gone on


@pytest.mark.slow
def test_a_command_killed_at_any_change_goes_on_to_what_an_uninterrupted_one_leaves(run, tmp_path):
    assert run(prompts=PROMPTS[:2], out="whole")[0] == 0
    kill, done = 0, [1]
    while len(done) > kill:
        out, kill = tmp_path / f"{kill}", kill + 7
        with killing(kill) as done:
            run(prompts=PROMPTS[:2], out=out)
        before = {path: snapshot(path) for path in out.glob("samples/a-*")}
        age(out)
        assert run(prompts=PROMPTS[:2], out=out)[0] == 0 and contents(out) == contents(tmp_path / "whole")
        assert all(snapshot(path) == before[path] for path in before), "it was made again"
    assert kill > 50


def test_the_same_command_goes_on_and_loads_nothing_if_nothing_is_left(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(prompts=PROMPTS[:3])[0] == 0
    before, (_, missing, damaged) = contents(out), sample_folders(out)
    shutil.rmtree(missing)
    os.truncate(damaged / "srds_final.png", 50)
    _, printed, _ = run(prompts=PROMPTS[:3])
    assert "1 of 3 samples are there already" in printed and announced(printed) == PROMPTS[1:3]
    assert contents(out) == before
    monkeypatch.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    whole = snapshot(out / "samples")
    for name in files(out):
        if "/" not in name and name != "run.json":
            (out / name).unlink()
    status, printed, _ = run(prompts=PROMPTS[:3])
    assert status == 0 and "3 of 3 samples are there already" in printed and announced(printed) == []
    assert contents(out) == before and snapshot(out / "samples") == whole


@pytest.mark.slow
def test_prompts_seeds_and_values_of_a_sweep_are_added_in_any_order(run, tmp_path):
    out, both = tmp_path / "out", PROMPTS[1::-1]
    assert run(prompts=PROMPTS[:1])[0] == 0
    before = snapshot(out / "samples")
    swept = ["--sweep", "eta=0.5,0", "--seeds"]
    for more, new, count in (
        (["--seeds", "42"], ["a moon"], 2),
        (["--seeds", "7,42"], ["a moon, seed 7", "a red sun, seed 7"], 4),
        ([*swept, "42,7"], [f"{text}, eta 0.5, seed {seed}" for text in both for seed in (42, 7)], 8),
    ):
        status, printed, _ = run(*more, prompts=both)
        assert status == 0 and announced(printed) == new and len(run_record(out)["samples"]) == count
    assert [(each["prompt"], each["seed"], each["settings"]["eta"]) for each in run_record(out)["samples"]] == [
        (text, seed, eta) for text in both for seed in (42, 7) for eta in (0.5, 0)
    ]
    assert before.items() <= snapshot(out / "samples").items()
    assert run(*swept, "7", prompts=both[:1])[0] == 0, "fewer of them"
    assert pd.read_csv(out / "results.csv").folder.nunique() == 2 and len(names(out)) == 8


def test_again_makes_samples_anew_and_one_that_fails_leaves_the_old_one(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(prompts=PROMPTS[:2])[0] == 0
    first, second = sample_folders(out)
    (first / "notes.txt").write_text("mine")
    times, before = [(each / "result.json").stat().st_mtime_ns for each in (first, second)], snapshot(second)
    status, printed, _ = run("--again")
    assert status == 0 and announced(printed) == ["a red sun"] and (first / "notes.txt").read_text() == "mine"
    assert (first / "result.json").stat().st_mtime_ns > times[0] and snapshot(second) == before
    failing(monkeypatch, PROMPTS[1], torch.OutOfMemoryError("out of memory"))
    assert run("--again", prompts=PROMPTS[:2])[0] == 1
    assert snapshot(second) == before and (second / "result.json").stat().st_mtime_ns == times[1]


# Never mixed


def edit_weights(model):
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_out.bias"] += 1e-3
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    return []


def edit_lora(model):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(16, 2)}
    safetensors.torch.save_file(weights, model.with_name("lora.safetensors"))
    return ["--lora", str(model.with_name("lora.safetensors"))]


def edit_start(model):
    argv = [*SHORT, "--keep-trajectories", "--again", "--seed", str(random.randrange(10**6))]
    assert main.main(arguments(model / "start", model, *argv, prompts=PROMPTS[:1])) == 0
    return ["--start-from", str(model / "start")]


@pytest.fixture
def program(monkeypatch):
    """Have the program's code and versions be what they were once a test has ended."""
    monkeypatch.setattr(key, "ROOT", key.ROOT)
    monkeypatch.setattr(key, "VERSIONS", {**key.VERSIONS})
    yield key.code_digest.cache_clear()
    key.code_digest.cache_clear()


def edit_code(model, edit=lambda text: text + "\nONE = 1\n"):
    """Have the program's code be a copy in which each file is edited."""
    for name in key.CODE:
        path = model / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(edit((ROOT / name).read_text()))
    key.ROOT = model / "code"
    key.code_digest.cache_clear()
    return []


def edit_version(model):
    key.VERSIONS["torch"] = "2.99"
    return []


@pytest.mark.parametrize(
    "first, edit, words",
    [
        (None, lambda model: ["-gs", "3"], "guidance_scale 7.5, not 3.0"),
        (None, lambda model: ["--correction", "paper", "--dtype", "bfloat16"], "correction 'damped', not 'paper'"),
        (None, lambda model: ["--dtype", "bfloat16"], "dtype 'float32', not 'bfloat16'"),
        (None, edit_weights, "model '.*"),
        (None, edit_lora, r"lora \[\], not .*"),
        (edit_lora, edit_lora, r"lora \[\[.*"),
        (edit_lora, lambda model: ["--lora", f"{model.with_name('lora.safetensors')}:0.5"], r"lora \[\[.*"),
        (edit_start, edit_start, "start '.*"),
        (None, edit_code, "code '.*"),
        (None, edit_version, "torch '.*', not '2.99'"),
    ],
)
def test_what_is_made_otherwise_is_another_sample_and_a_line_says_how(first, edit, words, run, tiny, tmp_path, program):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    assert run(*(first(model) if first else []), model=model)[0] == 0
    before = snapshot(out / "samples")
    status, printed, _ = run(*edit(model), model=model)
    assert status == 0 and announced(printed) == PROMPTS[:1]
    reason = f"1 of 1 samples must be made again: those in the directory have {words}"
    assert any(re.fullmatch(reason, line) for line in printed.splitlines()), printed
    assert before.items() <= snapshot(out / "samples").items() and len(names(out)) == 2
    (shown,) = sample_folders(out)
    assert f"{shown.name}/result.json" not in before, "the top shows the new one"


def test_an_edit_of_the_code_that_makes_results_is_a_difference(tmp_path, program):
    own = key.code_digest()
    for one in [(ROOT / name).read_text() for name in key.CODE]:
        edit_code(tmp_path, lambda text, one=one: text + "\nONE = 1\n" * (text == one))
        assert key.code_digest() != own, one[:80]


def test_a_model_is_known_by_what_is_in_it_not_by_where_it_lies(run, tiny, tmp_path, monkeypatch):
    assert run()[0] == 0
    shutil.copytree(tiny, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert "1 of 1 samples are there already" in run(model="copy")[1]


# Two commands at once


def test_an_interrupt_between_the_old_and_the_new_sample_leaves_the_old_one(tmp_path, monkeypatch):
    folder, task, rename, calls = Folder(tmp_path), make_task(), os.rename, []
    folder.open()
    folder.add(task.folder, make_files(task, b"first"))
    before = snapshot(folder.samples)

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.add(task.folder, make_files(task, b"second"), again=True)
    assert snapshot(folder.samples) == before and folder.has(task)


def test_who_comes_second_to_a_sample_drops_its_own_unless_asked_to_make_it_again(tmp_path):
    task, folders = make_task(), [Folder(tmp_path), Folder(tmp_path)]
    first, second = make_files(task, b"first"), make_files(task, b"second")
    for folder in folders:
        folder.open()
    for one, made, again, kept in ((0, first, False, first), (1, second, False, first), (1, second, True, second)):
        folders[one].add(task.folder, made, again)
        assert names(tmp_path) == [task.folder] and snapshot(tmp_path / "samples" / task.folder) == kept


@pytest.mark.slow
def test_two_commands_at_once_leave_the_samples_of_both(tiny, tmp_path):
    out, both = tmp_path / "out", (PROMPTS[:3], PROMPTS[1:])
    commands = [[sys.executable, "main.py", *arguments(out, tiny, *SHORT, prompts=some)] for some in both]
    started = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for command in commands]
    for process in started:
        assert process.communicate(timeout=200)[1] == b"" and process.returncode == 0
    assert len(names(out)) == 4 and all(read_sample(out / "samples", name) for name in names(out))
    assert [each["prompt"] for each in run_record(out)["samples"]] in both
    assert {*pd.read_csv(out / "results.csv").prompt} == {each["prompt"] for each in run_record(out)["samples"]}


# A sample that fails


def failing(monkeypatch, text, error):
    """Have the network fail for a prompt: with an error, or with None by numbers that are not finite."""
    loop, denoise = Sampler.loop, Mock(side_effect=error or (lambda x, n: x * float("nan")))

    def failing_loop(self, prompt, seed=None):
        made = loop(self, prompt, seed)
        if made.arguments["prompt"] == text:
            made.denoise = denoise
        return made

    monkeypatch.setattr(Sampler, "loop", failing_loop)


@pytest.mark.parametrize("error, words", [(torch.OutOfMemoryError("CUDA out of memory."), "out of memory; try"),
                                          (None, "not finite")])  # fmt: skip
def test_a_sample_that_fails_is_a_row_with_its_error_and_is_tried_again(error, words, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, PROMPTS[1], error)
        status, printed, line = run(prompts=PROMPTS)
    assert status == 1 and line.count("\n") == 1 and "1 of 4 samples failed; the first, of 'a moon': " in line
    rows = [row.split()[:2] for row in printed.splitlines() if row.endswith("failed")]
    assert words in line and rows == [["a", "moon"]]
    assert [words in (each["error"] or "") for each in run_record(out)["samples"]] == [False, True, False, False]
    table = pd.read_csv(out / "results.csv", keep_default_na=False)
    assert words in table[table.prompt == "a moon"].error.item() and set(table.prompt) == {*PROMPTS}
    status, printed, _ = run(prompts=PROMPTS)
    assert status == 0 and announced(printed) == ["a moon"]
    assert run(prompts=PROMPTS, out="whole")[0] == 0 and contents(out) == contents(tmp_path / "whole")


# Nobody else's files


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda out: (out / "srds_final.png").write_text("{}"), "srds_final.png, but no run.json"),
        (lambda out: (out / "run.json").write_text("{}"), "run.json, but no run.json"),
        (lambda out: (out / "samples").write_text("{}"), "cannot be used (File exists)"),
        (lambda out: (out / "samples").symlink_to("elsewhere"), "its `samples` is a link"),
    ],
)
def test_names_of_ours_without_a_run_are_refused_before_anything_is_sampled(make, words, run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / "out" / "elsewhere").mkdir(parents=True)
    make(tmp_path / "out")
    before = snapshot(tmp_path)
    status, printed, error = run()
    assert (status, printed, error.count("\n")) == (2, "", 1) and words in error and snapshot(tmp_path) == before


def test_other_files_are_left_alone_and_nothing_is_written_through_a_link(run, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    names = ("notes.txt", "srds_my_notes.png", ".part-mine", "samples/.part-own", "samples/mine/srds_final.png")
    mine = {name: b"mine" for name in names}
    (out / "samples" / "mine").mkdir(parents=True)
    for name, content in mine.items():
        (out / name).write_bytes(content)
        os.utime(out / name, (0, 0))
    assert run()[0] == 0
    (folder,) = sample_folders(out)
    shutil.copytree(folder, victim / "sample")
    (victim / "image").write_text("keep")
    before = snapshot(victim)
    for name in ("srds_final.png", "results.csv", "srds_iteration_9.png"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim / "image")
    assert run()[0] == 0 and not any(path.is_symlink() for path in out.rglob("*")) and (out / "results.csv").is_file()
    shutil.rmtree(folder)
    folder.symlink_to(victim / "sample")
    status, printed, error = run()
    assert (status, announced(printed), error.count("\n")) == (1, [], 1) and "does not hold the sample" in error
    assert snapshot(victim) == before and mine.items() <= snapshot(out).items()


@pytest.mark.parametrize("full, code", [("/samples/", "ENOSPC"), ("/samples/", "EIO"), ("/out/.part", "EDQUOT")])
def test_a_disk_that_is_full_or_fails_is_one_line_and_leaves_nothing_half(full, code, run, tmp_path, monkeypatch):
    out, sync, code = tmp_path / "out", os.fsync, getattr(errno, code)

    def fail(file):
        place = os.readlink(f"/proc/self/fd/{file}")
        if full in place and len(run_record(out)["samples"]) == 2:
            os.truncate(file, 10)
            raise OSError(code, os.strerror(code))
        return sync(file)

    assert run()[0] == 0
    whole = snapshot(out / "samples")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        status, _, error = run(prompts=PROMPTS[:2])
    assert status == 1 and error.count("\n") == 1 and f"cannot be written: {os.strerror(code)}" in error
    assert whole.items() <= snapshot(out / "samples").items() and not [*out.rglob(f"{PART}*")]
    assert all(read_sample(out / "samples", name) for name in names(out)) and read_run(out)
    assert run(prompts=PROMPTS[:2])[0] == 0 and run(prompts=PROMPTS[:2], out="whole")[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


# Records of others


ODD = [None, True, -1, 10**400, 1e308, "", "\ud800", "../../victim", [], [[]], [5], {}, {"a": [None]}]


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_a_record_of_another_shape_is_no_sample_and_one_of_its_shape_can_be_shown(value, tmp_path):
    folder, task, samples, runs = Folder(tmp_path), make_task(), [], []
    folder.open()
    folder.add(task.folder, make_files(task))
    make = lambda: (json.loads(make_files(task)["result.json"]), {**RUN})
    parts = lambda record, run: [record, *record.values(), record["result"]["refinements"][0], run]
    said, (whole, _) = {"prompt": "", "seed": 0, "folder": task.folder, "settings": {}, "error": None}, make()
    whole["result"]["refinements"][0] |= {"difference": 1.0, "ssim": 1.0}
    for i, name in [(i, name) for i, part in enumerate(parts(*make())) for name in part]:
        record, run = make()
        parts(record, run)[i][name] = value
        (folder.samples / task.folder / "result.json").write_text(json.dumps(record))
        (folder.path / "run.json").write_text(json.dumps(run))
        samples += [found] if (found := read_sample(folder.samples, task.folder)) else []
        runs += [(found, [], "")] if (found := read_run(folder.path)) else []
    shown = [(said, found) for found in (*samples, whole)]
    assert results_table(shown) and summary(shown) and page(runs)


def edited(path, edit):
    record = json.loads(path.read_text())
    edit(record, record["result"], record["result"]["refinements"][0])
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "forge",
    [
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.rename(path.parent.parent / "r"), path.symlink_to("../r")),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: os.truncate(path, 2**31),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: (path.with_name("srds_final.png").unlink(), path.with_name("srds_final.png").mkdir()),
        lambda path: edited(path, lambda record, result, refinement: refinement.update(seconds=float("nan"))),
        lambda path: edited(path, lambda record, result, refinement: refinement.update(difference=None)),
        lambda path: edited(path, lambda record, result, refinement: refinement.update(k=7)),
        lambda path: edited(path, lambda record, result, refinement: result.update(errors=[])),
        lambda path: edited(path, lambda record, result, refinement: result.update(refinements=[], errors=[])),
        lambda path: edited(path, lambda record, result, refinement: record["made_by"].update(fine_steps=-1)),
        lambda path: edited(path, lambda record, result, refinement: record["made_by"].pop("ground_truth")),
        lambda path: edited(path, lambda record, result, refinement: record["files"].update({"a\0": 1})),
        lambda path: edited(path, lambda record, result, refinement: record["files"].update({"../../run.json": 2})),
    ],
    ids=range(16),
)
def test_what_is_no_whole_record_in_a_regular_file_is_no_sample_and_makes_nobody_wait(forge, tmp_path):
    folder, task = Folder(tmp_path), make_task()
    folder.open()
    folder.add(task.folder, make_files(task))
    folder.write("run.json", b"{}")
    assert folder.has(task)
    forge(folder.samples / task.folder / "result.json")
    assert read_sample(folder.samples, task.folder) is None and not folder.has(task)


def test_a_link_in_the_place_of_a_sample_is_refused(tmp_path):
    folder, task = Folder(tmp_path), make_task()
    folder.open()
    (folder.samples / task.folder).symlink_to(tmp_path)
    with pytest.raises(Failure, match="does not hold the sample of that name; move it elsewhere"):
        folder.has(task)


# What a killed command left


def test_unfinished_folders_are_finished_if_whole_and_removed_after_an_hour(tmp_path):
    folder, task = Folder(tmp_path), make_task()
    folder.open()
    whole, half = (folder.samples / f"{PART}{16 * digit}" for digit in "12")
    folder.add(whole.name, make_files(task))
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("srds_final.png"))
    (half / "notes.txt").write_text("mine")
    (tmp_path / half.name).write_text("half a file")
    before = snapshot(half)
    Folder(tmp_path).open()
    assert folder.has(task) and not whole.exists() and snapshot(half) == before and (tmp_path / half.name).exists()
    age(tmp_path)
    Folder(tmp_path).open()
    assert files(half) == {"notes.txt"} and not (tmp_path / half.name).exists() and folder.has(task)


@given(strategies.text(), strategies.integers(0, 2**64 - 1))
def test_folder_names_are_safe_whatever_the_prompt(text, seed):
    name = make_task(text, seed).folder
    assert re.fullmatch(rf"[a-z0-9][a-z0-9-]*-{seed}-[0-9a-f]{{8}}", name) and len(name) <= 100


def test_folder_names_begin_with_the_prompts_words():
    texts = ("A red sun", "Ünïcode ☃", "夜", "../../etc/passwd\0")
    assert [key.stem(text, 7) for text in texts] == ["a-red-sun-7", "unicode-7", "sample-7", "etc-passwd-7"]
