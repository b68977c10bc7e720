"""The record of a run, and the pictures in it."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import utils
from conftest import files, run_record
from study.record import Record, folder_name

NAMES = ("srds_initialized", "srds_final", "srds_ddim_gt", "srds_ddim_course")


def entry(iteration, error, **more):
    counts = {"serial_evaluations": 4 + 2 * iteration, "total_evaluations": 9}
    return {"iteration": iteration, **counts, "image_error": error, **more}


def add(record, i, grey=0, errors=(2.0, 0.5), truth=True):
    """Write the set of prompt i: one image of a grey a stage, and the errors of its refinements."""
    images = {name: np.full((16, 16, 3), grey, np.uint8) for name in (NAMES if truth else NAMES[:2])}
    images |= {f"srds_iteration_{k}": images["srds_final"] for k in range(len(errors) - 1)}
    iterations = [entry(k - 1, error if truth else None) for k, error in enumerate(errors)]
    result = {"prompt": record.texts[i], "seed": 0, "iterations": iterations}
    record.add(i, result, images, [[error, error / 2] for error in errors] if truth else None)


def make(folder, texts, **about):
    return Record(folder, {"begun": "now", "settings": {"fine_steps": 8}, **about}, texts)


def test_a_set_is_complete_once_all_its_files_are_there(tmp_path):
    record = make(tmp_path / "out", ["a"])
    record.begin()
    assert record.entry(0) is None and record.results() == []
    add(record, 0)
    assert record.entry(0)["complete"] and set(record.entry(0)["files"]) == files(tmp_path / "out") - {"run.json"}
    assert record.finish() == [record.entry(0)["result"]] == run_record(tmp_path / "out")["prompts"]
    (tmp_path / "out" / "srds_final.png").unlink()
    assert record.entry(0) is None and record.results() == []


def test_files_are_named_before_they_are_written(tmp_path, monkeypatch):
    """So that a run that is cut short leaves nothing that the next one does not know."""
    record = make(tmp_path / "out", ["a", "b"])
    record.begin()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "error_plot", stop)
    with pytest.raises(KeyboardInterrupt):
        add(record, 1)
    named = json.loads((tmp_path / "out" / "001-b" / "result.json").read_text())
    assert not named["complete"] and files(tmp_path / "out") - {"run.json"} < set(named["files"])
    make(tmp_path / "out", ["c"]).begin()
    assert files(tmp_path / "out") == {"run.json"}


def test_a_run_removes_what_the_earlier_one_wrote_and_nothing_else(tmp_path):
    out, texts = tmp_path / "out", ["a sea", "a moon"]
    record = make(out, texts)
    record.begin()
    for i in range(2):
        add(record, i)
    record.finish()
    mine = {"notes.txt", "000-a-sea/notes.txt", "srds_mine.png"}
    for name in mine:
        (out / name).write_text("keep")
    earlier = run_record(out)
    earlier["files"] += ["../outside.png", "notes.txt", "000-a-sea/notes.txt", "/etc/srds_x.png"]
    (out / "run.json").write_text(json.dumps(earlier))
    (tmp_path / "outside.png").write_text("keep")
    make(out, ["a hill"]).begin()
    assert files(out) == mine | {"run.json"}
    assert (tmp_path / "outside.png").exists() and not (out / "001-a-moon").exists()


def test_a_failed_prompt_is_noted_and_is_not_complete(tmp_path):
    record = make(tmp_path, ["a", "b"])
    record.begin()
    record.fail(1, 7, "out of memory")
    assert record.results() == [{"prompt": "b", "seed": 7, "error": "out of memory", "folder": "001-b"}]
    assert record.entry(1) is None
    make(tmp_path, ["a", "b"]).begin(resume=True)
    assert record.results() == []


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
