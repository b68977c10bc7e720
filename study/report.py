"""Write the page of a run, or of several side by side: one HTML file that opens without a server.

python -m study.report DIR [DIR ...] -o compare.html
"""

import argparse
import base64
import os
import sys
from functools import partial
from pathlib import Path

import jinja2
import pandas as pd

import utils
from settings import Failure, in_one_line
from study.folder import load_samples, read_file, read_run, read_sample, replace_file
from study.results import COLUMNS, MADE_ON, MEASURED, by_setting, last_rows, results_rows, settings_of, varied


def page(runs):
    """Return the HTML of runs, each a tuple: its `run.json`, its samples (see `study.results`), the path of its folder.

    The images in that folder are embedded. If the path is "", they are linked, for a page in the run's own folder.
    """
    tables = [results_rows(samples).assign(run=i) for i, (_, samples, _) in enumerate(runs, 1)]
    rows = pd.concat(tables, ignore_index=True)
    differing = ["run"] * (len(runs) > 1) + varied(rows)
    rows["setting"] = settings_of(rows, differing)
    pairs = [(record, root) for _, samples, root in runs for _, record in samples]
    last = last_rows(rows).assign(record=[record for record, _ in pairs], root=[root for _, root in pairs])
    columns = dict.fromkeys([*differing, *COLUMNS, *MEASURED, *MADE_ON])
    shown = [name for name in columns if name in rows and rows[name].fillna(0).astype(bool).any()]
    how = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "finalize": _plain}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **how)
    drawn = lambda draw: utils.plotted([draw], 1, "svg").decode().partition("<svg")[2]
    return environment.get_template("report.html.jinja").render(
        runs=[run for run, _, _ in runs], count=len(last), failed=last["error"].count(),
        plots=[(words, map(drawn, draws)) for words, draws in plots(rows, differing)], differing=differing,
        means=by_setting(last, differing).reset_index(names="setting"), rows=rows[shown],
        groups=[(*key, part.to_dict("records")) for key, part in last.groupby(["prompt", "seed"], sort=False)],
        source=_source, facts=utils.facts,
    )  # fmt: skip


def _plain(value):
    """Return what the page shows of a value: no control characters, and nothing for a missing value."""
    if type(value) is str:  # not HTML, which has a type of its own
        return in_one_line(value, 10**6)
    return "" if value is None or value != value else value


def _source(root, folder, image):
    """Return the `src` of a sample's image: its content, or a link if `root` is "": a page in the run's folder."""
    path = f"samples/{folder}/{image}.png"
    return f"data:image/png;base64,{base64.b64encode(read_file(root, path)).decode()}" if root else path


def sweep(samples, kinds):
    """Return the plots of samples with several settings, bytes by name: one figure a format."""
    rows = results_rows(samples).assign(run=1)
    draws = [draw for _, some in plots(rows, varied(rows)) for draw in some] if varied(rows) else []
    return {f"sweep.{kind}": utils.plotted(draws, 2, kind) for kind in kinds} if draws else {}


def plots(rows, names):
    """Yield pairs of a caption and two functions, each of which draws a plot on the axes that it is given.

    The first pair plots differences against the cost of refinements, with a line for each setting. Then, each setting
    in `names` with three different numbers or more has a pair that plots last refinements against it.
    """
    rows = rows[rows["difference"].notna()]
    if "method" in names:  # leave out settings that depend on the method alone
        same = rows.groupby("method")[names].nunique(dropna=False).max() == 1
        names = [name for name in names if name in ("run", "method") or not same[name]]
    numbers = rows[[name for name in names if name != "run"]].apply(pd.to_numeric, errors="coerce")
    if len(rows):
        words = "Each refinement against its cost; means over samples, bands from least to largest."
        yield words, [partial(against_cost, rows, names, cost) for cost in ("serial_evaluations", "seconds")]
    for values in (values for _, values in numbers.items() if values.nunique() > 2):
        setting, last = values.name.replace("_", " "), last_rows(rows)
        words = f"Last refinements against {setting}; means over samples, bars from least to largest."
        yield words, [partial(against_setting, last, names, values, y) for y in ("difference", "serial_evaluations")]


