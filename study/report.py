"""Write the page of a run, or of several side by side: one HTML file that opens without a server.

python -m study.report DIR [DIR ...] -o compare.html
"""

import argparse
import base64
import io
import os
import sys
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure

import utils
from settings import Failure, in_one_line
from study.folder import load_samples, read_file, read_run, read_sample, replace_file
from study.results import MADE_ON, MEASURED, by_setting, last_rows, results_rows, settings_of, varied

# Lines can be distinguished without colours.
LOOKS = cycler(color=["0", "0.3", "0.6"] * 10, linestyle=["-", "--", ":"] * 10, marker=[*"osD^v<>pX*"] * 3)


def page(runs):
    """Return the HTML of runs: for each, its `run.json`, its samples, see `study.results`, and the path of its folder.

    Images in that folder are embedded; those of a run whose path is "" are linked, for a page in the run's own folder.
    """
    tables = [results_rows(samples).assign(run=1 + i) for i, (_, samples, _) in enumerate(runs)]
    rows = pd.concat(tables, ignore_index=True)
    differing = [*["run"] * (len(runs) > 1), *varied(rows)]
    rows["setting"] = settings_of(rows, differing)
    pairs = [(record, root) for _, samples, root in runs for _, record in samples]
    last = last_rows(rows).assign(record=[record for record, _ in pairs], root=[root for _, root in pairs])
    columns = dict.fromkeys(["run"] * (len(runs) > 1) + ["prompt", "seed", *differing, *MEASURED, *MADE_ON])
    shown = [name for name in columns if name in rows and rows[name].fillna(0).astype(bool).any()]
    how = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "finalize": _plain}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **how)
    return environment.get_template("report.html.jinja").render(
        runs=[run for run, _, _ in runs], count=len(last), failed=last["error"].count(),
        varied=[name for name in differing if name != "run"], plots=plots(rows, differing),
        means=by_setting(last, differing).reset_index(names="setting"), rows=rows[shown],
        groups=[(*key, part.to_dict("records")) for key, part in last.groupby(["prompt", "seed"], sort=False)],
        source=_source, facts=utils.facts,
    )  # fmt: skip


def _plain(value):
    """Return what the page shows of a value: no control characters, and nothing for a missing value."""
    if type(value) is str:  # and not HTML, of a type of its own
        return in_one_line(value, 10**6)
    return "" if value is None or value != value else value


def _source(root, folder, image):
    """Return the `src` of a sample's image: its content, or a link in a page of the run's own folder."""
    path = f"samples/{folder}/{image}.png"
    return f"data:image/png;base64,{base64.b64encode(read_file(root, path)).decode()}" if root else path


def plots(rows, names):
    """Return pairs of a plot's caption and the plot as SVG.

    One plot has differences against the cost of refinements, a line for each setting; and for each setting in `names`
    with three numbers or more, one has the last refinements against it.
    """
    known = rows[rows["difference"].notna()]
    numbers = known[[name for name in names if name != "run"]].apply(pd.to_numeric, errors="coerce")
    swept = [values for _, values in numbers.items() if values.nunique() > 2]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "srds", "axes.prop_cycle": LOOKS}):
        first = [against_cost(known, names)] if len(known) else []
        return first + [against_setting(last_rows(known), values, names) for values in swept]


def against_cost(rows, names):
    """Return caption and plot: means over samples, a point for each refinement."""

    def draw(axes, across, part, label):
        samples = [each[[across, "difference"]].values.tolist() for _, each in part.groupby(["run", "folder"])]
        axes.plot(*utils.padded(samples).mean(0).T, label=label)
        axes.set_xlabel(across.replace("_", " "))

    svg = two_plots(rows, names, ("serial_evaluations", "seconds"), draw, sharey=True)
    return "Each refinement against its cost; means over samples.", svg


def against_setting(rows, values, names):
    """Return caption and plot: means over samples of last refinements, and bars from least to most.

    values: the setting's numbers, a Series; NaN for a value that is none.
    """
    ticks, words = sorted(values.dropna().unique()), values.name.replace("_", " ")

    def draw(axes, column, part, label):
        found = part.groupby(values)[column].agg(["mean", "min", "max"])
        axes.plot(found["mean"], label=label)
        axes.vlines(found.index, found["min"], found["max"], "0.6")
        axes.set_xscale("log" if ticks[0] > 0 else "linear")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=words, ylabel=column.replace("_", " "))

    svg = two_plots(rows, [name for name in names if name != values.name], ("difference", "serial_evaluations"), draw)
    return f"Last refinements against {words}; means over samples, bars from least to most.", svg


def two_plots(rows, names, columns, draw, **how):
    """Return the SVG of two plots side by side; draw(axes, column, rows, label) draws the line of a setting."""
    lines = rows.groupby(settings_of(rows, names), sort=False)
    figure = Figure(figsize=(10, 3.6 + 0.25 * -(-len(lines) // 3)), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2, **how), columns):
        axes.grid(True, color="0.9")
        for label, part in lines:
            draw(axes, column, part, label.replace("$", r"\$"))  # not a formula
    figure.axes[0].set_ylabel("difference, grey levels of 255")
    figure.axes[0].set_yscale("symlog", linthresh=0.01)
    if len(lines) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=3)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()[file.getvalue().index("<svg") :]


def read_study(folder, every=False):
    """Return the run in an output directory and its samples; with `every`, all samples there. Raises Failure."""
    run = read_run(folder)
    if not run:
        raise Failure(f"{folder} is not the output directory of a run; give one")
    if not every:
        return run, load_samples(folder, run)
    names = [name for name in sorted(os.listdir(Path(folder, "samples"))) if name[0] != "."]
    found = [({"folder": name, "error": None}, read_sample(folder, f"samples/{name}")) for name in names]
    return run, [(said, record) for said, record in found if record]


def main(argv=None):
    """Write the page that compares runs; returns the exit status."""
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
