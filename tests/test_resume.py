"""Runs that never lose work: failures, kills and --resume."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import main
import sampler as door
from conftest import PROMPTS, arguments, contents, files, run_record
from models.families import StableDiffusion
from pipelines import stable_diffusion
from sampler import Sampler
from study import fingerprint
from study.earlier import LOCK, Lock
from study.record import Record

ROOT = Path(main.__file__).parent
SHORT = ["--max-iterations", "1", "--no-ground-truth"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    assert main.main(arguments(folder, tiny, "--no-ground-truth")) == 0
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_killed_run_resumes_to_what_an_uninterrupted_one_leaves(seed, tiny, tmp_path):
    """Killed at a random moment after the first to the third prompt, in whatever it does then."""
    out, chance = tmp_path / "out", random.Random(seed)
    argv = [sys.executable, "main.py", *arguments(out, tiny)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough, limit = chance.randrange(1, 4), time.monotonic() + 120
    while sum('"complete": true' in path.read_text() for path in out.glob("*/result.json")) < enough:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(chance.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main.main(arguments(out, tiny, "--resume")) == 0
    assert main.main(arguments(tmp_path / "whole", tiny)) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_keeps_what_is_complete_and_runs_the_rest(whole, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = arguments(out, tiny, "--no-ground-truth", "--resume")
    assert main.main(argv) == 0, "there is nothing to resume, which is no error"
    folders = [result["folder"] for result in run_record(out)["prompts"]]
    (out / folders[1] / "srds_final.png").unlink()
    cut = out / folders[2] / "result.json"
    cut.write_text(cut.read_text()[:100])
    kept = (out / folders[0] / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main.main(argv) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 prompts are complete" in printed and (out / folders[0] / "result.json").stat().st_mtime_ns == kept
    assert "prompt 2 of 4" in printed and "prompt 3 of 4" in printed and "prompt 1 of 4" not in printed
    assert contents(out) == whole

    monkeypatch.setattr(Sampler, "warm_up", lambda self: pytest.fail("nothing is left to run"))
    assert main.main(argv) == 0
    assert contents(out) == whole


@pytest.mark.parametrize(
    "more, words",
    [
        (["-gs", "3"], "--guidance-scale/-gs: 3.0 differs from the run to resume, which has 7.5"),
        (["--seed", "7"], "--seed/-s: 7 differs from the run to resume, which has 42"),
        (["--seed", "7", "--eta", "0.5", "-gs", "3", "-tol", "1"], "--eta: 0.5 differs"),  # the first of several
        (["--schedule", "sweep"], "--schedule: 'sweep' differs from the run to resume, which has 'pipelined'"),
        (["--dtype", "bfloat16"], "--dtype: 'bfloat16' differs from the run to resume, which has 'float32'"),
    ],
)
def test_settings_that_differ_are_one_line_and_nothing_is_touched(more, words, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main.main(arguments(out, tiny, *SHORT, prompts=PROMPTS[:2])) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    capsys.readouterr()
    assert main.main(arguments(out, tiny, *SHORT, "--resume", *more, prompts=PROMPTS[:2])) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_prompts_may_be_added_and_others_are_told(tiny, tmp_path, capsys):
    out, three = tmp_path / "out", [*PROMPTS[:2], "a hill"]
    assert main.main(arguments(out, tiny, *SHORT, prompts=PROMPTS[:2])) == 0
    before = (out / "001-a-moon" / "result.json").read_bytes()
    assert main.main(arguments(out, tiny, *SHORT, "--resume", prompts=three)) == 0
    assert "2 of 3 prompts are complete" in capsys.readouterr().out
    assert (out / "001-a-moon" / "result.json").read_bytes() == before and len(run_record(out)["prompts"]) == 3
    four = ["a sea", *three[::-1]]
    assert main.main(arguments(out, tiny, *SHORT, "--resume", prompts=four)) == 0, "in any order"
    assert run_record(out)["folders"] == ["003-a-sea", "002-a-hill", "001-a-moon", "000-a-red-sun"]
    assert [result["prompt"] for result in run_record(out)["prompts"]] == four
    assert (out / "001-a-moon" / "result.json").read_bytes() == before
    capsys.readouterr()
    assert main.main(arguments(out, tiny, *SHORT, "--resume", "-gs", "3", prompts=["a bay", *four])) == 2
    assert "--guidance-scale/-gs: 3.0 differs from the run to resume" in capsys.readouterr().err
    assert main.main(arguments(out, tiny, *SHORT, prompts=four)) == 0 and not (out / "earlier").exists(), (
        "the same again"
    )
    capsys.readouterr()
    for prompts in (PROMPTS[:2], [*three, "a sea!"], ["a hill"]):
        assert main.main(arguments(out, tiny, *SHORT, "--resume", prompts=prompts)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--resume: finds other prompts in the earlier run" in error


def test_a_run_of_one_sample_is_not_resumed_as_one_of_several(tiny, tmp_path, capsys):
    assert main.main(arguments(tmp_path, tiny, *SHORT, prompts=PROMPTS[:1])) == 0
    assert main.main(arguments(tmp_path, tiny, *SHORT, "--resume", prompts=PROMPTS[:2])) == 2
    assert "--resume: finds a run of one sample, which has no folder of its own" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["weights", "code", "start"])
def test_results_of_another_model_version_code_or_start_are_not_mixed_in(changed, tmp_path, monkeypatch, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    stable_diffusion().save_pretrained(model)
    start = ["--start-from", str(tmp_path / "start")] if changed == "start" else []
    keep = lambda seed: main.main(
        arguments(
            tmp_path / "start", model, *SHORT, "--keep-trajectories", "--overwrite", "--seed", seed, prompts=["a"]
        )
    )
    assert not start or keep("1") == 0
    argv = arguments(out, model, *SHORT, *start, "--resume", prompts=PROMPTS[:2])
    assert main.main(argv) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    if changed == "weights":
        path = model / "unet" / "diffusion_pytorch_model.safetensors"
        weights = safetensors.torch.load_file(path)
        weights["conv_out.bias"] += 1e-3
        safetensors.torch.save_file(weights, path, {"format": "pt"})
    elif changed == "config":
        path = model / "scheduler" / "scheduler_config.json"
        path.write_text(path.read_text().replace("0.012", "0.013"))
    elif changed == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif changed == "code":
        code = tmp_path / "code"
        code.write_text("another engine")
        monkeypatch.setattr(fingerprint, "CODE", [code])
    else:
        assert keep("2") == 0
    words = {"weights": "model's files", "config": "model's files", "torch": "version of torch (2.99.0)",
             "code": "version of this program", "start": "earlier trajectory"}[changed]  # fmt: skip
    capsys.readouterr()
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and f"--resume: finds another {words}" in error and "than the earlier run had" in error
    )
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_a_model_counts_by_what_is_in_it_not_by_where_it_lies(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main.main(arguments(out, tiny, *SHORT, prompts=PROMPTS[:1])) == 0
    shutil.copytree(tiny, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments(out, "copy", *SHORT, "--resume", prompts=PROMPTS[:1])) == 0
    assert "1 of 1 prompts are complete" in capsys.readouterr().out


def test_a_planned_run_is_resumed_with_its_plan(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = arguments(out, tiny, "-cs", "auto", *SHORT, prompts=PROMPTS[:1])
    assert main.main(argv) == 0
    monkeypatch.setattr(door, "make_plan", lambda *args: pytest.fail("a plan was made again"))
    for _ in range(2):
        assert main.main([*argv, "--resume"]) == 0
        assert run_record(out)["plans"]


@pytest.mark.parametrize("record", ['{"settings": 3}', '{"complete": true}', "[" * 100_000, ""])
@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_record_that_is_none_of_ours_is_refused_in_one_line(name, record, tiny, tmp_path, capsys):
    (tmp_path / name).write_text(record)
    assert main.main(arguments(tmp_path, tiny, "--resume", prompts=["a"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"holds {name}, which no whole record here tells of" in error
    assert (tmp_path / name).read_text() == record and files(tmp_path) == {name}


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_run_without_its_record_is_resumed_by_what_each_set_tells(damage, whole, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    argv = arguments(out, tiny, "--no-ground-truth")
    assert main.main(argv) == 0
    path = out / "run.json"
    path.unlink() if damage == "missing" else path.write_text(path.read_text()[:1000])
    capsys.readouterr()
    assert main.main([*argv, "--resume", "-gs", "3"]) == 2 and "--guidance-scale" in capsys.readouterr().err
    assert main.main([*argv, "--resume"]) == 0
    assert "4 of 4 prompts are complete" in capsys.readouterr().out and contents(out) == whole
    path.unlink()
    assert main.main([*argv, "--seed", "7"]) == 0
    (aside,) = (out / "earlier").iterdir()
    assert files(aside) == whole[0].keys() - {"run.json"}, "set aside as it was"


def test_a_run_that_cannot_begin_leaves_the_earlier_one(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert main.main(arguments(out, tiny, *SHORT, prompts=PROMPTS[:2])) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}

    def fail(*args, **conditions):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StableDiffusion, "predict", fail)
    assert main.main(arguments(out, tiny, *SHORT, "--seed", "7", prompts=PROMPTS[:2])) == 1
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_a_study_that_was_set_aside_can_be_resumed(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    for seed in ("1", "2"):
        assert main.main(arguments(out, tiny, "--seed", seed, *SHORT, prompts=PROMPTS[:2])) == 0
    assert "had seed 1, not 2, and is now in" in capsys.readouterr().out
    (aside,) = (out / "earlier").iterdir()
    (aside / "001-a-moon" / "srds_final.png").write_bytes(b"")
    assert main.main(arguments(aside, tiny, "--seed", "1", *SHORT, "--resume", prompts=PROMPTS[:2])) == 0
    assert "1 of 2 prompts are complete" in capsys.readouterr().out
    assert {result["seed"] for result in run_record(aside)["prompts"]} == {1} and run_record(out)["prompts"][0][
        "seed"
    ] == 2


def test_a_second_run_into_a_directory_is_refused(tiny, tmp_path, capsys):
    lock = Lock(tmp_path / "out", "a" * 16)
    assert main.main(arguments(tmp_path / "out", tiny, *SHORT, prompts=PROMPTS[:1])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is being written by another run" in error
    lock.release()
    assert main.main(arguments(tmp_path / "out", tiny, *SHORT, prompts=PROMPTS[:1])) == 0
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_run_that_fails_on_all_prompts_leaves_the_earlier_study(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main.main(arguments(out, tiny, *SHORT, prompts=PROMPTS[:2])) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    broken = stable_diffusion()
    with torch.no_grad():
        broken.unet.conv_out.bias[:] = torch.nan
    broken.save_pretrained(tmp_path / "model")
    assert main.main(arguments(out, tmp_path / "model", *SHORT, prompts=PROMPTS[:2])) == 1
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_a_run_may_be_resumed_with_what_its_failure_asks_for_but_not_in_other_numbers(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    argv = arguments(out, tiny, *SHORT, prompts=PROMPTS[:1])
    assert main.main(argv) == 0
    assert main.main([*argv, "--resume", "--max-batch", "2", "--dtype", "float32"]) == 0
    assert main.main([*argv, "--resume", "--dtype", "bfloat16"]) == 2
    assert "--dtype: 'bfloat16' differs from the run to resume, which has 'float32'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), None])
def test_a_prompt_that_fails_does_not_end_the_run_and_is_run_again(error, whole, tiny, tmp_path, monkeypatch, capsys):
    """Out of memory, or numbers that are not finite."""
    out, encode, predict, failing = tmp_path / "out", StableDiffusion.encode, StableDiffusion.predict, []

    def watch(self, pipeline, prompt, *rest):
        failing[:] = [prompt == PROMPTS[1]]
        return encode(self, pipeline, prompt, *rest)

    def fail(self, pipeline, x, t, **conditions):
        if failing[0] and error:
            raise error
        return predict(self, pipeline, x, t, **conditions) * (float("nan") if failing[0] else 1)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode", watch)
        patch.setattr(StableDiffusion, "predict", fail)
        assert main.main(arguments(out, tiny, "--no-ground-truth")) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "1 of 4 prompts failed" in captured.err
    table = captured.out.splitlines()[-6:-2]  # above the means
    assert [line.endswith("failed") for line in table] == [False, True, False, False]
    words = "out of memory" if error else "not finite"
    assert [words in result.get("error", "") for result in run_record(out)["prompts"]] == [False, True, False, False]
    assert main.main(arguments(out, tiny, "--no-ground-truth", "--resume")) == 0
    assert contents(out) == whole


def test_an_output_directory_removed_in_mid_run_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    out, add = tmp_path / "out", Record.add

    def remove(self, i, *rest):
        said = add(self, i, *rest)
        if i == 1:
            shutil.rmtree(out)
        return said

    monkeypatch.setattr(Record, "add", remove)
    assert main.main(arguments(out, tiny, "--no-ground-truth")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be written" in error and not out.exists()
