"""The record of a run: which sets of files are whole, what made them, and what becomes of an earlier run's."""

import contextlib
import itertools
import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

import utils
from study.comparison import OTHER_PROMPTS, is_whole
from study.directory import WriteError, checksum, name_of, pack, read_run, read_set, reporting, stage, write
from study.earlier import Earlier
from study.report import page
from study.results import results_table

SHOWN, ROWS = 64, 16  # prompts in an overview's pictures, and in its filmstrip
KEPT = "trajectory.safetensors"


class Record:
    """The output directory, as this run writes it.

    A prompt's set of files ends with its `result.json`, which has their sizes and checksums and what they were made by,
    and alone says that the set is complete. `run.json` describes the run, and repeats the results at its end.

    folder: the directory, which is there. about: what `run.json` says of the run: its "run", an id, when it was
    "begun", "settings", "environment", "model", and "plans". folders: of the prompts, in it; several have one each, and
    an overview at the top. made_by: as of `comparison.compare`; earlier, difference: the names of files, and what else
    it returns. varied: what results say of the settings that differ in a sweep, which the samples take in turn.
    overwrite: to remove an earlier run of other results in place of setting it aside. report: to write the page at the
    end. takes_over: whether this process is the one to set aside or remove; another one returns False when it is done.
    """

    def __init__(
        self, folder, about, folders, made_by, earlier=(), difference=None, *, varied=({},), overwrite=False,
        report=True, takes_over=lambda: True,
    ):  # fmt: skip
        self.folder, self.about, self.folders = Path(folder), about, folders
        self.made_by, self.earlier, self.difference, self.varied = made_by, earlier, difference, varied
        self.overwrite, self.report, self.takes_over = overwrite, report, takes_over
        self.failures, self.seen = {}, False

    @property
    def begun(self):
        """Whether this run has written its `run.json`, by whichever process."""
        self.seen = self.seen or read_run(self.folder / "run.json").get("run") == self.about["run"]
        return self.seen

    def begin(self):
        """Write `run.json`, in place of an earlier one of the same results."""
        self._write(read_run(self.folder / "run.json").get("overview", {}))

    def entry(self, i):
        """What `result.json` says of prompt i, None where its set is not complete or not of this run."""
        return self._own(i, self._read(i))

    def add(self, i, result, images, errors=None, trajectory=None):
        """Write the set of prompt i, all of it or nothing; the first one begins the run.

        result: its entry in `run.json`; "folder" is added here. images: uint8 (height, width, 3) by file name without
        ".png". errors: L2 norms of the difference to the ground truth, (refinements + 1, B); None without ground truth.
        trajectory: a `refinement.Trajectory` to keep, or None.

        Returns what became of an earlier run of other results, a line, where that was the first; else None.
        """
        folder = self.folders[i]
        entry = {"result": self._result(i, result), "errors": errors, "made_by": self.made_by[i]}
        entry |= {"run": self.about["run"], "begun": self.about["begun"]}

        def announce(files, complete=False):
            content = pack({"complete": complete, "files": files, **entry})
            write(self.folder / folder / "result.json", content, self.about["run"])

        with self._staged(folder) as stage_one:
            self._render(stage_one, [entry], lambda entry: images.__getitem__)
            if trajectory:
                stage_one(KEPT, trajectory.packed())
            said = self._take_over()
            before = dict.fromkeys(self._left(folder)) | self._read(i).get("files", {})
            files = self._publish(folder, stage_one.parts, before, announce)
            announce(files, complete=True)
        return said

    def fail(self, i, seed, error):
        """Note that prompt i failed, and why."""
        self.failures[i] = self._result(i, {"prompt": self.made_by[i]["text"], "seed": seed, "error": error})

    def finish(self):
        """Write the overview of several prompts, and `run.json` with all results; returns the results."""
        entries = [self.entry(i) for i in range(len(self.folders))]
        for i, entry in enumerate(entries):
            if not entry and i not in self.failures:
                self.fail(i, self.made_by[i]["seed"], "its files are gone")
        entries = [entry for i, entry in enumerate(entries) if entry and i not in self.failures]
        results = self.save()
        if not self.begun:
            return results
        with self._staged("") as stage_one:
            if entries and len(self.folders) > 1:
                self._render(stage_one, entries, self._saved_images, alike=not self.about["settings"].get("sweep"))
            stage_one("results.csv", results_table(results, self.about).encode())
            if self.report:
                stage_one("report.html", page([({**self.about, "prompts": results}, "")]).encode())
            of_a_set = read_set(self.folder / "result.json").get("files", ())
            left = dict.fromkeys(name for name in self._left("") if name not in of_a_set)
            before = left | read_run(self.folder / "run.json").get("overview", {})
            overview = self._publish("", stage_one.parts, before, self.save)
        return self.save(overview)

    def save(self, overview=None):
        """Write `run.json` with the results so far, once the run has begun; returns them.

        overview: sizes and checksums of the files that show all prompts, by name; None: as it has them.
        """
        if not self.begun:
            return self.results()
        return self._write(read_run(self.folder / "run.json").get("overview", {}) if overview is None else overview)

    def _write(self, overview):
        found = [self._read(i) for i in range(len(self.folders))]
        sets = [(name, own["files"]) for name, own in zip(self.folders, found) if own.get("files")]
        files = [name_of(name, file) for name, own in sets for file in (*own, "result.json")]
        files = [*overview, *files, *(name for name in self.earlier if name != "run.json")]
        files = [name for name in dict.fromkeys(files) if name in overview or os.path.lexists(self.folder / name)]
        first, *others = self.made_by
        common = {key: value for key, value in first.items() if all(value == made.get(key) for made in others)}
        each = [{key: made[key] for key in made.keys() - common.keys()} for made in self.made_by]
        results = self.results(found)
        record = {"folders": self.folders, "prompts": results, "overview": overview, "files": files}
        record["made_by"] = {"common": common, "each": dict(zip(self.folders, each))}
        write(self.folder / "run.json", pack({**self.about, **record}), self.about["run"])
        return results

    def results(self, found=None):
        """What there is of each prompt that is complete or failed, in their order; of `found`, if each was read."""
        found = [self._read(i) for i in range(len(self.folders))] if found is None else found
        own = ((i, self._own(i, each)) for i, each in enumerate(found) if i not in self.failures)
        results = {i: entry["result"] for i, entry in own if entry} | self.failures
        return [results[i] for i in sorted(results)]

    def _read(self, i):
        return read_set(self.folder / self.folders[i] / "result.json")

    def _own(self, i, found):
        """What was read of prompt i, if it is of this run and its set is complete; else None."""
        if found.get("made_by") != self.made_by[i] or not is_whole(self.folder, self.folders[i], found):
            return None
        return {**found, "result": self._result(i, found["result"])}

    def _result(self, i, result):
        """A result with what tells it from the others in this run; an earlier one may have had fewer of them."""
        known = {key: value for key, value in result.items() if key not in ("setting", "settings", "folder")}
        return {**known, **self.varied[i % len(self.varied)], "folder": self.folders[i]}

    def _take_over(self):
        """Begin the run, unless it has begun; see `add`."""
        said = None
        if not self.begun and self.takes_over():
            earlier = Earlier.find(self.folder)
            if self.difference and self.overwrite:
                earlier.remove()
            elif self.difference and earlier.files:
                name, now, before = self.difference
                others = self.difference == OTHER_PROMPTS
                had = "other prompts or settings" if others else f"{name} {before!r}, not {now!r},"
                place = self.folder / earlier.set_aside(self.about["run"])
                said = f"the earlier run of {self.folder} had {had} and is now in {place}"
            self.begin()
        return said

    @contextlib.contextmanager
    def _staged(self, folder):
        """A function that stages a file for a folder, by its name and bytes; what is left staged is removed."""

        def stage_one(name, data):
            part = stage(self.folder / folder / name, data, self.about["run"])
            stage_one.parts[name] = part, [len(data), checksum(data)]

        stage_one.parts = {}
        try:
            yield stage_one
        finally:
            for part, _ in stage_one.parts.values():
                part.unlink(missing_ok=True)
            if folder:
                with contextlib.suppress(OSError):
                    (self.folder / folder).rmdir()  # where nothing came into it

    def _left(self, folder):
        """Names of files in a folder that an earlier run's records tell of."""
        paths = [Path(name) for name in self.earlier if Path(name).parent == Path(folder)]
        return [path.name for path in paths if path.suffix != ".json" and os.path.lexists(self.folder / path)]

    def _publish(self, folder, parts, before, announce):
        """Give staged files their names, in place of those before; returns their sizes and checksums by name.

        announce: is called with the names of both sets before any is touched, so that whoever comes after a kill knows
        them.
        """
        files = {name: facts for name, (_, facts) in parts.items()}
        announce({**before, **files})
        for name in before.keys() - files.keys():
            with reporting(self.folder / folder / name, "of an earlier run, cannot be removed"):
                (self.folder / folder / name).unlink(missing_ok=True)
        for name, (part, _) in parts.items():
            path = self.folder / folder / name
            if name not in before and os.path.lexists(path):
                raise WriteError(f"{path} cannot be written: it is there, and is not of this run")
            with reporting(path):
                os.replace(part, path)
        return files

    def _saved_images(self, entry):
        folder = self.folder / entry["result"]["folder"]
        return lambda name: np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))

    def _render(self, stage_one, entries, images_of, alike=True):
        """Stage the pictures, table and plot of `entries`, with one cell a sample.

        images_of(entry) gives a function from a file's name to its image. alike: whether all have the same settings;
        samples of several have no common size, steps or boundaries, and are shown by the filmstrip alone.
        """
        results, errors = [entry["result"] for entry in entries], [entry["errors"] for entry in entries]
        longest = max(len(result["iterations"]) for result in results) - 1
        truth = errors[0] is not None
        names = ["srds_initialized", *(f"srds_iteration_{i}" for i in range(longest)), "srds_final"]
        names += ["srds_ddim_gt", "srds_ddim_course"] if truth else []

        def images(name, most=SHOWN):
            return [images_of(entry)(utils.stage(name, entry["result"])) for entry in entries[:most]]

        text = self._png_text(results[:SHOWN])
        strip = utils.filmstrip(results[:ROWS], lambda name: images(name, ROWS), names, self.about)
        stage_one("srds_filmstrip.png", utils.png(strip, text))
        if not alike:
            return
        for name in names:
            stage_one(f"{name}.png", utils.png(utils.mosaic(images(name)), text))
        if truth:
            together = utils.combine_errors([np.asarray(error) for error in errors])
            stage_one("trajectory_errors_table.csv", utils.error_table(together).encode())
            steps = utils.settings_of(results[0], self.about)["fine_steps"]
            stage_one("trajectory_errors_plot.png", utils.error_plot(together, results, steps))

    def _png_text(self, results):
        """What an image says of itself; of one sample also as the web UIs for Stable Diffusion read it."""
        settings = utils.settings_of(results[0], self.about) if len(results) == 1 else self.about["settings"]
        prompts = [prompt[: utils.MOST_TEXT] for prompt in (settings.get("prompt") or [])[:SHOWN]]
        found = {
            "prompt": "\n".join(result["prompt"][: utils.MOST_TEXT] for result in results),
            "seed": str(results[0]["seed"]),
            "settings": json.dumps(settings | ({"prompt": prompts} if prompts else {})),
        }
        return found | ({"parameters": utils.parameters(results[0], self.about)} if len(results) == 1 else {})


def folder_names(texts, seeds=None, settings=("",)):
    """The folder of each sample, with its seed where there are several, and its settings, which are taken in turn.

    A single sample has none of its own.
    """
    if len(texts) == 1:
        return [""]
    names = [folder_name(i, text) for i, text in enumerate(texts)]
    names = [f"{name}-seed-{seed}" for name, seed in zip(names, seeds)] if seeds else names
    return ["-".join([name, *_words(setting, 60)]) for name, setting in zip(names, itertools.cycle(settings))]


def folder_name(index, prompt):
    """A prompt's folder: its number and first words, in ASCII that every file system takes, at most 80 characters."""
    return "-".join([f"{index:03d}", *(_words(prompt, 76)[:8] or ["prompt"])])[:80].rstrip("-")


def _words(text, most):
    """Words in lower-case ASCII, of so many characters in all."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.findall(r"[a-z0-9]+", "-".join(re.findall(r"[a-z0-9]+", plain))[:most])
