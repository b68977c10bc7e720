"""Runs of several processes, started by torchrun and accelerate with gloo on the CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import main
from conftest import PROMPTS, arguments, files, pixels, run_record
from pipelines import stable_diffusion
from settings import SettingError
from study.processes import Processes

ROOT = Path(main.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
UNEVEN = ["-cs", "5", "-fs", "14"]
SEED_OF_RANK = ["sh", "-c", f'exec {sys.executable} main.py "$@" --seed $RANK', "main.py"]


def start(processes, *argv, launcher=TORCHRUN, program=("main.py",)):
    count = "--num_processes" if launcher[:3] == ACCELERATE else "--nproc_per_node"
    command = [*launcher, f"{count}={processes}", *program, *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(launch):
    """Exit status, lines printed, and the program's own lines on stderr."""
    try:
        out, err = launch.communicate(timeout=120)
    finally:
        launch.terminate()
    return launch.returncode, out.splitlines(), [line for line in err.splitlines() if line.startswith("main.py:")]


def assert_equal_runs(one, other):
    """The same files; in them the same text, and numbers and pixels up to the rounding of another batch shape."""
    assert files(one) == files(other) and run_record(one)["samples"] == run_record(other)["samples"]
    for name in map(Path, files(one)):
        if name.suffix == ".csv":
            tables = [pd.read_csv(run / name).filter(regex="^(?!.*seconds|psnr)") for run in (one, other)]
            most = 0.01 if name.name == "results.csv" else 5e-4
            pd.testing.assert_frame_equal(*tables, atol=most, rtol=1e-3, check_dtype=False)
        elif name.suffix == ".png" and name.stem not in ("srds_filmstrip", "trajectory_errors_plot", "sweep"):
            assert abs(pixels(one / name) - pixels(other / name)).max() <= 1, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, more, launcher",
    [
        (2, ["--parallel", "lanes", "--schedule", "sweep"], [*ACCELERATE, "--multi_gpu", "--main_process_port=0"]),
        (2, ["--sweep", "tol=0,100", "--seeds", "5-6"], TORCHRUN),
        (3, ["--parallel", "lanes", "--method", "collocation", "--nodes", "5", "--tolerance", "0"], TORCHRUN),
    ],
)
def test_a_run_of_several_processes_equals_that_of_one(processes, more, launcher, tiny, tmp_path):
    """Five lanes and four prompts divide evenly among neither; only the first process prints.

    Where processes share samples, each makes two side by side.
    """
    prompts = PROMPTS[:1] if "--sweep" in more else PROMPTS
    assert main.main(arguments(tmp_path / "alone", tiny, *UNEVEN, *more, prompts=prompts)) == 0
    argv = arguments(
        tmp_path / "out", tiny, *UNEVEN, *more, "--batch", "2" if "--sweep" in more else "1", prompts=prompts
    )
    status, printed, errors = finish(start(processes, *argv, launcher=launcher))
    assert (status, errors) == (0, [])
    assert_equal_runs(tmp_path / "alone", tmp_path / "out")
    announced = [line for line in printed if line.startswith("sample ")]
    assert ("--sweep" in more or len(set(announced)) == len(announced)) and sum(
        line.startswith("srds, ddim") for line in printed
    ) <= 1
    assert run_record(tmp_path / "out")["environment"]["processes"] == str(processes)


@pytest.mark.slow
@pytest.mark.parametrize("rank, parallel", [(0, "samples"), (1, "lanes")])
def test_a_killed_process_ends_the_run_and_one_process_goes_on_from_there(rank, parallel, tiny, tmp_path):
    out = tmp_path / "out"
    launch = start(2, *arguments(out, tiny, *UNEVEN, "--parallel", parallel))
    limit = time.monotonic() + 60
    while not list(out.glob("samples/[!.]*/result.json")):
        assert launch.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    workers = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    os.kill(int(workers[rank]), signal.SIGKILL)
    since = time.monotonic()
    assert finish(launch)[0] != 0 and time.monotonic() - since < 60
    kept = {path: path.stat().st_mtime_ns for path in out.glob("samples/[!.]*/result.json")}
    assert kept and main.main(arguments(out, tiny, *UNEVEN)) == 0
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    assert main.main(arguments(tmp_path / "alone", tiny, *UNEVEN)) == 0
    for part in out.rglob(".part-*"):  # which stay for an hour, as they could be another command's
        os.rename(part, tmp_path / part.name)
    assert_equal_runs(tmp_path / "alone", out)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["lanes", "samples"])
