"""The overview of a command's samples: printed lines, `run.json`, and the pictures, table and page."""

import functools
import io
import itertools
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np
from PIL import Image
from tqdm import tqdm

import utils
from diffusion import boundaries
from models.loading import MIRRORS
from settings import ROWS, Failure, in_one_line, words_of
from srds import rehearsal
from study.folder import FileError, load_samples, pack, read_file, read_sample
from study.key import VERSIONS, first_difference, folder_name, recorded, stem
from study.report import page, sweep
from study.results import results_table, summary

LISTED = 10  # samples that a dry run names, and refinements whose evaluations it counts


def foreseen(settings, started):
    """Return a line that says how many evaluations a sample takes, as far as that is known without the network.

    settings: those of the sample, resolved. started: whether it starts from a trajectory.
    """
    N, B = settings.fine_steps, settings.coarse_steps
    if settings.method == "srds":
        iterates = rehearsal(boundaries(N, B), settings.schedule, settings.max_iterations, started)
        counts = [f"{each.k}: {each.ticks} ({each.lane_steps})" for each in itertools.islice(iterates, LISTED + 1)]
        what = f"B = {B}, {settings.schedule}: k = {', '.join(counts)}"
    else:
        M = settings.nodes and min(settings.nodes, N)
        once = f"k = 0: {M} ({M}), " * bool(M and settings.window == 1 and not started)  # at each node
        what = f"M = {M or ROWS['nodes'].metadata['usual']}: {once}in the end at most {N}"
    return f"serial (total) evaluations of {settings.method}, N = {N}, {what}; of sequential sampling: {N}"


def files_of(record, images, trajectory):
    """Return the files of a sample's folder, bytes by name, for what `study.sampling.sample` returns."""
    files = utils.pictures([record], lambda record, name: utils.sheet(images[name]))
    if len(utils.frames(images["srds_final"])) > 1:
        files["srds_final.webp"] = utils.animation(images["srds_final"], 125)
    else:
        texts = utils.captions(record)
        frames = utils.captioned([utils.sheet(images[name]) for name in texts], texts.values())
        files["srds_refinements.webp"] = utils.animation(frames, 1000)
    if trajectory:
        files["trajectory.safetensors"] = trajectory.packed()
    return files | {"result.json": pack({**record, "files": {name: len(data) for name, data in files.items()}})}


