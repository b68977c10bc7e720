"""The record of a run, and the pictures in it."""

import errno
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies
from PIL import Image

import utils
from conftest import files, run_record
from settings import Failure, SettingError
from study import earlier
from study.comparison import compare
from study.directory import WriteError, pack, read, write
from study.earlier import LOCK, Lock
from study.record import Record, folder_name, folder_names

ABOUT = {
    "begun": "2026-01-02T03:04:05", "model": {"name": "tiny"}, "environment": {"device": "cpu", "dtype": "float32"},
    "settings": {"method": "srds", "solver": "ddim", "fine_steps": 8, "coarse_steps": 2, "guidance_scale": 1.0,
                 "tolerance": 0.1, "stop_rule": "final", "width": 16, "height": 16, "negative_prompt": "",
                 "sweep": {}},
}  # fmt: skip
NAMES = ("srds_initialized", "srds_final", "srds_ddim_gt", "srds_ddim_course")


def entry(iteration, error, **more):
    counts = {"serial_evaluations": 4 + 2 * iteration, "total_evaluations": 9, "seconds": 0.5 + iteration}
    return {"iteration": iteration, **counts, "image_error": error, **more}


def add(record, i, grey=0, errors=(2.0, 0.5), truth=True):
    """Write the set of prompt i: one image of a grey a stage, and the errors of its refinements."""
    images = {name: np.full((16, 16, 3), grey, np.uint8) for name in (NAMES if truth else NAMES[:2])}
    images |= {f"srds_iteration_{k}": images["srds_final"] for k in range(len(errors) - 1)}
    iterations = [entry(k - 1, error if truth else None) for k, error in enumerate(errors)]
    seconds = {"srds": 1.0, "ground_truth": 2.0 if truth else None}
    result = {"prompt": record.made_by[i]["text"], "seed": 0, "seconds": seconds, "iterations": iterations}
    return record.add(i, result, images, [[error, error / 2] for error in errors] if truth else None)


def make(folder, texts, seed=0, **how):
    """A record whose results depend on a seed, of a directory that is there."""
    folder.mkdir(exist_ok=True)
    about = {"run": f"{len(list(folder.rglob('*'))):016x}", **ABOUT}
    made = [{"seed": seed, "text": text} for text in texts]
    folders, earlier, difference, _ = compare(folder, folder_names(texts), made, resume=False)
    return Record(folder, about, folders, made, earlier, difference, **how)


