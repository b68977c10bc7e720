"""Runs of several processes, started by torchrun with gloo on the CPU."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import main
from conftest import PROMPTS, arguments, files, pixels, run_record
from pipelines import pixels as pixel_pipeline
from pipelines import stable_diffusion
from settings import SCHEDULES, Failure, SettingError
from study import processes as study_processes
from study.earlier import Lock
from study.processes import Processes
from study.record import folder_name
from study.run import check_shared

ROOT = Path(main.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port=0"]
UNEVEN = ["-cs", "5", "-fs", "14"]


def start(processes, *argv, launcher=(*TORCHRUN, "--standalone"), count="--nproc_per_node"):
    return popen(*launcher, f"{count}={processes}", "main.py", *argv)


def popen(*command):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(launch):
    """Exit status, lines printed, and the program's own lines on stderr."""
    try:
        out, err = launch.communicate(timeout=120)
    finally:
        launch.terminate()
    return launch.returncode, out.splitlines(), [line for line in err.splitlines() if line.startswith("main.py:")]


def flat(value):
    """The numbers and texts in nested lists and dictionaries, in order, but for seconds."""
    if isinstance(value, dict):
        value = [value[key] for key in value if key not in ("seconds", "psnr")]
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list) else [value]


def assert_equal_runs(one, other):
    """The same files; in them the same text, and numbers and pixels up to the rounding of another batch shape."""
    assert files(one) == files(other)
    for name in map(Path, files(one)):
        if name.name == "results.csv":
            continue
        if name.suffix == ".csv":
            tables = [pd.read_csv(run / name, index_col=0) for run in (one, other)]
            pd.testing.assert_frame_equal(*tables, atol=1e-4, rtol=1e-3, check_dtype=False)
        elif name.suffix == ".png" and name.stem.startswith("srds") and name.stem != "srds_filmstrip":
            assert abs(pixels(one / name) - pixels(other / name)).max() <= 1, name
    results = (run_record(run)["prompts"] for run in (one, other))
    for a, b in zip(*map(flat, results), strict=True):
        assert a == (pytest.approx(b, abs=0.01) if isinstance(b, float) else b)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """What one process leaves, by schedule."""
    folder = tmp_path_factory.mktemp("alone")
    for schedule in SCHEDULES:
        assert main.main(arguments(folder / schedule, tiny, *UNEVEN, "--schedule", schedule)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel, processes, schedule", [("lanes", 3, "sweep"), ("prompts", 2, "pipelined")])
def test_a_run_of_several_processes_equals_that_of_one(parallel, processes, schedule, alone, tiny, tmp_path):
    """Five lanes and four prompts divide evenly among neither; only the first process prints."""
    argv = arguments(tmp_path / "out", tiny, *UNEVEN, "--schedule", schedule, "--parallel", parallel)
    status, printed, errors = finish(start(processes, *argv))
    assert (status, errors) == (0, [])
    assert_equal_runs(alone / schedule, tmp_path / "out")
    announced = [line for line in printed if line.startswith("prompt ")]
    assert len(set(announced)) == len(announced) and sum(line.startswith("prompt  ") for line in printed) == 1
    assert run_record(tmp_path / "out")["environment"]["processes"] == processes


@pytest.mark.slow
def test_collocation_of_several_processes_equals_that_of_one(tiny, tmp_path):
    more = ["-fs", "14", "--method", "collocation", "--nodes", "5", "--tolerance", "0"]
    assert main.main(arguments(tmp_path / "alone", tiny, *more)) == 0
    argv = arguments(tmp_path / "out", tiny, *more, "--parallel", "lanes")
    assert finish(start(3, *argv))[::2] == (0, [])
    assert_equal_runs(tmp_path / "alone", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.long
def test_processes_that_share_lanes_start_from_the_same(tiny, tmp_path):
    more = ["--no-ground-truth", "--start-from"]
    for prompts, folder in ((PROMPTS, "earlier"), (PROMPTS[::-1], "other")):
        assert main.main(arguments(tmp_path / folder, tiny, "--keep-trajectories", prompts=prompts)) == 0
    assert main.main(arguments(tmp_path / "alone", tiny, *more, str(tmp_path / "earlier"))) == 0
    argv = arguments(tmp_path / "out", tiny, "--parallel", "lanes", *more)
    assert finish(start(2, *argv, str(tmp_path / "earlier")))[::2] == (0, [])
    assert_equal_runs(tmp_path / "alone", tmp_path / "out")
    for rank, folder in enumerate(("earlier", "other")):  # as of a folder that is another on each machine
        (tmp_path / f"start{rank}").symlink_to(folder)
    each = f"{shlex.join([sys.executable, 'main.py', *argv])} {tmp_path}/start$RANK"
    launch = popen(*TORCHRUN, "--standalone", "--nproc_per_node=2", "--no-python", "bash", "-c", each)
    status, _, errors = finish(launch)
    assert status != 0 and len(errors) == 1 and "--start-from" in errors[0] and "than the first process" in errors[0]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_of_two_machines_equals_that_of_one_process(alone, tiny, tmp_path):
    """Started by accelerate on each, here both this one."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    machines = ["--num_machines=2", "--main_process_ip=localhost", f"--main_process_port={port}"]
    argv = arguments(tmp_path / "out", tiny, *UNEVEN, "--parallel", "lanes")
    launches = [
        start(2, *argv, launcher=[*ACCELERATE, *machines, f"--machine_rank={rank}"], count="--num_processes")
        for rank in (0, 1)
    ]
    assert [finish(launch)[::2] for launch in launches] == [(0, []), (0, [])]
    assert_equal_runs(alone / "pipelined", tmp_path / "out")


@pytest.mark.slow
def test_accelerate_that_starts_one_process_instead_of_several_is_refused(tiny, tmp_path):
    """Without --multi_gpu it knows no several processes where there are no several GPUs."""
    launcher = [argument for argument in ACCELERATE if argument != "--multi_gpu"]
    argv = arguments(tmp_path / "out", tiny, *UNEVEN)
    status, _, errors = finish(start(2, *argv, launcher=launcher, count="--num_processes"))
    assert status != 0 and len(errors) == 1 and "give it --multi_gpu" in errors[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("lanes, shares", [(1, [1, 0, 0]), (5, [2, 2, 1]), (6, [2, 2, 2]), (10, [4, 4, 2])])
def test_lanes_are_dealt_out_and_put_together_again(lanes, shares, monkeypatch):
    x, n, gathered, calls = torch.randn(lanes, 4, 8, 8), torch.arange(lanes), [], []
    monkeypatch.setattr(torch.distributed, "all_gather_single", lambda outputs, own: gathered.append((outputs, own)))

    def denoise(x, n):
        calls.append(len(x))
        return x * n.reshape(-1, 1, 1, 1)

    for rank in range(3):
        process = Processes()
        process.rank, process.size, process.parallel = rank, 3, "lanes"
        process.split(denoise)(x, n)
    assert calls == [share for share in shares if share]
    together = torch.cat([own for _, own in gathered])
    assert all(outputs.shape == together.shape for outputs, _ in gathered)
    assert torch.equal(together[:lanes], denoise(x, n))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "prompts, more",
    [(PROMPTS[:1], ["-cs", "auto"])],
    ids=["a plan of lanes"],
)
def test_processes_without_work_are_idle_rather_than_wrong(prompts, more, tiny, tmp_path):
    """Three processes for two prompts, or for as many lanes as are planned; most ticks have fewer."""
    argv = arguments(tmp_path / "out", tiny, *UNEVEN, *more, "--tolerance", "0", prompts=prompts)
    assert finish(start(3, *argv))[::2] == (0, [])
    found = run_record(tmp_path / "out")["prompts"]
    assert len(found) == len(prompts)
    assert all(result["stop_reason"] == "exact" and result["image_error"] < 0.01 for result in found)


@pytest.mark.slow
def test_lanes_of_one_batch_shape_equal_sequential_sampling_to_the_bit(tmp_path):
    """Two lanes for three processes, one of which never has any; of samples that differ in their noise."""
    pixel_pipeline().save_pretrained(tmp_path / "model")
    more = ["--parallel", "lanes", "--solver", "ddpm", "-cs", "2", "--fixed-batch", "--tolerance", "0"]
    argv = arguments(tmp_path / "out", tmp_path / "model", *UNEVEN, *more, prompts=["one", "two"])
    assert finish(start(3, *argv))[::2] == (0, [])
    assert [result["image_error"] for result in run_record(tmp_path / "out")["prompts"]] == [0, 0]
    for table in (tmp_path / "out").glob("*/trajectory_errors_table.csv"):
        assert (pd.read_csv(table, index_col=0).to_numpy()[-1] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("rank, parallel", [(0, "prompts"), (1, "lanes")])
def test_a_killed_process_ends_the_run_and_the_others_work_is_kept(rank, parallel, alone, tiny, tmp_path):
    """Within a minute, with one line; and one process alone can go on."""
    out = tmp_path / "out"
    launch = start(2, *arguments(out, tiny, *UNEVEN, "--parallel", parallel))
    limit = time.monotonic() + 60
    while not list(out.glob("*/result.json")):
        assert launch.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    workers = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    os.kill(int(workers[rank]), signal.SIGKILL)
    since = time.monotonic()
    status, _, errors = finish(launch)
    assert status != 0 and time.monotonic() - since < 60
    assert len(errors) == 1 and "another process of the run has died" in errors[0]
    assert main.main(arguments(out, tiny, *UNEVEN, "--resume")) == 0
    assert_equal_runs(alone / "pipelined", out)


@pytest.mark.slow
def test_several_processes_set_an_earlier_study_aside_once(alone, tiny, tmp_path):
    out = tmp_path / "out"
    assert main.main(arguments(out, tiny, *UNEVEN, "--seed", "7", prompts=PROMPTS[:3])) == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    status, printed, errors = finish(start(2, *arguments(out, tiny, *UNEVEN, "--parallel", "prompts")))
    assert (status, errors) == (0, [])
    (aside,) = (out / "earlier").iterdir()
    assert {name: (aside / name).read_bytes() for name in files(aside)} == before
    shutil.rmtree(out / "earlier")
    assert_equal_runs(alone / "pipelined", out)


@pytest.mark.slow
def test_what_fails_on_any_process_is_told_once_by_the_first(tiny, tmp_path):
    launch = start(2, *arguments(tmp_path / "out", tiny, *UNEVEN, "--parallel", "prompts"))
    limit = time.monotonic() + 60
    while not (tmp_path / "out" / "run.json").exists():
        assert launch.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    (tmp_path / "out" / folder_name(1, PROMPTS[1])).write_text("in the way")
    status, _, errors = finish(launch)
    assert status != 0 and len(errors) == 1 and "cannot be written" in errors[0]


@pytest.mark.slow
def test_a_prompt_that_fails_leaves_the_lanes_of_the_others_be(tiny, tmp_path):
    """Of a model that knows no z, as numbers: the prompt's run ends for all processes, and the next begins."""
    broken = stable_diffusion()
    z = broken.tokenizer.convert_tokens_to_ids("z")
    with torch.no_grad():
        broken.text_encoder.get_input_embeddings().weight[z] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    more, prompts = ["--parallel", "lanes", "--no-ground-truth"], ["sun", "a zoo", "moon"]
    argv = arguments(tmp_path / "out", tmp_path / "broken", *UNEVEN, *more, prompts=prompts)
    status, printed, errors = finish(start(2, *argv))
    assert status != 0 and len(errors) == 1 and "1 of 3 prompts failed" in errors[0] and "not finite" in errors[0]
    assert [line.endswith("failed") for line in printed[-5:-2]] == [False, True, False]
    assert ["error" in result for result in run_record(tmp_path / "out")["prompts"]] == [False, True, False]


@pytest.mark.slow
@pytest.mark.long
def test_processes_started_with_other_prompts_or_settings_are_refused(tiny, tmp_path):
    """As on several machines, each with its own copy of a file."""
    shell = " ".join(
        [sys.executable, "main.py", *arguments(tmp_path / "out", tiny, *UNEVEN, prompts=["sun"]), "--seed", "$RANK"]
    )
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--no-python", "sh", "-c", f"exec {shell}"]
    status, _, errors = finish(popen(*command))
    assert status != 0 and len(errors) == 1 and re.search("process 1 .* has other prompts or settings", errors[0])
    assert not (tmp_path / "out").exists()


def test_what_fails_between_a_call_and_its_first_tick_ends_the_run(monkeypatch):
    """Or the others would wait in that tick for a process that has gone on to the next prompt."""
    process = launched(monkeypatch, 0, 2, 0)
    process.parallel = "lanes"
    monkeypatch.setattr(process, "wait", lambda: None)
    process.call(["a", 1])
    assert process.broken
    iterates = process.in_step(iter([1, 2]))
    assert next(iterates) == 1 and not process.broken
    assert list(iterates) == [2] and not process.broken


def test_an_output_directory_that_machines_do_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("study.run.wait_until", lambda seen: seen())
    lock = Lock(tmp_path / "out", "a" * 16)
    check_shared(tmp_path / "out", "a" * 16)
    for folder, run in (("out", "b"), ("other", "a")):
        with pytest.raises(Failure, match="is not one directory for all machines") as raised:
            check_shared(tmp_path / folder, run * 16)
        assert raised.value.status == 2
    lock.release()


def launched(monkeypatch, rank, size, local_rank):
    """A process of a launch, without the others."""
    process = Processes()
    process.rank, process.size, process.local_rank = rank, size, local_rank
    monkeypatch.setattr(process, "broadcast", lambda value: value)
    return process


@pytest.mark.parametrize(
    "device, local_rank, words",
    [
        ("cuda:1", 0, "is one device for several processes"),
        ("mps", 0, "is one device"),
        ("cuda", 2, "launch one a GPU"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(device, local_rank, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launched(monkeypatch, 1, 3, 1).own_device(torch.device("cuda")) == torch.device("cuda:1")
    with pytest.raises(SettingError, match=words):
        launched(monkeypatch, 1, 3, local_rank).own_device(torch.device(device))


def test_a_process_alone_shares_nothing():
    process, denoise = Processes(), lambda x, n: x
    process.join(cpu=True, parallel="lanes")
    assert process.sharing == 1 and process.split(denoise) is denoise and process.broadcast("x") == "x"
    assert list(process.in_step(iter([1, 2]))) == [1, 2] and list(process.take(["a", "b"])) == ["a", "b"]
    assert process.own_device(torch.device("cpu")) == torch.device("cpu")


def test_waiting_ends_when_it_is_over(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(study_processes, "time", clock)
    assert study_processes.wait_until(lambda: now[0] > 3) and not study_processes.wait_until(lambda: False, 10)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["prompts", pytest.param("lanes", marks=pytest.mark.long)])
def test_a_sweep_of_several_processes_equals_that_of_one(parallel, tiny, tmp_path):
    texts = ["--prompt", "a moon", "--prompt", "a sun"]
    argv = ["--model", str(tiny), "--device", "cpu", "--no-report", "-fs", "6", "--sweep", "cs=2,3", *texts]
    assert main.main(["-o", str(tmp_path / "one"), *argv]) == 0
    status, lines, errors = finish(start(2, "-o", str(tmp_path / "two"), *argv, "--parallel", parallel))
    assert status == 0 and not errors and "4 to sample" in "".join(lines)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