class Overview:
    """The overview of the samples of a `main.Command`, `study.key.Task`s, in a `study.folder.Folder`."""

    def __init__(self, command, bench, folder, tasks):
        self.command, self.bench, self.folder, self.tasks = command, bench, folder, tasks
        self.processes, self.errors, self.spoken_of = bench.processes, {}, None
        self.begun = datetime.now(UTC).isoformat(timespec="seconds")

    # Before sampling

    def begin(self):
        """Print what will run, load the model if a sample is left, and write `run.json`; for a dry run, only print.

        Returns the tasks that are left, grouped by prompt and seed: a list of lists; None for a dry run.
        """
        again, distinct = self.command.experiment.again, {task.folder: task for task in self.tasks}
        here = self.processes.first
        left = [name for name, task in distinct.items() if here and (not self.folder.has(task) or again)]
        left = [distinct[name] for name in self.processes.broadcast(left)]
        self._introduce(len(distinct) - len(left), [] if again else left)
        names = [*enumerate(utils.names_of([task.made_by for task in self.tasks], 60), 1)]
        self.titles = {task.folder: f"sample {i} of {len(names)}: {name}" for task, (i, name) in zip(self.tasks, names)}
        if self.command.experiment.dry_run:
            lines = [f"{title}\n  samples/{folder}" for folder, title in self.titles.items()][:LISTED]
            lines += dict.fromkeys(foreseen(settings, self.bench.starts) for settings, _ in self.bench.variants)
            lines += ["fewer if strength leaves out steps"] * ("strength" in self.bench.model.parameters)
            return print(*lines, sep="\n")
        if left:
            self.bench.warm(left[0].settings, left[0].arguments)
        if here:
            self.folder.write("run.json", pack(self._record()))
        return [[*group] for _, group in itertools.groupby(left, lambda task: (task.text, task.seed))]

    def _introduce(self, there, made_anew):
        """Print what will run; `there` counts the samples that are reused, `made_anew` has the other tasks."""
        command, bench, made, count = self.command, self.bench, self.tasks[0].made_by, len(self.tasks)
        if bench.model.name == MIRRORS.get(command.loading.model):
            print(f"{command.loading.model} was withdrawn from the hub; using its mirror {bench.model.name}")
        if bench.model.unused:
            print(f"note: the scheduler's {bench.model.unused} will not be used; timesteps have trailing spacing")
        for note in command.notes:
            print(note)
        srds = [f"B = {made['coarse_steps']}", made["correction"], made["schedule"]] * (made["method"] == "srds")
        words = [made["method"], made["solver"], f"N = {made['fine_steps']}", *srds]
        place = f"on {in_one_line(command.loading.model)} ({bench.device}, {bench.dtype})"
        swept = ", ".join(":".join(axis[0]) for axis in command.axes)
        varied = f"; sweep of {swept}: {len(command.variants)} settings" if swept else ""
        print(f"{', '.join(words)}, tolerance {made['tolerance']:g} {place}{varied}")
        if not bench.model.prompted and len(command.texts) > 1:
            print(f"{in_one_line(bench.model.name)} reads no prompts: seeds rise from {made['seed']}, one a line")
        if there:
            print(f"{there} of {count} samples are there already")
        read = functools.cache(lambda name: read_sample(self.folder.samples, name))
        for reason, some in Counter(filter(None, (self._other(task, read) for task in made_anew))).items():
            print(f"{some} of {count} samples must be made again: those in the directory have {reason}")

    def _other(self, task, read):
        """Return how the nearest sample of a task's prompt and seed in the folder differs from it; "" for none."""
        places = self.folder.samples.glob(f"{stem(task.text, task.seed)}-????????")
        records = [read(place.name) for place in itertools.islice(places, 100)]
        found = [record["made_by"] for record in records if record and record["made_by"] != task.made_by]
        found = [made for made in found if made["prompt"] == task.text]
        differing = lambda made: sum(made.get(name) != value for name, value in task.made_by.items())
        return first_difference(task.made_by, min(found, key=differing)) if found else ""

    def _record(self):
        """Return the content of `run.json`."""
        command, bench = self.command, self.bench
        used = [asdict(task.settings) | {"seed": task.seed} | recorded(task.arguments) for task in self.tasks]
        values = lambda name: ", ".join(dict.fromkeys(str(each.get(name)) for each in used))
        settings = {name: values(name) for name in dict.fromkeys(itertools.chain(*used))}
        settings |= asdict(command.loading) | asdict(command.experiment)
        return {
            "begun": self.begun, "command": shlex.join(["python", "main.py", *command.argv]),
            "reproduce": self._reproduce(),
            "settings": {name: in_one_line(value, 1000) for name, value in settings.items()},
            "environment": {"model": bench.model.title, "device": str(bench.device), "dtype": bench.dtype,
                            "processes": str(bench.processes.size), "python": sys.version.split()[0], **VERSIONS},
            "samples": [{"prompt": task.text, "seed": task.seed, "folder": task.folder, "settings": each,
                         "error": self.errors.get(task.folder)} for task, each in zip(self.tasks, used)],
        }  # fmt: skip

    def _reproduce(self):
        """Return a command line that makes the same samples whatever the defaults are: all values are flags."""
        # The texts, as a file can be edited.
        given = self.command.given | dict.fromkeys(("prompts", "config", "again")) | {"prompt": (*self.command.texts,)}
        swept = {name for axis in self.command.axes for name in axis[0]} | ({"seed"} if self.command.seeds else set())
        swept |= self.command.call.keys()
        for name in ("coarse_steps", "guidance_scale"):  # as used: the default may be reduced, or the model's own
            used = {getattr(task.settings, name, task.arguments.get(name)) for task in self.tasks}
            given[name] = used.pop() if len(used) == 1 else given.get(name)
        values = {name: given.get(name, each.default) for name, each in ROWS.items() if name not in swept}
        return shlex.join(["python", "main.py", *words_of(values)])

    # While sampling

    def say(self, task, *lines):
        """Print lines about a sample, below its title."""
        title = [self.titles[task.folder]] * (self.spoken_of is not task)
        self.spoken_of = task
        tqdm.write("\n".join([*title, *lines]))

    def failed(self, task, message):
        """Print and record why a sample failed."""
        self.say(task, f"  failed: {message}")
        self.processes.store.set(f"failed/{task.folder}", message)

    # After sampling

    def end(self):
        """Write the overview of all samples that are there, and print the closing tables, in the first process.

        Raises Failure if a sample failed, or is no longer there.
        """
        if not self.processes.first:
            return
        self.errors = {task.folder: self.processes.heard(f"failed/{task.folder}") for task in self.tasks}
        run = self._record()
        self.folder.write("run.json", pack(run))  # now, as the rest may fail, and last, as others may end too
        samples = load_samples(self.folder.path, run)
        self.folder.show({**self._shown(run, samples), "run.json": pack(run)})
        print(summary(samples))
        failed = [said for said, record in samples if not record]
        if failed:
            what = f"{len(failed)} of {len(samples)} samples failed"
            first = f"the first, of {in_one_line(failed[0]['prompt'], 40)!r}"
            raise Failure(f"{what}; {first}: {failed[0]['error'] or 'its folder is gone'}")

    def _shown(self, run, samples):
        """Return the pictures, the table and the page that show samples: bytes by name."""
        records = [record for _, record in samples if record]

        def image_of(record, name):
            place = f"samples/{folder_name(record['made_by'])}/{name}.png"
            try:
                return np.asarray(Image.open(io.BytesIO(read_file(self.folder.path, place))).convert("RGB"))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                remedy = "run the command again; if that does not help, remove its folder"
                raise FileError(f"{self.folder.path / place} cannot be read; {remedy}") from error

        settings = {str({**record["made_by"], "prompt": None, "seed": None, "start": None}) for record in records}
        kinds = dict.fromkeys(["png", self.command.experiment.plot_format])
        files = utils.pictures(records, image_of, len(settings) == 1, kinds) if records else {}
        animations = [name for name in records[0]["files"] if name.endswith(".webp")] if len(records) == 1 else ()
        for name in animations:
            files[name] = read_file(self.folder.path, f"samples/{folder_name(records[0]['made_by'])}/{name}")
        files |= sweep(samples, kinds)
        files["results.csv"] = results_table(samples).encode(errors="backslashreplace")
        if not self.command.experiment.no_report:
            files["report.html"] = page([(run, samples, "")]).encode(errors="backslashreplace")
        return files
