"""The page of a run: what it shows, that it shows texts as texts, and that its controls work in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_record import add, make

from conftest import run_record
from study import report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = ['<script>document.title = "owned"</script>', "quotes \" and ' & emoji 🌅", "a\x1b[2J moon"]
# What a user does, and what is then there to see, as the page's last words.
USE = """<script>
const errors = [];
window.onerror = message => errors.push(message);
window.onload = () => {
  const body = document.querySelector("#results tbody"), heads = [...document.querySelectorAll("#results th")];
  const column = name => heads.findIndex(head => head.textContent === name);
  const value = cell => cell.title || cell.textContent;
  const values = name => [...body.rows].filter(row => !row.hidden).map(row => value(row.cells[column(name)]));
  const found = {title: document.title, rows: values("seed").length};
  heads[column("image error")].firstChild.click(); found.up = values("image error");
  heads[column("image error")].firstChild.click(); found.down = values("image error");
  const filter = document.querySelector("#filter");
  filter.value = "emoji"; filter.oninput({target: filter}); found.filtered = values("prompt");
  const compare = document.querySelector("[data-compare]"); compare.open = true; compare.ontoggle();
  const stack = compare.querySelector(".stack"), [border, difference] = compare.querySelectorAll("input");
  border.value = 20; border.oninput(); found.border = stack.style.getPropertyValue("--x");
  difference.checked = true; difference.oninput(); found.difference = stack.className;
  found.options = [...compare.querySelectorAll("select")].map(side => [...side.options].map(option => option.text));
  found.chosen = [...stack.querySelectorAll("img")].map(image => image.alt);
  compare.querySelector("select").value = 1; compare.querySelector("select").oninput();
  found.source = stack.querySelector("img").src === compare.parentElement.querySelectorAll("figure img")[1].src;
  found.images = stack.querySelectorAll("img").length;
  found.broken = [...document.images].filter(image => image.complete && !image.naturalWidth).length;
  found.alone = [...document.images].filter(image => !image.alt).length;
  found.errors = errors;
  document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
};
</script>"""


@pytest.fixture
def study(tmp_path):
    """A run of three prompts with names that mean harm, one of which failed."""
    record = make(tmp_path / "out", NASTY)
    record.begin()
    for i in range(2):
        add(record, i, grey=50 * i, errors=(3.0 + i, 1.0, 0.5))
    record.fail(2, 0, "out of <memory>")
    record.finish()
    return tmp_path / "out"


def test_a_page_shows_texts_as_texts_and_needs_nothing_from_elsewhere(study):
    page = (study / "report.html").read_text()
    assert "<script>document" not in page and "&lt;script&gt;document" in page and "out of &lt;memory&gt;" in page
    assert "\x1b" not in page and "🌅" in page and "1 of 3 samples failed" in page
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    for source in re.findall(r'src="([^"]+)"', page):
        assert (study / source).is_file()


def test_a_run_can_do_without_its_page(tmp_path):
    record = make(tmp_path, ["a"], report=False)
    add(record, 0)
    record.finish()
    assert not (tmp_path / "report.html").exists()


def test_runs_side_by_side_are_told_apart_by_what_differs(study, tmp_path, capsys):
    other = make(tmp_path / "other", NASTY)
    other.about["settings"] = {**other.about["settings"], "coarse_steps": 4}
    for i in range(3):
        add(other, i)
    other.finish()
    page = tmp_path / "compare.html"
    assert report.main([str(study), str(tmp_path / "other"), "-o", str(page)]) == 0
    text = page.read_text()
    assert "coarse_steps 2" in text and "coarse_steps 4" in text
    assert text.count('src="data:image/png;base64,') == text.count("base64") == 2 * 4 + 3 * 3, "each image once"
    assert report.main([str(study), str(tmp_path / "other"), "-o", str(page), "--link"]) == 0
    assert "base64" not in page.read_text() and 'src="other/000-' in page.read_text()
    assert report.main([str(tmp_path), "-o", str(page)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_settings_of_a_sweep_are_columns_lines_and_strips_of_their_own(tmp_path):
    varied = [{"setting": f"coarse_steps={B}", "settings": {"coarse_steps": B}} for B in (2, 4, 8)]
    record = make(tmp_path, ["a", "a", "a"], varied=varied)
    record.about["settings"] = {**record.about["settings"], "sweep": {"coarse_steps": [2, 4, 8]}}
    for i in range(2):
        add(record, i)
    record.fail(2, 0, "out of memory")
    record.finish()
    page = (tmp_path / "report.html").read_text()
    assert "sweep of coarse_steps: 3 samples" in page and "failed: coarse_steps=8: out of memory" in page
    assert page.count("<section>") == 1 and page.count("<h4>coarse_steps=2</h4>") == 1
    assert ">coarse steps</button>" in page and "against coarse steps" not in page, "two numbers are no axis"
    assert " coarse_steps=4</text>" in page and "coarse_steps=8</text>" not in page, "a line for what there is"


def test_a_page_has_means_with_the_spread_of_pairs_and_a_plot_over_what_was_swept(tmp_path):
    values = (2, 4, 8)
    varied = [
        {"setting": f"coarse_steps={B}, solver={solver}", "settings": {"coarse_steps": B, "solver": solver}}
        for B in values
        for solver in ("ddim", "ddpm")
    ]
    record = make(tmp_path, ["a"] * 6 + ["b"] * 6, varied=varied)
    record.about["settings"] = {
        **record.about["settings"],
        "sweep": {"coarse_steps": [*values], "solver": ["ddim", "ddpm"]},
    }
    for i in range(11):
        add(record, i, errors=(9.0, 1.0 if i < 6 else 3.0))
    record.fail(11, 0, "out of memory")
    record.finish()
    page = (tmp_path / "report.html").read_text()
    table = re.search("<h2>Means over samples</h2>.*?</table>", page, re.S)[0]
    cells = [re.findall("<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[0] for row in cells] == [each["setting"] for each in varied]
    assert cells[0] == "coarse_steps=2, solver=ddim|2|0|1.0|4.0|9|0.50|2.00|2.0 ± 1.4|3.000".split("|")
    assert cells[-1][1:3] == ["2", "1"] and cells[-1][-2:] == ["1.00000", "1.000"]
    plot = page[page.index("<p>Last refinements, against coarse steps") :].partition("</svg>")[0]
    words = re.findall(r"<text[^>]*>\s*(.*?)\s*</text>", plot)
    assert {"2", "4", "8", "coarse steps", "solver=ddim", "solver=ddpm"} <= set(words)
    assert "against solver" not in page


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(tmp_path):
    record = make(tmp_path / "out", ["a", "a", "b"])  # a prompt twice
    for i in range(2):
        add(record, i, errors=(3.0 + i, 1.0))
    assert report.main([str(tmp_path / "out"), "-o", str(tmp_path / "page.html"), "--link"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert (
        "0 of 2 samples failed; 1 of 3 are missing" in page and page.partition('id="results"')[2].count("<tr><td") == 4
    )
    assert report.main([str(tmp_path / "out"), "-o", str(tmp_path / "out" / "run.json")]) == 2


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_the_page_works_in_a_browser(study):
    page = study / "report.html"
    page.write_text(page.read_text().replace("</body>", USE + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', shown, re.S)[1]))
    errors = [float(value) for value in found["up"] if value]
    assert found["title"] == "srds, N = 8: 3 samples" and found["rows"] == 7 and len(run_record(study)["prompts"]) == 3
    assert errors == sorted(errors) and [float(value) for value in found["down"] if value] == errors[::-1]
    assert set(found["filtered"]) == {NASTY[1]} and found["border"] == "20%" and "difference" in found["difference"]
    stages = ["initialised", "iteration 0", "iteration 1", "ground truth"]
    assert found["options"] == [stages, stages] and found["chosen"] == [stages[0], stages[-1]] and found["source"]
    assert found["images"] == 2 and found["broken"] == found["alone"] == 0 and found["errors"] == []
