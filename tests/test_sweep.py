"""Sweeps: several settings in one command."""

from collections import Counter
from unittest.mock import Mock

import pandas as pd
import pytest
from transformers import CLIPTextModel

import main
from conftest import pixels, run_record, sample_folders, sample_records
from sampler import Sampler
from study import bench

PROMPTS = ["a moon", "a sun"]
SHORT = ["-fs", "6", "--max-iterations", "2"]


def run(out, model, *more, prompts=PROMPTS):
    """The exit status of a command in which no setting but the guidance is given."""
    texts = [word for text in prompts for word in ("--prompt", text)]
    fixed = ["-o", str(out), "--model", str(model), "--device", "cpu", "-gs", "2", "--no-report"]
    return main.main([*fixed, *texts, *more])


@pytest.mark.slow
def test_a_sweep_shares_what_its_settings_share_and_changes_no_result(tiny, tmp_path, monkeypatch, capsys):
    spies = []
    for owner, name in ((bench, "load_pipeline"), (Sampler, "sequential"), (CLIPTextModel, "forward")):
        spies.append(Mock(side_effect=getattr(owner, name)))
        monkeypatch.setattr(owner, name, lambda *args, spy=spies[-1], **how: spy(*args, **how))
    swept = ["--sweep", "cs=2,3", "--sweep", "tol=0,100", *SHORT]
    assert run(tmp_path / "sweep", tiny, *swept, "--seeds", "3,5", prompts=PROMPTS[:1]) == 0
    loads, solves, encodings = (spy.call_args_list for spy in spies)
    truths = [call for call in solves if not call.kwargs.get("coarse")]
    texts = Counter(tuple(call.args[1].flatten().tolist()) for call in encodings)
    assert len(loads) == 1 and len(truths) == 2 and min(texts.values()) == 1, "the prompt; the empty one warms up"
    printed = capsys.readouterr().out
    assert "; sweep of coarse_steps, tolerance: 4 settings\n" in printed
    means = [line.split() for line in printed.splitlines() if "coarse steps 2, tolerance 0" in line]
    assert len(means) > 1 and means[-1][5:7] == ["2", "0"], "two samples, none failed"
    assert any("±" in line for line in printed.splitlines() if "coarse steps 2, tolerance 100" in line)
    records = [each["made_by"] for each in sample_records(tmp_path / "sweep")]
    assert [(each["coarse_steps"], each["tolerance"]) for each in records] == [(2, 0), (2, 100), (3, 0), (3, 100)] * 2
    assert pd.read_csv(tmp_path / "sweep" / "results.csv").final.sum() == 8
    alone = ["-cs", "3", "-tol", "0", "--seed", "5", *SHORT]
    assert run(tmp_path / "alone", tiny, *alone, prompts=PROMPTS[:1]) == 0
    (single,), own = sample_folders(tmp_path / "alone"), sample_folders(tmp_path / "sweep")[6]
    assert single.name == own.name
    assert all(abs(pixels(single / path.name) - pixels(path)).max() <= 1 for path in own.glob("srds_[!f]*.png"))
    assert run(tmp_path / "sweep", tiny, *alone, prompts=PROMPTS[:1]) == 0
    assert "1 of 1 samples are there already" in capsys.readouterr().out


def test_settings_are_swept_in_step(tiny, tmp_path):
    argv = ["--sweep", "fine-steps:coarse-steps=9:3,4:2,6:sqrt", "--no-ground-truth", "--max-iterations", "1"]
    assert run(tmp_path, tiny, *argv, "--sweep", "tolerance=5,1", prompts=PROMPTS[:1]) == 0
    steps = [(each["made_by"]["fine_steps"], each["made_by"]["coarse_steps"]) for each in sample_records(tmp_path)]
    assert steps == [(9, 3), (9, 3), (4, 2), (4, 2), (6, 2), (6, 2)]


def test_fewer_blocks_are_taken_for_few_steps_and_said_and_reproduced_by_the_default(tiny, tmp_path, capsys):
    argv = ["--sweep", "fine-steps=8,12", "--no-ground-truth", "--max-iterations", "1"]
    assert run(tmp_path, tiny, *argv, prompts=PROMPTS[:1]) == 0
    assert [each["made_by"]["coarse_steps"] for each in sample_records(tmp_path)] == [3, 10]
    assert "note: 3 blocks instead of the default 10, as there are 8 fine steps" in capsys.readouterr().out
    assert "--coarse-steps" not in run_record(tmp_path)["reproduce"]


def test_no_value_and_letters_beyond_the_font_are_values_of_a_sweep(tiny, tmp_path, recwarn):
    argv = ["--sweep", "negative-prompt=,海 🌊", "-fs", "2", "-cs", "2", "--max-iterations", "0"]
    assert run(tmp_path, tiny, *argv, prompts=PROMPTS[:1]) == 0
    assert pd.read_csv(tmp_path / "results.csv").negative_prompt.fillna("").tolist() == ["", "海 🌊"]
    assert (tmp_path / "sweep.png").is_file() and not [each for each in recwarn if "Glyph" in str(each.message)]


def test_a_sweep_of_failures_ends_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    def fail(*args, **how):
        raise MemoryError

    monkeypatch.setattr(Sampler, "sequential", fail)
    assert run(tmp_path, tiny, "--sweep", "tolerance=1,2,3", "-cs", "2", *SHORT, prompts=PROMPTS[:1]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 of 3 samples failed" in error
