"""The results of samples as tables: the CSV, and the tables printed at the end.

A sample is a pair here: its entry in `run.json`, and its record, as `study.folder.read_sample` returns it, or None.
"""

import math
from dataclasses import fields

import pandas as pd

from settings import Settings, in_one_line
from utils import names_of

# Comparisons of an image with its own ground truth, and their headings; PSNR, infinite for equal images, has no mean.
PAIRED = {"difference": "difference", "ssim": "SSIM", "lpips": "LPIPS", "clip_difference": "CLIP - truth's",
          "scene_difference": "scene - truth's"}  # fmt: skip
MEASURED = [
    "prompt", "seed", "folder", "k", "final", "verdict", "serial_evaluations", "total_evaluations", "network_calls",
    "widest_tick", "seconds", "sequential_seconds", "peak_memory_mib", "difference", "psnr", "ssim", "image_change",
    "trajectory_change", "predicted_change", "damping", "error",
]  # fmt: skip
SETTINGS = [each.name for each in fields(Settings) if each.name != "seed"]
HIDDEN = ["metrics", "settled", "stop_reason", "most_damping"]  # not in the CSV
NOT_MADE = "not made"  # the error of a sample that was not reached
WIDTH = 100  # columns of a terminal
KNOWN = [*SETTINGS, "model", "device", "dtype"]


def results_rows(samples):
    """Return a row for each refinement of each sample, or one with the error of a failed sample: a list of dicts.

    The last refinement of a sample is "final". Every setting has a column of its own.
    """
    rows = []
    for said, record in samples:
        entries, known = [{"verdict": "failed", "error": said["error"] or NOT_MADE}], said["settings"]
        if record:
            known = record["made_by"] | {name: record["result"][name] for name in ("model", "device", "stop_reason")}
            own = {"sequential_seconds": record["result"]["sequential_seconds"], "error": None}
            entries = [{**own, **entry, **entry["metrics"]} for entry in record["result"]["refinements"]]
            known["most_damping"] = max(entry["damping"] for entry in entries)
        about = dict.fromkeys(MEASURED) | {name: said[name] for name in ("prompt", "seed", "folder")}
        settings = {name: known.get(name) for name in [*KNOWN, "stop_reason", "most_damping"]}
        rows += [{**about, **entry, "final": entry is entries[-1], **settings} for entry in entries]
    return rows


def results_table(samples):
    """Return `results.csv`, with the rows of `results_rows`."""
    table = pd.DataFrame(results_rows(samples)).drop(columns=HIDDEN, errors="ignore")
    return table.to_csv(index=False, lineterminator="\n")


def varied(rows):
    """Return the names of the settings (with model, device and dtype) in which rows differ."""
    known = [name for name in KNOWN if len({str(row[name]) for row in rows}) > 1]
    made = [row for row in rows if row["model"] is not None]  # as a failed sample's is not known
    return [name for name in known if name in SETTINGS or len({row[name] for row in made}) > 1]


def setting_of(row, names):
    """Return a row's settings of these names, as text for people."""
    return ", ".join(f"{name.replace('_', ' ')} {in_one_line(row[name])}" for name in names)


def summary(samples):
    """Return the closing tables: a row for each sample unless settings vary, and means, a row for each setting."""
    rows = results_rows(samples)
    last, tables = [row for row in rows if row["final"]], []
    if not varied(rows):
        tables.append(_of_samples(last))
    if len(samples) > 1:
        tables.append(by_setting(rows).drop(columns=["SSIM", "sequential s"], errors="ignore"))
    return "\n\n".join([*map(_printed, tables), *_notes(last)])


def _printed(table):
    """A table of texts as it is printed: the first column, flush left, is cut where a line would be too long."""
    first = table.columns[0]
    lines = table.drop(columns=first).to_string(index=False).splitlines()
    most = max(8, min(WIDTH - 1 - max(map(len, lines)), table[first].map(len).max()))
    cut = [text if len(text) <= most else text[: most - 3] + "..." for text in table[first]]
    return "\n".join(f"{text.ljust(most)} {line}" for text, line in zip([first, *cut], lines))


def _notes(last):
    """Return notes on how samples have ended."""
    moving = [row["trajectory_change"] for row in last
              if row["stop_rule"] == "final" and row["stop_reason"] == "tolerance" and row["error"] is None
              and (row["trajectory_change"] or 0) >= row["tolerance"]]  # fmt: skip
    if not moving:
        return []
    who = f"the images of {len(moving)} of {len(last)} samples have" if len(last) > 1 else "the image has"
    return [f"note: {who} settled, but the trajectory still changes by up to {max(moving):.2g};\n"
            "--stop-rule trajectory waits until both have settled"]  # fmt: skip


def _of_samples(last):
    """Return a row for each sample: a DataFrame of texts."""
    text = lambda name, form: [form.format(row[name]) if row[name] is not None else "-" for row in last]
    table = {"prompt": names_of(last, 40), "k": text("k", "{}"), "serial": text("serial_evaluations", "{}"),
             "of N": text("fine_steps", "{}"), "total": text("total_evaluations", "{}")}  # fmt: skip
    if any(row["max_batch"] for row in last):
        table["calls"] = text("network_calls", "{}")
    table |= {"seconds": text("seconds", "{:.2f}"), "sequential s": text("sequential_seconds", "{:.2f}")}
    table |= {"difference": text("difference", "{:.2g}"), "damping": text("most_damping", "{:.2g}")}
    return pd.DataFrame({**table, "converged": [_ended(row) for row in last]})


def _ended(row):
    if row["error"]:
        return NOT_MADE if row["error"] == NOT_MADE else "failed"
    return f"{'yes' if row['verdict'] == 'converged' else 'no'} ({row['stop_reason']})"


def by_setting(rows, names=None):
    """Return means over the samples of each setting, for their last refinements: a DataFrame of texts.

    rows: as `results_rows` returns them. names: the columns in which settings differ. Comparisons of samples with
    their own ground truth have their standard deviation over samples beside them.
    """
    names, means = varied(rows) if names is None else names, []
    table = pd.DataFrame([{"setting": setting_of(row, names) or "all", **row} for row in rows if row["final"]])
    measured = {name: words for name, words in PAIRED.items() if name in table and table[name].notna().any()}
    costs = {"k": ("k", 1), "serial_evaluations": ("serial", 1), "total_evaluations": ("total", 0),
             "seconds": ("seconds", 2), "sequential_seconds": ("sequential s", 2)}  # fmt: skip
    for name, part in table.groupby("setting", sort=False):
        known = part.reindex(columns=[*costs, *PAIRED]).astype(float)
        row = {"setting": name, "samples": len(part), "failed": int(part.error.dropna().ne(NOT_MADE).sum())}
        row |= {words: f"{known[column].mean():.{digits}f}" for column, (words, digits) in costs.items()}
        row |= {words: _spread(known[column].dropna()) for column, words in measured.items()}
        means.append(row | ({"worst": f"{known.difference.max():.2g}"} if "difference" in measured else {}))
    return pd.DataFrame(means).replace("nan", "-")


def _spread(values):
    """Return mean ± standard deviation, to its two leading digits; deviations below 1e-6 are left out."""
    deviation = round(values.std(), 6) if len(values) > 1 else 0
    if not deviation:
        return f"{values.mean():.2g}"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{values.mean():.{digits}f} ± {deviation:.{digits}f}"
