"""The page's plots: differences to the sequential image against cost, and against what a sweep varies."""

import io
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from study.samples import label
from utils import mean_points

MARKERS = "osD^v<>pX*"


def plots(rows, swept):
    """Of what is compared with a ground truth, pairs of what a plot shows, in words, and the plot as SVG.

    A line a run and setting against the cost of its refinements; and for each of the settings swept that has three
    numbers or more, the last refinements against it.
    """
    known = [row for row in rows if row.get("image_error") is not None]
    if not known:
        return []
    numbers = {name: {row[name] for row in known if _is_number(row.get(name))} for name in swept}
    style = {"svg.fonttype": "none", "svg.hashsalt": "srds", "svg.id": None}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.simplefilter("ignore")  # of letters that matplotlib's font lacks: the browser's has them
        further = [_against_setting(known, name) for name in swept if len(numbers[name]) > 2]
        return [("Each refinement, against its cost: means over samples.", _against_cost(known)), *further]


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _against_cost(rows):
    """Means over samples, an iteration a point."""
    lines = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    figure, both = _figure(lines, sharey=True)
    for axes, across in zip(both, ("serial_evaluations", "seconds")):
        for (_, part), look in zip(lines.items(), _looks(lines)):
            axes.plot(*_means(part, across), **look)
        axes.set_xlabel(across.replace("_", " "))
    _scale_differences(both[0])
    return _svg(figure)


def _against_setting(rows, name):
    """What a plot shows, and the plot: means over samples, and bars from the least to the most of them.

    What was asked for other than as a number, such as auto, is a line of its own, at what that was resolved to.
    """
    lines = {}
    for row in rows:
        if row["final"] and _is_number(row.get(name)):
            others = {key: value for key, value in row["asked"].items() if key != name or not _is_number(value)}
            line = lines.setdefault(", ".join(filter(None, [row["run"], label(others)])) or "as given", {})
            line.setdefault(row[name], []).append(row)
    values = sorted({value for line in lines.values() for value in line})
    figure, both = _figure(lines)
    for axes, column in zip(both, ("image_error", "serial_evaluations")):
        for line, look in zip(lines.values(), _looks(lines)):
            samples = [[row[column] for row in line[value]] for value in sorted(line)]
            means = np.array([np.mean(each) for each in samples])
            bars = means - [min(each) for each in samples], [max(each) for each in samples] - means
            axes.errorbar(sorted(line), means, yerr=np.maximum(bars, 0), capsize=3, **look)  # of equals, to rounding
        if values[0] > 0 and values[-1] > 5 * values[0]:
            axes.set_xscale("log")
        if len(values) < 10:
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
        axes.set_xlabel(name.replace("_", " "))
    _scale_differences(both[0])
    both[1].set_ylabel("serial evaluations")
    words = f"Last refinements, against {name.replace('_', ' ')}: means over samples, bars from the least to the most."
    return words, _svg(figure)


def _figure(lines, **how):
    figure = Figure(figsize=(10, 3.6 + 0.25 * -(-len(lines) // 3)), layout="constrained")
    both = figure.subplots(1, 2, **how)
    for axes in both:
        axes.grid(True, color="0.9")
    return figure, both


def _looks(lines):
    """How each line is drawn, such that it is told apart without colours."""
    for i, name in enumerate(lines):
        label = " " + name.replace("$", r"\$")  # no formula, and no name that a legend leaves out
        shade = str(0.6 * i / max(len(lines) - 1, 1))
        yield {"color": shade, "linestyle": ("-", "--", ":")[i % 3], "marker": MARKERS[i % 10], "label": label}


def _scale_differences(axes):
    axes.set_ylabel("difference, grey levels of 255")
    axes.set_yscale("symlog", linthresh=0.01)


def _svg(figure):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, fontsize=8, loc="outside lower left", ncols=3)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()[file.getvalue().index("<svg") :]


def _means(rows, across):
    """The means by iteration of two columns, `across` and the difference."""
    samples = {}
    for row in rows:
        samples.setdefault((row["run"], row["folder"]), []).append((row[across], row["image_error"]))
    return mean_points(list(samples.values())).T
