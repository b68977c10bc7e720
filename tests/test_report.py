"""The page of a run: what it shows, that it shows texts as texts, and that its controls work in a browser."""

import copy
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from test_folder import failing

import main
import utils
from conftest import run_record, sample_folders
from study import report
from study.folder import load_samples
from study.results import summary

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = ['<script>document.title = "owned"</script>', "quotes \" and ' & emoji 🌅", "a\x1b[2J moon"]
# What a user does, and what is then there to see, as the page's last words.
USE = Path(__file__).with_name("use_page.html")


def run(out, model, *more, prompts=NASTY):
    texts = [f"--prompt={text}" for text in prompts]
    short = ["--device", "cpu", "-cs", "2", "--max-iterations", "1"]
    return main.main(["-o", str(out), "--model", str(model), *short, *texts, *more])


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A run of three prompts with names that mean harm, one of which failed; one of other blocks; and a sweep."""
    root = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, NASTY[2], FloatingPointError("not finite in <float32>"))
        assert run(root / "out", tiny, "--seed", "7", "-fs", "6") == 1
    assert run(root / "other", tiny, "--seed", "7", "-fs", "6", "-cs", "3", prompts=NASTY[:1]) == 0
    swept = ["--sweep", "fs:solver=3:ddim,4:ddim,6:ddpm", "--seeds", "1,2"]
    assert run(root / "sweep", tiny, *swept, prompts=["a"]) == 0
    return root


@pytest.fixture
def study(made, tmp_path):
    shutil.copytree(made, tmp_path / "studies")
    return tmp_path / "studies"


def test_a_page_shows_texts_as_texts_and_needs_nothing_from_elsewhere(made):
    page, run = (made / "out" / "report.html").read_text(), run_record(made / "out")
    assert "<script>document" not in page and "&lt;script&gt;document" in page
    assert "failed: not finite in &lt;float32&gt;" in page and "1 of 3 samples failed" in page
    assert "\x1b" not in page and "🌅" in page and not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 2 * 3 and all((made / "out" / source).is_file() for source in sources)
    table = dict(re.findall("<tr><td>([a-z ]+)</td><td>(.*?)</td>", page.partition("All settings")[2]))
    assert table.items() >= {name.replace("_", " "): html.escape(value) for name, value in run["settings"].items()
                             if name != "prompt"}.items()  # fmt: skip
    assert (table["seed"], table["eta"], table["model"]) == ("7", "0.0", str(run["settings"]["model"]))
    reproduce = html.unescape(re.search("<pre>(.*?)</pre>", page, re.S)[1])
    assert reproduce == run["reproduce"].replace("\x1b", r"\x1b")
    assert {"--seed=7", "--fine-steps=6", "--max-iterations=1"} <= {*reproduce.split()}


def test_numbers_of_other_samples_stay_whole_beside_a_sample_that_failed(made):
    table = pd.read_csv(made / "out" / "results.csv", dtype=str, keep_default_na=False)
    assert table.k.tolist() == ["0", "1", "0", "1", ""] and table.serial_evaluations.tolist()[1::2] == ["4", "4"]
    assert table.verdict.tolist()[-1] == "failed" and table.error.tolist()[-1].startswith("not finite in <float32>")


def test_closing_tables_fit_into_a_terminal(made):
    run = run_record(made / "sweep")
    samples = copy.deepcopy(load_samples(made / "sweep", run))
    for i, (said, record) in enumerate(samples):
        record["made_by"]["arguments"]["negative_prompt"] = "clouds " * 30 + str(i % 2)
        said["prompt"] = "a red sun over purple mountains at dusk" * (i + 1)
    for some in (samples, samples[:1] * 2):
        printed = summary(some)
        assert "..." in printed and max(map(len, printed.splitlines())) <= 100
    said, _ = samples[0]
    table, means = summary([(said, None), ({**said, "error": "out of memory"}, None)]).split("\n\n")
    assert [line.split()[-1] for line in table.splitlines()[1:]] == ["made", "failed"]
    assert means.splitlines()[1].split()[:3] == ["all", "2", "1"], "one failed, one was not made"


def test_settings_of_a_sweep_are_columns_lines_and_strips_of_their_own(made):
    page = (made / "sweep" / "report.html").read_text()
    assert "6 samples, varied: fine steps, solver" in page and page.count("<section>") == 2
    assert page.count("<h4>fine steps 6, solver ddpm</h4>") == 2 and ">fine steps</button>" in page
    table = re.search("<h2>Means over samples</h2>.*?</table>", page, re.S)[0]
    cells = [re.findall("<td.*?>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    names = ["fine steps 3, solver ddim", "fine steps 4, solver ddim", "fine steps 6, solver ddpm"]
    assert [row[0] for row in cells] == names
    assert all(row[1:3] == ["2", "0"] for row in cells) and any("±" in cell for row in cells for cell in row)
    plot = page[page.index("<p>Last refinements against fine steps") :].partition("</svg>")[0]
    words = {*re.findall(r"<text[^>]*>\s*(.*?)\s*</text>", plot)}
    assert {"3", "4", "6", "fine steps", "solver ddim", "solver ddpm"} <= words
    assert "against solver" not in page, "two names are no axis"
    assert (made / "sweep" / "sweep.png").is_file() and not (made / "out" / "sweep.png").exists()


def test_runs_side_by_side_are_told_apart_by_what_differs(study, tmp_path):
    page, both = tmp_path / "compare.html", [str(study / "out"), str(study / "other")]
    assert report.main([*both, "-o", str(page)]) == 0
    text = page.read_text()
    assert "run 1, coarse steps 2" in text and "run 2, coarse steps 3" in text and "2 runs: 4 samples" in text
    assert text.count('src="data:image/png;base64,') == text.count("base64") == 2 * 3 + 1 * 3, "each image once"
    shutil.copytree(study / "sweep" / "samples", study / "out" / "samples", dirs_exist_ok=True)
    for more, count in (([], 3), (["--all"], 8)):
        assert report.main([both[0], "-o", str(page), *more]) == 0
        assert f": {count} samples" in page.read_text()


def test_a_comparison_names_every_setting_that_differs_and_gives_each_method_its_colour(made, tiny, tmp_path):
    more = ["--method", "collocation", "--nodes", "3", "--window", "1", "--seed", "7", "-fs", "6"]
    assert run(tmp_path / "other", tiny, *more, "--dtype", "float32", prompts=["a"]) == 0
    folders = [str(made / "out"), str(tmp_path / "other")]
    assert report.main([*folders, "-o", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    table = text.partition('id="differing"')[2].partition("</table>")[0]
    rows = {name: values for name, *values in (re.findall("<td>(.*?)</td>", row) for row in table.split("<tr>")[2:])}
    expected = {"method": ["srds", "collocation"], "nodes": ["None", "3"], "window": ["None", "1"]}
    expected |= {"schedule": ["pipelined", "None"], "dtype": ["auto", "float32"], "output dir": folders}
    assert rows.items() >= expected.items() and not rows.keys() & {"seed", "fine steps", "model"}
    plot = text[text.index("<svg") :].partition("</svg>")[0]
    assert all(utils.COLORS[name] in plot for name in ("srds", "collocation", "sequential"))


@pytest.mark.slow
def test_a_page_is_written_whole_or_not_at_all(study, tmp_path, monkeypatch, capsys):
    out, page = str(study / "out"), tmp_path / "page.html"
    assert report.main([out, "-o", str(tmp_path / "no" / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert report.main([out, "-o", str(page)]) == 0
    before = page.read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert report.main([str(study / "other"), "-o", str(page)]) == 2 and page.read_bytes() == before
    monkeypatch.undo()
    assert report.main([str(study / "other"), "-o", str(page)]) == 0 and page.read_bytes() != before
    assert not list(tmp_path.glob(".part*")) and "No space left" in capsys.readouterr().err


def test_links_and_foreign_records_in_a_study_that_was_sent_are_not_shown(study, tmp_path, capsys):
    """Other forged records are no samples, see `test_folder`."""
    out, page = study / "out", tmp_path / "page.html"
    first, run = sample_folders(out)[0].relative_to(out), run_record(out)
    run["samples"][0]["folder"] = f"../../other/samples/{sample_folders(study / 'other')[0].name}"

    def link(path, target):
        path.rename(tmp_path / "moved")
        path.symlink_to(target)

    shutil.copy(out / first / "srds_ddim_gt.png", tmp_path / "secret.png")
    forgeries = [
        lambda: link(out / first / "srds_ddim_gt.png", tmp_path / "secret.png"),
        lambda: link(out / first / "srds_initialized.png", "srds_ddim_gt.png"),
        lambda: link(out / first / "result.json", tmp_path / "moved"),
        lambda: link(out / first, tmp_path / "moved"),
        lambda: (out / "run.json").write_text(json.dumps(run)),
    ]
    shutil.copytree(out, tmp_path / "whole")
    for forgery in forgeries:
        forgery()
        assert report.main([str(out), "-o", str(page)]) == 0, capsys.readouterr().err
        assert "2 of 3 samples failed or are missing" in page.read_text()
        for place in (out, tmp_path / "moved"):
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        shutil.copytree(tmp_path / "whole", out)
    (out / "run.json").write_text("{}")
    assert report.main([str(out), "-o", str(page)]) == 2
    error = capsys.readouterr().err
    assert "is not the output directory of a run" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_the_page_works_in_a_browser(study):
    page = study / "out" / "report.html"
    page.write_text(page.read_text().replace("</body>", USE.read_text() + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', shown, re.S)[1]))
    differences = [float(value) for value in found["up"] if value]
    assert found["title"] == "srds, N = 6: 3 samples" and found["rows"] == 5 and len(differences) == 4
    assert differences == sorted(differences) and [float(each) for each in found["down"] if each] == differences[::-1]
    assert set(found["filtered"]) == {NASTY[1]} and found["border"] == "20%" and "difference" in found["difference"]
    stages = ["k = 0", "k = 1", "ground truth"]
    assert found["enlarged"] and found["closed"]
    assert found["options"] == [stages, stages] and found["chosen"] == [stages[0], stages[-1]] and found["source"]
    assert found["images"] == 2 and found["broken"] == found["alone"] == 0 and found["errors"] == []
