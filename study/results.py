"""The results of a run as tables: the CSV, and what is printed at the end, with differences of pairs."""

import math

import numpy as np
import pandas as pd

from utils import names_of, settings_of

# What compares an image with its own ground truth, and its column; PSNR, infinite of equals, has no mean.
PAIRED = {
    "image_error": "difference", "ssim": "SSIM", "lpips": "LPIPS", "clip_difference": "CLIP less sequential's",
    "scene_difference": "scene less sequential's",
}  # fmt: skip
SETTINGS = ("method", "solver", "fine_steps", "coarse_steps", "guidance_scale", "tolerance", "stop_rule")


def results_rows(results, about):
    """A row for each sample and refinement, or one with the error of a sample that failed: a list of dicts.

    "setting" names the combination of a sweep, "" without one; the last refinement of a sample is "final".
    """
    environment, rows = about["environment"], []
    machine = {"model": about["model"]["name"], "device": environment["device"], "dtype": environment["dtype"]}
    for result in results:
        settings = settings_of(result, about)
        own = {"prompt": result["prompt"], "seed": result["seed"], "setting": result.get("setting", "")}
        own |= {name: settings[name] for name in dict.fromkeys([*SETTINGS, *result.get("settings", {})])}
        ends = {"error": result.get("error"), "folder": result["folder"]}
        truth = {"sequential_seconds": result["seconds"]["ground_truth"]} if "seconds" in result else {}
        entries = result.get("iterations", [{"verdict": "failed"}])
        rows += [own | machine | entry | {"final": entry is entries[-1]} | truth | ends for entry in entries]
    return rows


def results_table(results, about):
    """`results.csv`, with the rows of `results_rows`; what is not of a sweep has the setting "as given"."""
    table = pd.DataFrame(results_rows(results, about)).replace({"setting": {"": "as given"}})
    return table.to_csv(index=False, lineterminator="\n")


def summary(results, about):
    """The closing tables: a row a sample, but not of a sweep, and of several samples their means, a row a setting."""
    swept = any("setting" in result for result in results)
    tables = [] if swept else [_of_samples(results, about)]
    tables += [by_setting(results_rows(results, about))] if len(results) > 1 else []
    return "\n".join(map(_aligned, tables))


def _of_samples(results, about):
    header = "prompt|iterations|serial evaluations|total|seconds|sequential s|difference|damping|converged"
    rows = [header.split("|")]
    for result, text in zip(results, names_of(results, 40)):
        if "error" in result:
            rows.append((text, *"-------", "failed"))
            continue
        error, truth = result["image_error"], result["seconds"]["ground_truth"]
        rounded = result["stop_reason"] == "exact" and not about.get("keeps_bits", True)
        rows.append((
            text,
            str(len(result["iterations"]) - 1),
            f"{result['serial_evaluations']} of {about['settings']['fine_steps']}",
            str(result["total_evaluations"]),
            f"{result['seconds']['srds']:.2f}",
            "-" if truth is None else f"{truth:.2f}",
            "-" if error is None else f"{error:.3f}",
            f"{result['damping']:.2f}" if result["damping"] else "-",
            f"{'yes' if result['converged'] else 'no'} ({result['stop_reason']}{' to rounding' * rounded})",
        ))  # fmt: skip
    return rows


def by_setting(rows, by="setting"):
    """Means over each setting's samples, of their last refinements: rows of texts, the header first.

    rows: as of `results_rows`. by: what tells the settings apart. What compares a sample with its own ground truth
    has its standard deviation over samples beside it.
    """
    table = pd.DataFrame([row for row in rows if row["final"]])
    digits = {"iteration": 1, "serial_evaluations": 1, "total_evaluations": 0, "seconds": 2, "sequential_seconds": 2}
    measured = [name for name in PAIRED if name in table and table[name].notna().any()]
    header = ["setting", "samples", "failed", "iterations", "serial evaluations", "total", "seconds", "sequential s"]
    means = [header + [PAIRED[name] for name in measured] + ["worst difference"] * ("image_error" in measured)]
    for name, part in table.groupby(by, sort=False):
        known = part.reindex(columns=[*digits, *PAIRED]).astype(float)
        known["iteration"] += 1
        counts = str(len(part)), str(part.error.notna().sum())
        cost = [_number(known[column].mean(), places) for column, places in digits.items()]
        spreads = [_spread(known[column].dropna()) for column in measured]
        worst = [_number(known.image_error.max(), 3)] if "image_error" in measured else []
        means.append([name or "all", *counts, *cost, *spreads, *worst])
    return means


def _number(value, digits):
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _spread(values):
    """Mean ± standard deviation, to its two leading digits; 0 below 1e-6."""
    deviation = round(values.std(), 6) if len(values) > 1 else 0
    digits = max(0, 1 - math.floor(math.log10(deviation))) if deviation else 5
    return _number(values.mean(), digits) + (f" ± {deviation:.{digits}f}" if deviation else "")


def _aligned(rows):
    """Rows of texts, the header first, in columns; all but the first are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, lines))