def test_a_sample_that_fails_is_a_row_with_its_error_and_the_others_are_made(parallel, tiny, tmp_path):
    """Of a model that knows no z, as numbers."""
    broken = stable_diffusion()
    z = broken.tokenizer.convert_tokens_to_ids("z")
    with torch.no_grad():
        broken.text_encoder.get_input_embeddings().weight[z] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    more = [*UNEVEN, "--parallel", parallel, "--no-ground-truth"]
    argv = arguments(tmp_path / "out", tmp_path / "broken", *more, prompts=["sun", "a zoo", "moon"])
    status, printed, errors = finish(start(2, *argv))
    assert status != 0 and len(errors) == 1 and "1 of 3 samples failed" in errors[0] and "not finite" in errors[0]
    assert [bool(said["error"]) for said in run_record(tmp_path / "out")["samples"]] == [False, True, False]
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert table[table.error.notna()].prompt.tolist() == ["a zoo"] and table[table.final].k.notna().sum() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, program, words",
    [
        # As on several machines, each with its own copy of a file.
        ([*TORCHRUN, "--no-python"], SEED_OF_RANK, "process 1 has other prompts, settings"),
    ],
)
def test_processes_that_cannot_share_a_run_are_refused(launcher, program, words, tiny, tmp_path):
    argv = arguments(tmp_path / "out", tiny, *UNEVEN, prompts=["sun"])
    status, _, errors = finish(start(2, *argv, launcher=launcher, program=program))
    assert status != 0 and sum(words in line for line in errors) == 1
    assert not list((tmp_path / "out").glob("samples/*"))


def launched(rank, size, local_rank=0):
    """A process of a launch, without the others."""
    process = Processes()
    process.rank, process.size, process.local_rank, process.parallel = rank, size, local_rank, "lanes"
    return process


@pytest.mark.parametrize("lanes, shares", [(1, [1, 0, 0]), (5, [2, 2, 1]), (6, [2, 2, 2]), (10, [4, 4, 2])])
def test_lanes_are_dealt_out_and_put_together_again(lanes, shares, monkeypatch):
    x, n, gathered, calls = torch.randn(lanes, 4, 8, 8), torch.arange(lanes), [], []
    monkeypatch.setattr(torch.distributed, "all_gather_single", lambda outputs, own: gathered.append((outputs, own)))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, source: None)
    monkeypatch.setattr(Processes, "broadcast", lambda self, value=None: value)
    denoise = lambda x, n: calls.append(len(x)) or x * n.reshape(-1, 1, 1, 1)
    for rank in range(3):
        launched(rank, 3).split(denoise)(x, n)
    assert calls == [share for share in shares if share]
    together = torch.cat([own for _, own in gathered])
    assert all(outputs.shape == together.shape for outputs, _ in gathered)
    assert torch.equal(together[:lanes], denoise(x, n))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, local_rank in (("cuda:1", 0), ("mps", 0), ("cuda", 2)):
        with pytest.raises(SettingError, match="is not a device for each process"):
            launched(1, 3, local_rank).join(torch.device(device), "lanes")


def test_processes_that_share_lanes_make_one_sample_at_a_time(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Processes, "sharing", 2)
    assert main.main(arguments(tmp_path / "out", tiny, "--batch", "2")) == 2
    words = "argument --batch: 2 is not for lanes that are shared; give --parallel samples"
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_those_that_serve_are_told_of_an_end_but_not_of_an_error_in_a_call_that_they_wait_in(monkeypatch):
    told = []
    monkeypatch.setattr(Processes, "broadcast", lambda self, value=None: told.append(value))

    def iterates(error=None):
        yield 0
        if error:
            raise error
        yield 1

    ended, left, failed = (launched(0, 2).served(iterates(error)) for error in (None, None, RuntimeError("memory")))
    assert [*ended] == [0, 1] and told == [[]]
    next(left)
    left.close()
    assert told == [[], []]
    with pytest.raises(RuntimeError, match="memory"):
        list(failed)
    assert told == [[], []]
