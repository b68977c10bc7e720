"""The page's plots: differences to the sequential image against cost, and against the settings that vary."""

import io

import matplotlib
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure

from study.results import last_rows, settings_of
from utils import padded

# Lines can be distinguished without colours.
LOOKS = cycler(color=["0", "0.3", "0.6"] * 10, linestyle=["-", "--", ":"] * 10, marker=[*"osD^v<>pX*"] * 3)


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
        axes.plot(*padded(samples).mean(0).T, label=label)
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
