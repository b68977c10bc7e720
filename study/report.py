"""The page of a run, or of several side by side: one HTML file that opens from disk, without a server.

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
from study.directory import read_run, read_set
from study.plots import plots
from study.results import by_setting, results_rows
from study.samples import combinations, label

COLUMNS = [
    "iteration", "serial_evaluations", "total_evaluations", "widest_tick", "seconds", "peak_memory_mib", "image_change",
    "trajectory_change", "image_error", "psnr", "ssim", "lpips", "clip", "clip_difference", "scene", "scene_difference",
    "verdict", "error",
]  # fmt: skip
# Settings that change no sample, or are those of the samples.
SAME = {"output_dir", "prompts", "prompt", "seed", "seeds", "sweep", "metrics", "no_ground_truth", "keep_trajectories"}
SAME |= {"parallel"}


def page(runs, link=True):
    """The HTML of runs: pairs of a record, as `run.json` has it, and where its images are.

    That is a path, relative to the page or absolute, "" for the page's own folder. link: whether images stay where they
    are; else they are in the page.
    """
    names = _names([record for record, _ in runs])
    swept = dict.fromkeys(name for record, _ in runs for name in record["settings"].get("sweep", ()))
    shown = names if len(runs) > 1 else [""]
    rows = [row for (record, _), run in zip(runs, shown) for row in _rows(record, run, swept)]
    columns = ["prompt", "run", "setting", *swept, "seed", *COLUMNS]
    columns = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    settings, count = runs[0][0]["settings"], sum(len(record["prompts"]) for record, _ in runs)
    title = f"{settings['method']}, N = {settings['fine_steps']}" if len(runs) == 1 else f"{len(runs)} runs"
    title = f"sweep of {', '.join(settings['sweep'])}" if len(runs) == 1 and settings.get("sweep") else title
    failed = sum("error" in result for record, _ in runs for result in record["prompts"])
    how = [{"name": name, **_how(record)} for (record, _), name in zip(runs, names)]
    return environment.get_template("report.html.jinja").render(
        title=f"{title}: {count} samples",
        summary=_state(count, failed, sum(len(record.get("folders", record["prompts"])) for record, _ in runs)),
        runs=how, plots=plots(rows, swept), settings=by_setting(rows, "line") if count > 1 else [], columns=columns,
        rows=[{name: _plain(row.get(name)) for name in columns} for row in rows],
        samples=_samples(runs, shown, link),
    )  # fmt: skip


def _rows(record, run, swept):
    """The rows of a run's results, with what was swept in any run, and the name of its line in plots."""
    own = {name: record["settings"].get(name) for name in swept}
    asked = {label(each): each for each in combinations(record["settings"].get("sweep", {}))}
    return [
        {**own, "run": run, "line": _joined(run, row["setting"]), "asked": asked.get(row["setting"], {}), **row}
        for row in results_rows(record["prompts"], record)
    ]


def _samples(runs, names, link):
    """The images of each prompt and seed together, of all runs and settings."""
    samples = {}
    for (record, place), name in zip(runs, names):
        for result in record["prompts"]:
            title = f"{in_one_line(result['prompt'], 300)}, seed {result['seed']}"
            sample = samples.setdefault(title, {"name": title, "errors": [], "strips": []})
            of = _joined(name, result.get("setting"))
            if any(strip["name"] == of for strip in sample["strips"]):  # of a prompt that was given twice
                of = _joined(of, result["folder"])
            sample["errors"] += [f"{of}: {result['error']}" if of else result["error"]] if "error" in result else []
            sample["strips"].append({"name": of, "images": _images(result, record, place, link)})
    return samples.values()


def _joined(*words):
    return ", ".join(filter(None, words))


def _state(count, failed, asked):
    """In a sentence, what became of the samples: how many there are, of these failed, and were asked for."""
    missing = f"; {asked - count} of {asked} are missing, as the run has not ended" if count < asked else ""
    return f"{failed} of {count} samples failed{missing}." if failed or missing else "All samples are complete."


def _names(records):
    """What tells the runs apart: the settings that differ, or a number."""
    keys = [key for key in records[0]["settings"] if key not in SAME]
    values = {key: [record["settings"].get(key) for record in records] for key in keys}
    differing = [key for key in keys if len({str(value) for value in values[key]}) > 1]
    # What only one of two methods has says no more than the method.
    differing = [key for key in differing if None not in values[key]] or differing
    names = [
        ", ".join(
            [f"{key} {record['settings'][key]}" for key in differing if record["settings"].get(key) is not None]
            + [f"sweep of {name}" for name in record["settings"].get("sweep", ())]
        )
        for record in records
    ]
    return [name if name and names.count(name) == 1 else f"run {i + 1} {name}".strip() for i, name in enumerate(names)]


def _how(record):
    """The machine, the model and the command line of a run."""
    about = {**record["environment"], "model": record["model"]["name"], "begun": record["begun"]}
    return {
        "environment": ", ".join(f"{name} {value}" for name, value in about.items()),
        "command": record.get("command"),
    }


def _images(result, record, place, link):
    """A sample's images, in order, with what the page says of them; none of one that failed."""
    if "error" in result:
        return []
    names = ["srds_initialized", *(f"srds_iteration_{i}" for i in range(len(result["iterations"]) - 1))]
    stages = [
        (utils.stage_name(entry["iteration"]), file, utils.facts(entry))
        for entry, file in zip(result["iterations"], names)
    ]
    if result["seconds"]["ground_truth"] is not None:
        stages.append(("ground truth", "srds_ddim_gt", []))
    images, size = [], {name: utils.settings_of(result, record)[name] for name in ("width", "height")}
    for title, file, facts in stages:
        path = os.path.join(place, result["folder"], f"{file}.png")
        source = quote(Path(path).as_posix()) if link else _embedded(path)
        images.append({"name": title, "src": source, "facts": ", ".join(facts), **size})
    return images


def _embedded(path):
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def _plain(value):
    """What a row has, without control characters; "" for None."""
    return "" if value is None else in_one_line(value, 4000) if isinstance(value, str) else value


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]


def _results(folder, record):
    """A run's results, with those of sets that a run which was killed has not come to record."""
    found = {result["folder"]: result for result in record["prompts"]}
    for name in record["folders"]:
        entry = read_set(folder / name / "result.json")
        if entry.get("complete") and entry["run"] == record["run"]:
            found.setdefault(name, entry["result"])
    return [found[name] for name in record["folders"] if name in found]


def main(argv=None):
    """Write the page that compares runs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output directories of runs")
    parser.add_argument("-o", "--output", default="compare.html", metavar="FILE", help="the page (%(default)s)")
    parser.add_argument("--link", action="store_true", help="leave images where they are, in place of embedding them")
    args = parser.parse_args(argv)
    try:
        if Path(args.output).suffix != ".html":
            raise Failure(f"argument --output: {args.output} is no page; give a name that ends in .html")
        runs = []
        for folder in args.folders:
            record = read_run(Path(folder) / "run.json")
            if not record:
                raise Failure(f"{folder} holds no whole record of a run; give its output directory")
            record["prompts"] = _results(Path(folder), record)
            beside = os.path.relpath(folder, Path(args.output).parent)
            runs.append((record, beside if args.link else folder))
        Path(args.output).write_text(page(runs, args.link), encoding="utf-8")
    except (Failure, OSError) as error:
        print(f"study.report: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