def lines(rows, names, axis=None):
    """Yield the rows and the look of each line in a plot: a line for each combination of the settings in `names`.

    axis: the setting on the horizontal axis, which makes no lines. The colour shows the method, or the first setting in
    `names` if the method does not vary; the style shows the others.
    """
    first, *others = sorted(names, key=lambda name: (name != "method", name == "run")) or ["method"]
    value = rows["method" if first == axis else first].map(str)  # a missing one, too
    shades = dict(zip(value.unique(), utils.shades(value.nunique()))) | utils.COLORS
    style = settings_of(rows, [name for name in others if name != axis])
    for text, part in rows.groupby(settings_of(rows, [name for name in names if name != axis]), sort=False):
        i = [*style.unique()].index(style[part.index[0]])
        look = {"linestyle": ["-", "--", ":", "-."][i % 4], "marker": "osD^v<>pX*"[i % 10], "markersize": 4}
        label = text if len(text) <= 40 else f"{text[:27]}...{text[-10:]}"
        yield part, look | {"color": shades[value[part.index[0]]], "label": label or "mean"}


def against_cost(rows, names, cost, axes):
    """Plot the difference of each refinement, as means over samples, against serial evaluations or seconds."""
    points = lambda part: [each[[cost, "difference"]].values.tolist() for _, each in part.groupby(["run", "folder"])]
    shown = [(points(part), look) for part, look in lines(rows, names)]
    truth = rows.groupby("steps")["sequential_seconds" if cost == "seconds" else "steps"].mean().to_dict()
    utils.cost_plot(axes, shown, cost.replace("_", " "), truth)


def against_setting(rows, names, values, column, axes):
    """Plot a column of last refinements against a setting: means over samples, and bars from the least to the largest.

    values: the setting's numbers, a Series; NaN for values that are not numbers.
    """
    if column == "difference":
        utils.log_scale(axes, rows[column])
    else:
        axes.plot(rows.groupby(values)["steps"].mean(), "--", color=utils.COLORS["sequential"], label="sequential")
        axes.yaxis.get_major_locator().set_params(integer=True)
    for part, look in lines(rows, names, values.name):
        found = part.groupby(values)[column].agg(["mean", "min", "max"])
        axes.plot(found["mean"], **look)
        axes.vlines(found.index, found["min"], found["max"], look["color"], alpha=0.4)
    ticks = sorted(values.dropna().unique())
    axes.set_xscale("log" if ticks[0] > 0 else "linear")
    axes.set_xticks([], minor=True)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=values.name.replace("_", " "), ylabel=column.replace("_", " "))
    utils.label_lines(axes)


def read_study(folder, every=False):
    """Return the run in an output directory and its samples; if `every`, all samples there. Raises Failure."""
    run = read_run(folder)
    if not run:
        raise Failure(f"{folder} is not the output directory of a run; give one")
    if not every:
        return run, load_samples(folder, run)
    names = [name for name in sorted(os.listdir(Path(folder, "samples"))) if name[0] != "."]
    found = [({"folder": name, "error": None}, read_sample(folder, f"samples/{name}")) for name in names]
    return run, [(said, record) for said, record in found if record]


def main(argv=None):
    """Write the page that compares runs, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output directories")
    parser.add_argument("-o", "--output", default="compare.html", metavar="FILE", help="the page (%(default)s)")
    parser.add_argument("--all", action="store_true", help="show all samples in DIR, not just the last command's")
    args = parser.parse_args(argv)
    try:
        html = page([(*read_study(folder, args.all), folder) for folder in args.folders])
        replace_file(Path(args.output), html.encode(errors="backslashreplace"))
    except (Failure, OSError, OverflowError, ValueError) as error:
        print(f"study.report: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
