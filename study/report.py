"""Write the page of a run, or of several side by side: one HTML file that opens without a server.

python -m study.report DIR [DIR ...] -o compare.html
"""

import argparse
import base64
import os
import sys
from pathlib import Path
from urllib.parse import quote

import jinja2

import utils
from settings import Failure, in_one_line
from study.folder import METRICS, load_samples, read_file, read_run, read_sample, replace_file
from study.plots import plots
from study.results import MEASURED, by_setting, results_rows, setting_of, varied

MARK = b"<!-- made by srds -->"


def page(runs, embed=None):
    """Return the HTML of runs: for each, its `run.json`, its samples, see `study.results`, and the path of its folder.

    The path is relative to the page or absolute, "" for the page's own folder. embed: a function from a run's folder
    and a file's name to the file's bytes, which are then embedded in the page; None to link images.
    """
    names = [f"run {i + 1}" if len(runs) > 1 else "" for i in range(len(runs))]
    rows = [{"run": name, **row} for (_, samples, _), name in zip(runs, names) for row in results_rows(samples)]
    differing = [*["run"] * (len(runs) > 1), *varied(rows)] if rows else []
    columns = dict.fromkeys(["run", "prompt", "seed", *differing, *MEASURED, *METRICS, "model", "device", "dtype"])
    shown = [name for name in columns if any(row.get(name) not in (None, "", False) for row in rows)]
    how = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **how)
    environment.filters["cell"] = _cell
    count, missing = len({(row["run"], row["folder"]) for row in rows}), sum(bool(row["error"]) for row in rows)
    made = rows[0] if rows else {}
    title = f"{made.get('method')}, N = {made.get('fine_steps')}" if len(runs) == 1 else f"{len(runs)} runs"
    swept = [name.replace("_", " ") for name in differing if name != "run"]
    return environment.get_template("report.html.jinja").render(
        title=f"{title}: {count} samples" + (f", varied: {', '.join(swept)}" if swept else ""),
        summary=f"{missing} of {count} samples failed or are missing." if missing else "All samples are there.",
        runs=[{**run, "name": name, **{each: in_one_line(run[each], 10**6) for each in ("command", "reproduce")}}
              for (run, _, _), name in zip(runs, names)],
        settings=[(name, [run["settings"].get(name, "") for run, _, _ in runs]) for name in runs[0][0]["settings"]],
        plots=plots(rows, differing), means=by_setting(rows, differing) if count > 1 else None, columns=shown,
        rows=[{name: _plain(row.get(name)) for name in shown} for row in rows],
        samples=_samples(runs, names, differing, embed),
    )  # fmt: skip


def _samples(runs, names, differing, embed):
    """Return the images of all runs and settings, grouped by prompt and seed."""
    samples = {}
    for (_, pairs, place), run in zip(runs, names):
        for said, record in pairs:
            title = f"{in_one_line(said['prompt'], 300) or '(no prompt)'}, seed {said['seed']}"
            sample = samples.setdefault(title, {"name": title, "errors": [], "strips": []})
            (row, *_) = results_rows([(said, record)])
            name = setting_of({"run": run, **row}, differing)
            if record is None:
                sample["errors"].append(f"{name}: {row['error']}" if name else row["error"])
            elif all(strip["name"] != name for strip in sample["strips"]):
                sample["strips"].append({"name": name, "images": _images(said, record, place, embed)})
    return samples.values()


def _images(said, record, place, embed):
    """Return a sample's images, in order, with their captions."""
    result, made = record["result"], record["made_by"]
    stages = [(f"k = {entry['k']}", f"srds_iteration_{entry['k']}" if entry["k"] else "srds_initialized",
               utils.facts(entry)) for entry in result["refinements"]]  # fmt: skip
    stages += [("ground truth", "srds_ddim_gt", [])] if result["errors"] is not None else []
    images = []
    for title, name, facts in stages:
        path = f"samples/{said['folder']}/{name}.png"
        if embed:
            source = f"data:image/png;base64,{base64.b64encode(embed(place, path)).decode()}"
        else:
            source = quote(os.fsencode(Path(place, path).as_posix()))
        size = {"width": made["width"], "height": made["height"]}
        images.append({"name": title, "src": source, "facts": ", ".join(facts), **size})
    return images


def _plain(value):
    """Return a value without control characters; "" for None."""
    return "" if value is None else in_one_line(value, 4000) if isinstance(value, str) else value


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]


def read_study(folder, every=False):
    """Return the run in an output directory and its samples; with `every`, all samples there. Raises Failure."""
    run = read_run(folder)
    if not run:
        raise Failure(f"{folder} is not the output directory of a run; give one")
    if not every:
        return run, load_samples(folder, run)
    names = [name for name in sorted(os.listdir(Path(folder, "samples"))) if name[0] != "."]
    found = [(name, record) for name in names if (record := read_sample(folder, f"samples/{name}"))]
    about = {"settings": {}, "error": None}
    return run, [({"prompt": record["made_by"]["prompt"], "seed": record["made_by"]["seed"], "folder": name, **about},
                  record) for name, record in found]  # fmt: skip


def main(argv=None):
    """Write the page that compares runs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output directories")
    parser.add_argument("-o", "--output", default="compare.html", metavar="FILE", help="the page (%(default)s)")
    parser.add_argument("--link", action="store_true", help="link images instead of embedding them")
    parser.add_argument("--all", action="store_true", help="show all samples in DIR, not just the last command's")
    args = parser.parse_args(argv)
    try:
        runs = []
        for folder in args.folders:
            place = os.path.relpath(folder, Path(args.output).parent) if args.link else folder
            runs.append((*read_study(folder, args.all), place))
        html = MARK + b"\n" + page(runs, None if args.link else read_file).encode(errors="backslashreplace")
        write_page(Path(args.output), html)
    except (Failure, OSError, ValueError) as error:
        print(f"study.report: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def write_page(path, html):
    """Write a page as a whole; it may replace only a page of this program. Raises Failure and OSError."""
    if path.suffix != ".html":
        raise Failure(f"argument --output: {path} does not end in .html; give a name that does")
    if os.path.lexists(path):
        try:
            ours = read_file(path.parent, path.name, 2**34).startswith(MARK)
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise Failure(f"argument --output: {path} exists and is not a page of this program; give another name")
    replace_file(path, html)


if __name__ == "__main__":
    sys.exit(main())
