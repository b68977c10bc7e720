"""The results of samples as tables: the CSV, and the tables printed at the end.

A sample is a pair here: its entry in `run.json`, and its record, as `study.folder.read_sample` returns it, or None.
"""

import csv
from dataclasses import fields

import pandas as pd

from refinement import MEASURED
from settings import Call, Settings, in_one_line
from utils import names_of

SETTINGS = [each.name for kind in (Settings, Call) for each in fields(kind) if each.name not in ("seed", "call")]
MADE_ON = ["model", "device", "dtype"]  # unknown for a failed sample
WIDTH = 100  # columns of a terminal
# Columns of the closing tables, with their headings and formats.
COLUMNS = {"k": ("k", "{:.3g}"), "serial_evaluations": ("serial", "{:.4g}"), "total_evaluations": ("total", "{:.0f}"),
           "difference": ("difference", "{:.2g}"), "seconds": ("seconds", "{:.2f}"),
           "sequential_seconds": ("sequential s", "{:.2f}"), "network_calls": ("calls", "{:.4g}")}  # fmt: skip
# Comparisons of an image with its own ground truth. PSNR, infinite for equal images, has no mean.
PAIRED = {"difference": "difference", "ssim": "SSIM"}


def results_rows(samples):
    """Return a row for each refinement of each sample, or one for a sample that failed or was not made: a DataFrame.

    The last refinement of a sample is "final". Every setting, and every argument of the pipeline's call, has a column
    of its own. Columns have Python's objects, as pandas would turn whole numbers into floats beside a missing one.
    """
    rows, settings = [], dict.fromkeys(SETTINGS)
    for said, record in samples:
        settings |= dict.fromkeys(record["made_by"]["arguments"] if record else said["settings"])
        if record:
            known = record["made_by"]["arguments"] | record["made_by"] | record["result"] | said
            entries = [dict(entry) for entry in record["result"]["refinements"]]
        else:
            known = said["settings"] | said
            entries = [{"verdict": "failed"} if said["error"] else {"verdict": "not made", "error": "not made"}]
        rows += [known | entry | {"final": entry is entries[-1]} for entry in entries]
    columns = dict.fromkeys([*MEASURED, *settings, *MADE_ON, "stop_reason", "steps"])
    return pd.DataFrame(rows, columns=[*columns], dtype=object)


def results_table(samples):
    """Return `results.csv`, with the rows of `results_rows`."""
    how = {"lineterminator": "\n", "quoting": csv.QUOTE_NONNUMERIC}  # as a prompt may hold a carriage return
    return results_rows(samples).drop(columns=["stop_reason", "steps"]).to_csv(index=False, **how)


def last_rows(rows):
    """Return the last row of each sample, with floats for the numbers of the closing tables."""
    numbers = [*COLUMNS, *PAIRED, "trajectory_change", "tolerance", "steps"]
    return rows[rows["final"].astype(bool)].astype(dict.fromkeys(numbers, float))


def varied(rows):
    """Return the names of the settings (with model, device and dtype) in which rows differ."""
    names = [name for name in rows if name not in {*MEASURED, "stop_reason", "steps", "run"}]
    return [name for name in names if rows[name].nunique(dropna=name in MADE_ON) > 1]


def settings_of(rows, names):
    """Return each row's settings of these names, as text for people: a Series."""
    known = lambda row: [name for name in names if row[name] is not None and row[name] == row[name]]
    text = lambda row: ", ".join(f"{name.replace('_', ' ')} {in_one_line(row[name])}" for name in known(row))
    return pd.Series([text(row) for row in rows.to_dict("records")], rows.index, dtype=object)


def summary(samples):
    """Return the closing tables: a row for each sample unless settings vary, and means, a row for each setting."""
    rows = results_rows(samples)
    last, names, parts = last_rows(rows), varied(rows), []
    if not names:
        table = pd.DataFrame(_texts(last)).assign(ended=last["stop_reason"].fillna(last["verdict"])).replace("nan", "-")
        parts.append(_printed("prompt", table.set_axis(names_of(last.to_dict("records"), 40))))
    if len(samples) > 1:
        means = by_setting(last, names).drop(columns=["SSIM", "sequential s"], errors="ignore")
        parts.append(_printed("setting", means))
    moving = last.query("stop_rule == 'final' and stop_reason == 'tolerance' and trajectory_change >= tolerance")
    if len(moving):
        change = f"{moving['trajectory_change'].max():.2g}, in {len(moving)} of {len(last)} samples"
        parts.append(f"note: the image has settled, but the trajectory still changes by up to {change};\n"
                     "--stop-rule trajectory waits until both have settled")  # fmt: skip
    return "\n\n".join(parts)


def _texts(table):
    """Return the `COLUMNS` of a table as texts, by heading; network calls only if there are more than ticks."""
    alike = not table["network_calls"].gt(table["serial_evaluations"]).any()
    shown = {name: how for name, how in COLUMNS.items() if not (alike and name == "network_calls")}
    return {words: table[name].map(form.format) for name, (words, form) in shown.items()}


def _printed(title, table):
    """Return a table of texts as it is printed: its index, flush left, is cut in the middle if lines are too long."""
    most = max(20, WIDTH - len(table.set_axis([""] * len(table)).to_string().partition("\n")[0]))
    cut = [text if len(text) <= most else f"{text[: most - 13]}...{text[-10:]}" for text in table.index]
    return table.set_axis(cut).rename_axis(columns=title).to_string()


def by_setting(last, names):
    """Return means over the samples of each setting, for the rows of `last_rows`: a DataFrame of texts.

    names: the columns in which settings differ. Comparisons of samples with their own ground truth have their standard
    deviation over samples beside them.
    """
    groups = last.groupby(settings_of(last, names).replace("", "all"), sort=False)
    failed = groups["verdict"].agg(lambda verdicts: sum(verdicts == "failed"))
    table = pd.DataFrame({"samples": groups.size(), "failed": failed, **_texts(groups[[*COLUMNS]].mean())})
    for name, words in PAIRED.items():
        if last[name].notna().any():
            table[words] = groups[name].agg(_spread)
    table["worst"] = groups["difference"].max().map("{:.2g}".format)
    return table.replace("nan", "-")


def _spread(values):
    """Return mean ± standard deviation; deviations below 1e-6 are left out."""
    deviation = values.std()
    return f"{values.mean():.3g}" + (f" ± {deviation:.1g}" if deviation >= 1e-6 else "")
