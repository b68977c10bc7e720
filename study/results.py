"""The results of a run as tables: the CSV, the closing table, and paired differences."""

import numpy as np
import pandas as pd

from utils import names_of, settings_of

# What compares an image with its own ground truth, and what a person calls it; PSNR, infinite of equals, has no mean.
PAIRED = {
    "image_error": "difference to sequential", "ssim": "SSIM", "lpips": "LPIPS",
    "clip_difference": "CLIP score minus sequential's", "scene_difference": "scene score minus sequential's",
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
    """The closing table: a row a sample, or of a sweep a row a setting."""
    if any("setting" in result for result in results):
        return _of_settings(results, about)
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
    return _table(rows)


def _by_setting(results, about):
    """Each setting's name and its samples' last refinements, a DataFrame."""
    table = pd.DataFrame(results_rows(results, about))
    return table[table.final].groupby("setting", sort=False)


def _of_settings(results, about):
    """A row a setting: means over its samples, the worst difference, and how many failed."""
    header = "setting|samples|failed|iterations|serial evaluations|total|seconds|sequential s|difference|worst"
    rows = [header.split("|")]
    digits = {"iteration": 1, "serial_evaluations": 1, "total_evaluations": 0, "seconds": 2, "sequential_seconds": 2}
    for name, part in _by_setting(results, about):
        known = part.reindex(columns=[*digits, "image_error"]).astype(float)
        known["iteration"] += 1
        means = [_number(known[column].mean(), count) for column, count in digits.items()]
        errors = [_number(value, 3) for value in (known.image_error.mean(), known.image_error.max())]
        rows.append((name, str(len(part)), str(part.error.notna().sum()), *means, *errors))
    return _table(rows)


def paired(results, about):
    """Lines on what else was measured against each sample's own ground truth: mean, standard deviation, pairs."""
    parts, lines = [*_by_setting(results, about)], []
    for column, words in PAIRED.items():
        for name, part in parts:
            values = part.get(column, pd.Series(dtype=float)).dropna().astype(float)
            if len(values) > 1:
                spread = f"{values.mean():.5g} ± {values.std():.2g} ({len(values)} pairs)"
                lines.append(f"{words}{f', {name}' if name else ''}: {spread}")
    return lines


def _number(value, digits):
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _table(rows):
    """Rows of texts, the header first, in columns; all but the first are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, lines))
