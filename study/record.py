"""The record of a run: which files are whole, and what a later run may keep.

Every file is whole or not there.
"""

import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

import utils
from settings import Failure, SettingError

SHOWN, ROWS = 64, 16  # prompts in an overview's pictures, and in its filmstrip
# What Record writes, beside run.json.
OURS = re.compile(
    r"([0-9]{3,}-[a-z0-9-]+/)?((srds|trajectory)_[a-z0-9_]+\.(png|csv)|result\.json|trajectory\.safetensors)"
)
KEPT = "trajectory.safetensors"
# Settings that may differ in a run that resumes another: results depend on them by rounding at most.
NOT_COMPARED = ("output_dir", "prompts", "prompt", "parallel", "device", "offload")


class WriteError(Failure):
    """A file that could not be written, in one line."""


class Record:
    """The output directory.

    A prompt's set of files ends with its `result.json`, which lists them and alone says that the set is complete.
    `run.json` describes the run, repeats the results at its end, and tells a later run what to remove.

    folder: the directory, made if it is not there.
    about: what `run.json` says of the run: when it was "begun", "settings", "environment", "model", and "plan".
    texts: the prompts. Several have a folder each, and an overview at the top.
    """

    def __init__(self, folder, about, texts):
        self.folder, self.about, self.texts = Path(folder), about, texts
        self.folders = [""] if len(texts) == 1 else [folder_name(i, text) for i, text in enumerate(texts)]

    def begin(self, resume=False):
        """Make the directory, and remove what an earlier run wrote there unless told to `resume` that one."""
        if not resume:
            _remove_earlier(self.folder)
        try:
            for folder, entry in zip(self.folders, self._entries()):
                if entry and (not resume or _failed(entry)):  # it is to be sampled again
                    (self.folder / folder / "result.json").unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"{self.folder} cannot be written: {error.strerror}") from error
        self.save()

    def entry(self, i):
        """The `result.json` of prompt i, None where its set is not complete."""
        found = _read_json(self.folder / self.folders[i] / "result.json")
        return found if self._is_whole(found) else None

    def add(self, i, result, images, errors=None, trajectory=None):
        """Write the set of prompt i.

        result: its entry in `run.json`; "folder" is added here.
        images: uint8 (height, width, 3) by file name without ".png".
        errors: L2 norms of the difference to the ground truth, (refinements + 1, B); None without ground truth.
        trajectory: a `refinement.Trajectory` to keep, or None.
        """
        folder = self.folders[i]
        kept = [_path(folder, KEPT)] if trajectory else []
        entry = {"complete": False, "files": [], "result": {**result, "folder": folder}, "errors": errors}

        def announce(files):
            # Named before they are written: a run that is cut short leaves nothing that the next one does not know.
            entry["files"] = [*files, *kept, _path(folder, "result.json")]
            self._write(_path(folder, "result.json"), entry)

        self._save_set(folder, [entry], lambda entry: images.__getitem__, announce)
        if trajectory:
            write(self.folder / folder / KEPT, trajectory.packed())
        self._write(_path(folder, "result.json"), {**entry, "complete": True})

    def fail(self, i, seed, error):
        """Note that prompt i failed, and why."""
        result = {"prompt": self.texts[i], "seed": seed, "error": error, "folder": self.folders[i]}
        name = _path(self.folders[i], "result.json")
        self._write(name, {"complete": False, "files": [name], "result": result, "errors": None})

    def finish(self):
        """Write the overview of several prompts, and `run.json` with all results; returns the results."""
        entries, overview = list(filter(None, map(self.entry, range(len(self.texts))))), []

        def announce(files):
            overview.extend(files)
            self.save(overview)

        if len(self.texts) > 1 and entries:
            try:
                self._save_set("", entries, self._saved_images, announce)
            except FileNotFoundError as error:
                raise WriteError(f"{error.filename} is gone") from error
        return self.save(overview)

    def save(self, files=()):
        """Write `run.json` with the results so far and what is in the directory; returns the results."""
        entries = self._entries()
        results = self.results(entries)
        files = [*files, *(name for entry in entries for name in entry.get("files", ()))]
        self._write("run.json", {**self.about, "folders": self.folders, "prompts": results, "files": files})
        return results

    def results(self, entries=None):
        """What there is of each prompt that is complete or failed, in their order; of `entries`, if they are known."""
        entries = self._entries() if entries is None else entries
        return [entry["result"] for entry in entries if self._is_whole(entry) or _failed(entry)]

    def _is_whole(self, entry):
        return entry.get("complete") and all((self.folder / name).is_file() for name in entry["files"])

    def _entries(self):
        return [_read_json(self.folder / folder / "result.json") for folder in self.folders]

    def _write(self, name, content):
        write(self.folder / name, (json.dumps(content, indent=2) + "\n").encode())

    def _saved_images(self, entry):
        folder = self.folder / entry["result"]["folder"]
        return lambda name: np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))

    def _save_set(self, folder, entries, images_of, announce):
        """Write the pictures, table and plot of `entries`, with one cell a prompt, into one folder.

        images_of(entry) gives a function from a file's name to its image; announce(files) is called before any is
        written.
        """
        results, errors = [entry["result"] for entry in entries], [entry["errors"] for entry in entries]
        longest = max(len(result["iterations"]) for result in results) - 1
        truth = errors[0] is not None
        names = ["srds_initialized", *(f"srds_iteration_{i}" for i in range(longest)), "srds_final"]
        names += ["srds_ddim_gt", "srds_ddim_course"] if truth else []
        table = ["trajectory_errors_table.csv", "trajectory_errors_plot.png"] if truth else []
        announce([_path(folder, name) for name in [*(f"{name}.png" for name in names), "srds_filmstrip.png", *table]])

        def images(name, most=SHOWN):
            return [images_of(entry)(utils.stage(name, entry["result"])) for entry in entries[:most]]

        path, text = self.folder / folder, self._png_text(results[:SHOWN])
        strip = utils.filmstrip(results[:ROWS], lambda name: images(name, ROWS), names, self._steps)
        write(path / "srds_filmstrip.png", utils.png(strip, text))
        for name in names:
            write(path / f"{name}.png", utils.png(utils.mosaic(images(name)), text))
        if truth:
            together = utils.combine_errors([np.asarray(error) for error in errors])
            write(path / table[0], utils.error_table(together).encode())
            write(path / table[1], utils.error_plot(together, results, self._steps))

    @property
    def _steps(self):
        return self.about["settings"]["fine_steps"]

    def _png_text(self, results):
        return {
            "prompt": "\n".join(result["prompt"] for result in results),
            "seed": str(results[0]["seed"]),
            "settings": json.dumps(self.about["settings"]),
        }


