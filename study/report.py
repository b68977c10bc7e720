"""Write the page of a run, or of several side by side: one HTML file that opens without a server.

python -m study.report DIR [DIR ...] -o compare.html
"""

import argparse
import base64
import os
import sys
from pathlib import Path

import jinja2
import pandas as pd

import utils
from settings import Failure, in_one_line
from study.folder import load_samples, read_file, read_run, read_sample, replace_file
from study.plots import plots
from study.results import MADE_ON, MEASURED, by_setting, last_rows, results_rows, settings_of, varied


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
