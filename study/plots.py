"""The page's plots: differences to the sequential image against cost, and against the settings that vary."""

import io
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from study.results import setting_of
from utils import mean_points

MARKERS = "osD^v<>pX*"


def plots(rows, names):
    """Return pairs of a plot's caption and the plot as SVG.

    One plot has differences against the cost of refinements, a line for each setting; and for each of `names` with
    three numbers or more, one has the last refinements against it.
    """
    known = [row for row in rows if row["difference"] is not None]
    numbers = {name: {row[name] for row in known if is_number(row[name])} for name in names}
    style = {"svg.fonttype": "none", "svg.hashsalt": "srds", "svg.id": None}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.simplefilter("ignore")  # about letters that matplotlib's font lacks; the browser's has them
        first = [against_cost(known, names)] if known else []
        return [*first, *(against_setting(known, name, names) for name in names if len(numbers[name]) > 2)]


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def against_cost(rows, names):
    """Return caption and plot: means over samples, a point for each refinement."""

    def draw(axes, across, part, look):
        samples = {}
        for row in part:
            samples.setdefault((row["run"], row["folder"]), []).append((row[across], row["difference"]))
        axes.plot(*mean_points(list(samples.values())).T, **look)
        axes.set_xlabel(across.replace("_", " "))

    svg = two_plots(rows, names, ("serial_evaluations", "seconds"), draw, sharey=True)
    return "Each refinement against its cost; means over samples.", svg


def against_setting(rows, name, names):
    """Return caption and plot: means over samples of last refinements, and bars from least to most."""
    rows = [row for row in rows if row["final"] and is_number(row[name])]
    values = sorted({row[name] for row in rows})

    def draw(axes, column, part, look):
        own = sorted({row[name] for row in part})
        samples = [[row[column] for row in part if row[name] == value] for value in own]
        means = np.array([np.mean(each) for each in samples])
        bars = means - [min(each) for each in samples], [max(each) for each in samples] - means
        axes.errorbar(own, means, yerr=np.maximum(bars, 0), capsize=3, **look)  # equals differ by rounding
        if values[0] > 0 and values[-1] > 5 * values[0]:
            axes.set_xscale("log")
        if len(values) < 10:
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylabel(column.replace("_", " "))

    svg = two_plots(rows, [other for other in names if other != name], ("difference", "serial_evaluations"), draw)
    return f"Last refinements against {name.replace('_', ' ')}; means over samples, bars from least to most.", svg


def two_plots(rows, names, columns, draw, **how):
    """Return the SVG of two plots side by side; draw(axes, column, rows, look) draws the line of a setting."""
    lines = {}
    for row in rows:
        lines.setdefault(setting_of(row, names), []).append(row)
    figure = Figure(figsize=(10, 3.6 + 0.25 * -(-len(lines) // 3)), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2, **how), columns):
        axes.grid(True, color="0.9")
        for i, (name, part) in enumerate(lines.items()):  # lines can be distinguished without colours
            look = {"color": str(0.6 * i / max(len(lines) - 1, 1)), "linestyle": ("-", "--", ":")[i % 3]}
            label = " " + name.replace("$", r"\$")  # not a formula, nor a name that a legend would omit
            draw(axes, column, part, {**look, "marker": MARKERS[i % 10], "label": label})
    figure.axes[0].set_ylabel("difference, grey levels of 255")
    figure.axes[0].set_yscale("symlog", linthresh=0.01)
    if len(lines) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=3)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()[file.getvalue().index("<svg") :]