def earlier_run(folder):
    """The `run.json` of an earlier run; empty where there is none."""
    return _read_json(Path(folder) / "run.json")


def check_resumable(folder, settings, texts):
    """The earlier run in a folder, empty if there is none. Raises SettingError unless it is one of the same.

    settings: as `run.json` will have them, but for "dtype", resolved here. Where they are planned ("auto"), the earlier
    run's plan stands for them.
    """
    earlier = earlier_run(folder)
    if not earlier:
        return {}
    try:
        before, plan = {**earlier["settings"], "dtype": earlier["environment"]["dtype"]}, earlier.get("plan")
        before.setdefault("method", "srds")
        now = dict(settings)
        if plan and now["coarse_steps"] == "auto":
            now |= {"coarse_steps": plan["blocks"], "schedule": plan["schedule"]}
        earlier_texts = earlier["texts"]
    except (KeyError, TypeError):
        raise SettingError("resume", True, f"finds no run that can be resumed in {folder}/run.json") from None
    free = NOT_COMPARED if now["fixed_batch"] else (*NOT_COMPARED, "max_batch", "compile")
    for key, value in now.items():
        # What a version before did not know, it did not do.
        earlier_value = before.get(key, value and None)
        if key not in free and earlier_value != value:
            has = "none" if earlier_value is None else repr(earlier_value)
            remedy = f"differs from the run to resume, which has {has}; give the same, or leave out --resume"
            raise SettingError(key, value, remedy)
    if earlier_texts != texts:
        remedy = "finds other prompts in the earlier run; give the same, or leave out --resume"
        raise SettingError("resume", True, remedy)
    return earlier


def _read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there, or not ours
    return found if isinstance(found, dict) else {}


def _failed(entry):
    return "error" in entry.get("result", ())


def _path(folder, name):
    return Path(folder, name).as_posix()


def _remove_earlier(folder):
    record = earlier_run(folder)
    try:
        entries = [_read_json(folder / name / "result.json") for name in record.get("folders", ())]
        named = [name for entry in [record, *entries] for name in entry.get("files", ())]
        files = [name for name in dict.fromkeys(named) if OURS.fullmatch(name)]
    except TypeError:
        return  # a run.json that is not ours
    for name in files:
        try:
            (folder / name).unlink(missing_ok=True)
            _part(folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"{folder / name}, of an earlier run, cannot be removed: {error.strerror}") from error
    for name in {Path(name).parent for name in files if "/" in name}:
        try:
            (folder / name).rmdir()
        except OSError:
            pass  # it holds something that is not ours, or is gone already


def folder_name(index, prompt):
    """A prompt's folder: its number and first words, in ASCII that every file system takes, at most 80 characters."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", plain)[:8] or ["prompt"]
    return f"{index:03d}-{'-'.join(words)}"[:80].rstrip("-")


def write(path, data):
    """Write bytes to `path`, whole or not at all, making its folder in one that is there. Raises WriteError."""
    part = _part(path)
    try:
        path.parent.mkdir(exist_ok=True)  # not its parents: an output directory removed in mid-run stays removed
        try:
            part.write_bytes(data)
            with part.open("r+b") as file:
                os.fsync(file.fileno())  # or a machine that crashes may keep the name and lose what is in it
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}") from error


def _part(path):
    """Where a file is written before it has its name."""
    return path.with_name(f".{path.name}.part")