def test_a_set_is_complete_once_all_its_files_are_there_and_as_they_were(tmp_path):
    record, out = make(tmp_path / "out", ["a"]), tmp_path / "out"
    record.begin()
    assert record.entry(0) is None and record.results() == []
    add(record, 0)
    assert record.entry(0)["complete"] and set(record.entry(0)["files"]) == files(out) - {"run.json", "result.json"}
    assert record.finish() == [record.entry(0)["result"]] == run_record(out)["prompts"]
    whole = lambda: compare(out, [""], record.made_by, resume=True)[3] == [0]
    final = out / "srds_final.png"
    data = final.read_bytes()
    for damaged in (b"", data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        final.write_bytes(damaged)
        assert not whole()
    final.write_bytes(data)
    assert whole()
    final.unlink()
    assert not whole() and record.entry(0) is None and record.results() == []


@pytest.mark.parametrize("stopped", ["rendering", "naming"])
def test_a_set_that_is_cut_short_leaves_nothing_that_the_next_run_does_not_know(stopped, tmp_path, monkeypatch):
    record, out = make(tmp_path / "out", ["a", "b"]), tmp_path / "out"
    record.begin()

    def stop(*args):
        if stopped == "rendering" or str(args[1]).endswith("srds_final.png"):
            raise KeyboardInterrupt
        return replace(*args)

    replace = os.replace
    monkeypatch.setattr(*((utils, "error_plot") if stopped == "rendering" else (os, "replace")), stop)
    with pytest.raises(KeyboardInterrupt):
        add(record, 1)
    monkeypatch.undo()
    if stopped == "rendering":
        assert files(out) == {"run.json"}
    assert compare(out, record.folders, record.made_by, resume=True)[2:] == (None, [])
    other = make(out, ["c"], overwrite=True)
    add(other, 0)
    assert files(out) == {"run.json", "result.json", *other.entry(0)["files"]}


def study(out, seed=0):
    """A run of two prompts in a directory, with notes of somebody's; returns those and the run's files."""
    record = make(out, ["a sea", "a moon"], seed)
    record.begin()
    for i in range(2):
        add(record, i, grey=seed)
    record.finish()
    notes = {"notes.txt", "000-a-sea/notes.txt", "srds.png"}
    for name in notes:
        (out / name).write_text("keep")
    return notes, {name: (out / name).read_bytes() for name in files(out) - notes}


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_run_sets_an_earlier_one_aside_once_it_has_a_set_and_touches_nothing_else(overwrite, tmp_path):
    out = tmp_path / "out"
    notes, before = study(out)
    record = make(out, ["a sea", "a hill"], seed=1, overwrite=overwrite)
    record.fail(0, 1, "out of memory")
    record.save()
    assert {name: (out / name).read_bytes() for name in before} == before, "there is nothing in its place yet"
    said, aside = add(record, 1, grey=9), "earlier/2026-01-02T03-04-05"
    if overwrite:
        assert said is None and not (out / "earlier").exists()
    else:
        assert said == f"the earlier run of {out} had seed 0, not 1, and is now in {out / aside}"
        assert {name: (out / aside / name).read_bytes() for name in before} == before
        made = [{"seed": 0, "text": text} for text in ("a sea", "a moon")]
        assert compare(out / aside, folder_names(["a sea", "a moon"]), made, resume=True)[3] == [0, 1]
    assert not (out / "001-a-moon").exists() and notes < files(out)
    assert record.finish()[1] == record.entry(1)["result"]
    left = {name for name in files(out) if not name.startswith("earlier")} - notes
    assert left == {"run.json", *run_record(out)["files"]}


def test_an_earlier_run_that_cannot_be_moved_stays_whole(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    _, before = study(out)
    record = make(out, ["a hill"])

    def fail(path, target):
        if path.name == "srds_final.png" and "earlier" in str(target):
            raise PermissionError(13, "Permission denied")
        rename(path, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(WriteError, match="srds_final.png of an earlier run, cannot be moved: Permission denied"):
        add(record, 0)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not [name for name in files(out) if ".part" in name or name.startswith("earlier/")]


def test_a_move_that_was_killed_is_finished_by_the_next_run(tmp_path, monkeypatch):
    out, rename, moved = tmp_path / "out", os.rename, []
    _, before = study(out)
    lock, record = Lock(out, "a" * 16), make(out, ["a hill"])

    def kill(*paths):
        moved.append(rename(*paths))
        if len(moved) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", kill)
    with pytest.raises(KeyboardInterrupt):
        add(record, 0)
    monkeypatch.undo()
    os.close(lock.file)  # as the end of a process does, but for the file
    Lock(out, "b" * 16).release()
    (aside,) = (out / "earlier").iterdir()
    assert {name: (aside / name).read_bytes() for name in before} == before
    assert not {name for name in before if (out / name).exists()}


def test_the_same_run_again_replaces_one_set_after_the_other(tmp_path):
    out = tmp_path / "out"
    notes, before = study(out)
    record = make(out, ["a sea", "a moon"])
    record.save()
    assert {name: (out / name).read_bytes() for name in before} == before
    assert add(record, 0, grey=5, errors=(2.0,)) is None
    assert files(out) - notes == before.keys() - {"000-a-sea/srds_iteration_0.png"}, (
        "no stale file stands beside new ones"
    )
    assert (out / "001-a-moon/srds_final.png").read_bytes() == before["001-a-moon/srds_final.png"]


def test_a_failed_prompt_is_noted_and_is_not_complete(tmp_path):
    record = make(tmp_path, ["a", "b"])
    record.begin()
    record.fail(1, 7, "out of memory")
    assert record.results() == [{"prompt": "b", "seed": 7, "error": "out of memory", "folder": "001-b"}]
    assert record.entry(1) is None


def test_a_finished_prompt_whose_folder_vanishes_has_failed(tmp_path):
    record = make(tmp_path, ["a", "b"])
    record.begin()
    for i in range(2):
        add(record, i)
    shutil.rmtree(tmp_path / "001-b")
    assert record.finish()[1] == {"prompt": "b", "seed": 0, "error": "its files are gone", "folder": "001-b"}
    assert run_record(tmp_path)["prompts"][1]["error"] == "its files are gone"


def test_what_is_not_ours_is_in_the_way_and_is_told(tmp_path):
    refused = lambda words: pytest.raises(SettingError, match=words)
    (tmp_path / "srds_final.png").write_text("mine")
    with refused("holds srds_final.png, which no whole record here tells of; move it elsewhere"):
        make(tmp_path, ["a"])
    (tmp_path / "srds_final.png").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "001-b").symlink_to("elsewhere")
    with refused("has what is no folder of ours at 001-b"):
        make(tmp_path, ["a", "b"])
    record = make(tmp_path, ["a"])
    (tmp_path / "srds_final.png").write_text("mine, and late")
    with pytest.raises(WriteError, match="srds_final.png cannot be written: it is there, and is not of this run"):
        add(record, 0)
    assert (tmp_path / "srds_final.png").read_text() == "mine, and late"


def test_nothing_is_written_through_a_link(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "out.json"
    victim.write_text("keep")
    (tmp_path / f".out.json.{'a' * 16}.part").symlink_to(victim)
    with pytest.raises(WriteError):
        write(path, b"x", "a" * 16)
    path.symlink_to(victim)
    write(path, b"x", "b" * 16)
    assert victim.read_text() == "keep" and path.read_bytes() == b"x" and not path.is_symlink()


def test_one_run_at_a_time(tmp_path):
    out = tmp_path / "new" / "out"
    lock = Lock(out, "a" * 16)
    with pytest.raises(SettingError, match="is being written by another run; wait until that ends"):
        Lock(out, "b" * 16)
    lock.release()
    assert not (tmp_path / "new").exists(), "what was made for nothing is removed"
    out.mkdir(parents=True)
    parts = [out / f".srds_final.png.{run * 16}.part" for run in "ac"]
    (out / LOCK).write_text("a" * 16)  # of a run that was killed
    for part in parts:
        part.write_text("half")
    Lock(out, "b" * 16).release()
    assert [part.exists() for part in parts] == [False, True] and not (out / LOCK).exists()


@pytest.mark.parametrize("there", ["link", "pipe", "text"])
def test_a_lock_that_is_none_is_refused(there, tmp_path):
    path = tmp_path / LOCK
    {
        "link": lambda: path.symlink_to("victim"),
        "pipe": lambda: os.mkfifo(path),
        "text": lambda: path.write_text("mine"),
    }[there]()
    with pytest.raises(SettingError, match=f"has a {LOCK} that is"):
        Lock(tmp_path, "a" * 16)
    assert os.path.lexists(path) and not (tmp_path / "victim").exists()


def test_a_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(earlier.fcntl, "flock", fail)
    Lock(tmp_path / "out", "a" * 16).release()
    assert "cannot be locked (No locks available); this run cannot know whether another" in capsys.readouterr().err


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda values: strategies.lists(values) | strategies.dictionaries(strategies.text(), values),
)


@given(JSON, strategies.binary(max_size=200))
def test_a_record_is_read_as_it_was_packed_and_nothing_else_is_one(tmp_path_factory, value, data):
    path = tmp_path_factory.getbasetemp() / "record.json"
    for found in (
        json.dumps(value).encode(),
        data,
        b"[" * 100_000,
        b'{"complete": true}',
        json.dumps({"checksum": value}).encode(),
    ):
        path.write_bytes(found)
        assert read(path) == {}
    path.write_bytes(pack({"value": value}))
    assert json.dumps(read(path)) == json.dumps({"value": value})


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
    assert folder_name(3, prompt) == name


def test_overviews_of_many_prompts_stay_readable(tmp_path):
    """70 of them: the pictures show the first 64, the filmstrip 16; the results have all."""
    record = make(tmp_path / "out", [f"prompt {i}" for i in range(70)])
    record.begin()
    for i in range(70):
        add(record, i, grey=i, errors=(1.0,), truth=False)
    assert len(record.finish()) == 70
    final = np.asarray(Image.open(tmp_path / "out" / "srds_final.png"))
    side = 8 * 16 + 7 * utils.GAP
    assert final.shape == (side, side, 3) and final[-1, -1, 0] == 63
    assert Image.open(tmp_path / "out" / "srds_filmstrip.png").height < 16 * 300


def test_an_overview_keeps_the_last_state_of_a_prompt_that_stopped_earlier(tmp_path):
    record = make(tmp_path, ["a", "b"])
    record.begin()
    add(record, 0, grey=10, errors=(3.0, 3.0))
    add(record, 1, grey=20, errors=(4.0, 4.0, 0.0))
    record.finish()
    last = np.asarray(Image.open(tmp_path / "srds_iteration_1.png"))
    assert last[0, 0, 0] == 10 and last[0, -1, 0] == 20
    table = pd.read_csv(tmp_path / "trajectory_errors_table.csv", index_col=0)
    assert table.values.tolist() == [[5.0, 2.5], [3.0, 1.5]]


def test_a_table_keeps_tiny_errors_apart_from_zero():
    table = utils.error_table(np.array([[1.0, 2.0], [0.0, 1.23456789e-30]]))
    assert table == ",Timestep_0,Timestep_1\nIteration_0,0,1.23456789e-30\n"


def test_a_filmstrip_has_a_column_for_each_image(tmp_path):
    record = make(tmp_path, ["a moon"])
    record.begin()
    add(record, 0, grey=100, errors=(3.0, 1.0, 0.2, 0.0))
    strip = Image.open(tmp_path / "srds_filmstrip.png")
    assert strip.width == 8 + 5 * (utils.CELL + 8)  # initialised, three iterations, the last final, ground truth
    assert (np.asarray(strip) < 255).any(axis=(0, 2)).mean() > 0.8


def test_a_plot_shows_every_point_and_exact_zeros_apart(monkeypatch):
    figures, draw = [], utils.Figure.savefig
    keep = lambda self, *rest, **more: (figures.append(self), draw(self, *rest, **more))
    monkeypatch.setattr(utils.Figure, "savefig", keep)
    errors = np.array([[3.0, 4.0, 5.0], [0.0, 1.0, 2.0], [0.0, 0.0, 1e-4], [0.0, 0.0, 0.0]])
    results = [{"iterations": [entry(k - 1, error) for k, error in enumerate((3.0, 1.0, 0.2, 0.0))]}]
    results[0]["iterations"][-1]["serial_evaluations"] = 12  # more than N, as sweep may take
    results.append({"iterations": results[0]["iterations"][:1]})
    utils.error_plot(errors, results, 8)
    left, right = figures[0].axes
    names = ["initialised", *(f"iteration {i}" for i in range(3))]
    assert [text.get_text() for text in left.get_legend().texts] == names
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == ["exactly 0"]
        lines = [line for line in axes.lines if line.get_marker() != "None" and len(line.get_ydata())]
        assert min(line.get_ydata().min() for line in lines) == axes.texts[0].xy[1] > axes.get_ylim()[0]
    assert right.get_xlim()[1] > 12
    first = results[0]["iterations"][0]["serial_evaluations"]
    names = [text.get_text() for text in right.get_legend().texts]
    assert names == ["a prompt's refinements", "mean of 2 prompts", "sequential: N = 8"]
    ends = [line.get_xydata()[-1, 0] for line in right.lines if line.get_label() == "mean of 2 prompts"]
    assert ends == [(12 + first) / 2], "evaluations and differences are means over the same prompts"


def test_results_are_a_row_for_each_refinement_or_failure(tmp_path):
    record = make(tmp_path, ["a", "b", "c"], seed=7)
    record.begin()
    add(record, 0, errors=(3.0, 1.0, 0.5))
    add(record, 2, errors=(4.0, 0.0))
    record.fail(1, 7, "out of memory")
    record.finish()
    table = pd.read_csv(tmp_path / "results.csv")
    assert table.prompt.tolist() == ["a", "a", "a", "b", "c", "c"] and set(table.method) == {"srds"}
    assert table.image_error.fillna(-1).tolist() == [3, 1, 0.5, -1, 4, 0] and table.error[3] == "out of memory"
    assert table.folder[0] == "000-a" and set(run_record(tmp_path)["overview"]) >= {"results.csv", "srds_final.png"}


def snapshot(out):
    return {name: (out / name).read_bytes() for name in files(out)}


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_moved_or_removed_through_a_folder_that_is_a_link(overwrite, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    study(out)
    shutil.copytree(out / "000-a-sea", victim)
    shutil.rmtree(out / "000-a-sea")
    (out / "000-a-sea").symlink_to(victim)
    before = snapshot(victim)
    with pytest.raises(SettingError, match="has what is no folder of ours at 000-a-sea"):
        make(out, ["a hill"], overwrite=overwrite)
    assert snapshot(victim) == before


def test_a_study_is_known_by_its_run_json_where_a_sets_record_is_cut(tmp_path):
    """Another run neither replaces it nor is mixed with it."""
    out = tmp_path / "out"
    study(out)
    for name in ("000-a-sea", "001-a-moon"):
        os.truncate(out / name / "result.json", 50)
    made = [{"seed": 1, "text": text} for text in ("a sea", "a moon")]
    with pytest.raises(SettingError, match="seed: 1 differs from the run to resume, which has 0"):
        compare(out, folder_names(["a sea", "a moon"]), made, resume=True)
    made = [{"seed": 0, "text": text} for text in ("a sea", "a hill")]
    with pytest.raises(SettingError, match="finds other prompts"):
        compare(out, folder_names(["a sea", "a hill"]), made, resume=True)
    before = {name: data for name, data in snapshot(out).items() if name not in ("notes.txt", "000-a-sea/notes.txt")}
    record = make(out, ["a hill", "b"])
    for i in range(2):
        add(record, i)
    record.finish()
    (aside,) = (out / "earlier").iterdir()
    assert {name: (aside / name).read_bytes() for name in files(aside)} == {
        name: data for name, data in before.items() if name != "srds.png"
    }
    assert {path.name for path in out.glob("0*")} == {"000-a-sea", "000-a-hill", "001-b"}, "with the notes in the first"


def test_a_single_prompts_study_is_known_by_its_run_json(tmp_path):
    out = tmp_path / "out"
    record = make(out, ["a"])
    record.begin()
    add(record, 0)
    record.finish()
    os.truncate(out / "result.json", 50)
    with pytest.raises(SettingError, match="seed: 1 differs"):
        compare(out, [""], [{"seed": 1, "text": "a"}], resume=True)
    other = make(out, ["a"], seed=1)
    assert "had seed 0, not 1" in add(other, 0)


def test_an_overview_without_its_sets_is_set_aside(tmp_path):
    out = tmp_path / "out"
    study(out)
    for name in ("000-a-sea", "001-a-moon"):
        shutil.rmtree(out / name)
    record = make(out, ["a hill"])
    add(record, 0)
    record.finish()
    assert set(run_record(out)["overview"]) == {"results.csv", "report.html"}
    (aside,) = (out / "earlier").iterdir()
    assert "srds_filmstrip.png" in files(aside)


@pytest.mark.parametrize(
    "name, change",
    [
        ("result.json", {"files": {"../../victim/srds_final.png": [1, "x"]}}),
        *(("result.json", {"files": files}) for files in (5, None, [], {"srds_final.png": 5})),
        *(("result.json", {key: value}) for key in ("made_by", "begun", "result") for value in (None, 5, [])),
        ("result.json", {"result": {"folder": "../../victim"}}),
        *(
            ("run.json", {key: value})
            for key in ("files", "overview", "begun", "plans", "made_by")
            for value in (5, [5])
        ),
        ("run.json", {"folders": ["../victim"]}),
        ("run.json", {"made_by": {"common": {}, "each": {"000-a": 5}}}),
    ],
)
def test_a_record_of_another_shape_is_none_of_ours_though_its_checksum_holds(name, change, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    study(out)
    victim.mkdir()
    (victim / "srds_final.png").write_text("keep")
    path = out / name if name == "run.json" else out / "000-a-sea" / name
    path.write_bytes(pack({**read(path), **change}))
    for texts in (["a sea", "a moon"], ["a hill"]):
        try:
            record = make(out, texts, report=False)
            for i in range(len(texts)):
                add(record, i, truth=False)
            record.finish()
        except Failure:
            pass
    assert (victim / "srds_final.png").read_text() == "keep"


@pytest.mark.parametrize("place", ["../victim", "/tmp/victim", 5, ["a"], "earlier/../.."])
def test_what_was_moving_is_moved_nowhere_else(place, tmp_path):
    _, before = study(tmp_path / "out")
    (tmp_path / "out" / LOCK).write_text("a" * 16)
    (tmp_path / "out" / earlier.MOVING).write_bytes(pack({"place": place}))
    Lock(tmp_path / "out", "b" * 16).release()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
