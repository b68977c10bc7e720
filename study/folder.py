"""An output directory: a folder for each sample, complete or absent, and files that show the last command's samples.

A sample's files are written into `samples/.part-.../` and synced; then that folder is renamed, as one, to its place.
A command that is killed before leaves no half sample. All other files are replaced one by one, each as a whole.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import stat
import time
from dataclasses import fields
from pathlib import Path
from types import NoneType

from settings import Failure, SettingError, Settings
from study.key import folder_name

PICTURES = (r"srds_(initialized|iteration_[0-9]+|final|filmstrip|ddim_gt|ddim_course)\.png"
            r"|srds_final\.webp|trajectory_errors_plot\.png|trajectory_errors_table\.csv")  # fmt: skip
IN_A_SAMPLE = re.compile(rf"{PICTURES}|trajectory\.safetensors|result\.json")
AT_THE_TOP = re.compile(rf"{PICTURES}|results\.csv|report\.html|run\.json")
PART = ".part-"  # the names of unfinished files and folders begin with this
STALE = 3600  # seconds after which an unfinished file or folder is taken to be a killed command's

# The shapes of `result.json` and `run.json`, see `fits`.
NUMBER, MAYBE = (int, float), (int, float, NoneType)
REFINEMENT = {
    **dict.fromkeys("k serial_evaluations total_evaluations network_calls widest_tick".split(), int),
    **dict.fromkeys("peak_memory_mib difference psnr ssim image_change trajectory_change predicted_change "
                    "clip_score clip_difference".split(), MAYBE),
    "verdict": str, "settled": bool, "seconds": NUMBER, "damping": NUMBER,
}  # fmt: skip
RESULT = {
    **dict.fromkeys("model device sampled ignored stop_reason".split(), str),
    "size": [int], "steps": int, "sequential_seconds": MAYBE, "refinements": [REFINEMENT],
    "errors": ([[NUMBER]], NoneType),
}  # fmt: skip
PLAIN = {str: (str, *MAYBE)}
MADE_BY = {"prompt": str, "ground_truth": bool, "dtype": str, "coarse_steps": int, "arguments": PLAIN, str: object}
SAMPLE = {"made_by": MADE_BY, "result": RESULT, "files": {str: int}}
ASKED = {"prompt": str, "seed": int, "folder": str, "settings": PLAIN, "error": (str, NoneType)}
RUN = {
    **dict.fromkeys("begun command reproduce".split(), str),
    "settings": {str: str}, "environment": {str: str}, "samples": [ASKED],
}  # fmt: skip


def fits(value, shape):
    """Return whether a JSON value has a shape; numbers must be finite and below 1e100.

    shape: a type; a tuple of shapes, of which one must fit; a list of the one shape that its items have; or a
    dictionary of shapes by name, in which the key `str` stands for all other names.
    """
    if isinstance(shape, tuple):
        return any(fits(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict) or shape.keys() - {str} - value.keys():
            return False
        return all(fits(each, shape.get(name, shape.get(str, ()))) for name, each in value.items())
    return isinstance(value, shape) and (not isinstance(value, NUMBER) or abs(value) < 1e100)


def read_file(root, name, most=2**30):
    """Return the bytes of a file in a folder that may come from others. Raises OSError and ValueError.

    It must be a regular file, of at most so many bytes, and neither a link nor beyond one.
    """
    path = Path(root, name)
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), *Path(name).parts):
        raise ValueError(f"{path} is a link or outside its folder")
    if not path.is_file() or path.stat().st_size > most:  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file of at most {most} bytes")
    return path.read_bytes()


def read_json(root, name, shape):
    """Return the content of a JSON file if it has a shape; None for anything else."""
    try:
        content = json.loads(read_file(root, name))
        return content if fits(content, shape) else None
    except (OSError, ValueError, RecursionError):
        return None


def read_sample(root, name):
    """Return the content of `result.json` in a sample's folder; None unless the folder is complete."""
    record = read_json(root, f"{name}/result.json", SAMPLE)
    try:
        if not record or not is_consistent(record):
            return None
        Settings(**{each.name: record["made_by"][each.name] for each in fields(Settings)})  # checks them
        for file, size in record["files"].items():
            facts = os.lstat(os.path.join(root, name, file))
            if not IN_A_SAMPLE.fullmatch(file) or not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
                return None
    except (OSError, KeyError, ValueError):
        return None
    return record


def is_consistent(record):
    """Return whether a record has k = 0, 1, ..., an image of each, and differences and errors for all or for none."""
    refinements, errors = record["result"]["refinements"], record["result"]["errors"]
    count, compared = len(refinements), errors is not None
    blocks = min(record["made_by"]["coarse_steps"], record["result"]["steps"])
    images = {"srds_initialized", "srds_final", *(f"srds_iteration_{k}" for k in range(1, count))}
    images |= {"srds_ddim_gt", "srds_ddim_course"} if compared else set()
    return (
        [entry["k"] for entry in refinements] == [*range(count)] != []
        and all((entry["difference"] is not None) == compared for entry in refinements)
        and (not compared or [len(row) for row in errors] == [blocks] * count)
        and {f"{image}.png" for image in images} <= record["files"].keys()
    )


def read_run(folder):
    """Return the content of `run.json` in an output directory; None if there is none of ours."""
    return read_json(folder, "run.json", RUN)


def load_samples(root, run):
    """Return the samples of a run: pairs of the entry in `run.json` and the record or None, see `study.results`."""
    read = lambda folder: read_sample(root, f"samples/{folder}")
    return [(said, None if said["error"] else read(said["folder"])) for said in run["samples"]]


def pack(content):
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


class WriteError(Failure):
    """A file that cannot be written, in one line."""


@contextlib.contextmanager
def reporting(path):
    """Turn the system's errors into a WriteError that names the path."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


class Folder:
    """An output directory, which is made when it is opened.

    path: with its links resolved when the object was made.
    """

    def __init__(self, path):
        self.given, self.path = path, Path(os.path.realpath(path))
        self.samples = self.path / "samples"

    def open(self):
        """Make the directory, and finish or remove what a killed command has left.

        Raises SettingError if it cannot be made or written to, or if it holds files with our names, but no run.json.
        """
        try:
            ours = sorted(path.name for path in self.path.glob("*") if AT_THE_TOP.fullmatch(path.name))
            if ours and not read_run(self.path):
                raise OSError(f"it holds {ours[0]}, but no run.json of this program")
            self.samples.mkdir(parents=True, exist_ok=True)
            if self.samples.is_symlink():
                raise OSError("its `samples` is a link")
            if not all(os.access(place, os.W_OK | os.X_OK) for place in (self.path, self.samples)):
                raise OSError("it is not writable")
        except OSError as error:
            remedy = f"cannot be used ({error.strerror or error}); give another directory, existing or new"
            raise SettingError("output_dir", self.given, remedy) from None
        unfinished = PART + 16 * "[0-9a-f]"
        for part in [*self.samples.glob(unfinished), *self.path.glob(unfinished)]:
            self._tidy(part)

    def _tidy(self, part, place=None, stale=STALE):
        """Put a complete folder in its place, if that is free; else remove it if it is `stale` seconds old.

        Files of others in it are moved to `place`, if that is given or known.
        """
        found = read_sample(part.parent, part.name) if part.is_dir() else None
        place = self.samples / folder_name(found["made_by"]) if found else place
        with contextlib.suppress(OSError):
            if found and not os.path.lexists(place):
                os.rename(part, place)
            elif time.time() - os.lstat(part).st_mtime >= stale:
                for file in os.listdir(part) if place and place.is_dir() else ():
                    if not IN_A_SAMPLE.fullmatch(file) and not os.path.lexists(place / file):
                        os.rename(part / file, place / file)
                discard(part)

    def read(self, name):
        """Return the record of the sample in a folder, see `read_sample`; None if it is not complete."""
        return read_sample(self.samples, name)

    def by_stem(self):
        """Return the names in `samples`, lists by what comes before the key, see `study.key.stem`."""
        names, stem = os.listdir(self.samples), lambda name: name[:-9]
        return {before: [*some] for before, some in itertools.groupby(sorted(names, key=stem), stem)}

    def has(self, task):
        """Return whether a `study.key.Task`'s sample is there. Raises WriteError if something else has its name."""
        found, place = self.read(task.folder), self.samples / task.folder
        if os.path.islink(place) or place.is_file() or (found and found["made_by"] != task.made_by):
            raise WriteError(f"{place} does not hold the sample of that name; move it elsewhere")
        return bool(found)

    def add(self, name, files, again=False):
        """Put a complete sample's folder in its place; files: bytes by name. Raises WriteError.

        If a complete one is there, it stays and the new one is dropped; with `again`, the new one replaces it. Other
        files in a folder that is replaced are kept.
        """
        part, replaced = self.samples / f"{PART}{secrets.token_hex(8)}", []
        with reporting(self.samples / name):
            os.mkdir(part)
            try:
                for file, data in files.items():
                    create(part / file, data)
                sync(part)
                while os.path.lexists(part):  # another command may find it complete, and put it in its place
                    try:
                        os.rename(part, self.samples / name)
                    except OSError as error:
                        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                            raise
                        if self.read(name) and not again:
                            break
                        replaced.append(self.samples / f"{PART}{secrets.token_hex(8)}")
                        with contextlib.suppress(FileNotFoundError):  # another command may replace it too
                            os.rename(self.samples / name, replaced[-1])
                sync(self.samples)
            finally:
                discard(part)
                for old in replaced:
                    self._tidy(old, self.samples / name, stale=0)

    def write(self, name, data):
        """Write a file at the top level, replacing an earlier one as a whole. Raises WriteError."""
        with reporting(self.path / name):
            replace_file(self.path / name, data)

    def show(self, files):
        """Write files at the top level, bytes by name, and remove the pictures and tables of an earlier command."""
        for name, data in files.items():
            self.write(name, data)
        for path in sorted(self.path.iterdir()):
            if AT_THE_TOP.fullmatch(path.name) and path.name not in {*files, "run.json"}:
                with reporting(path):
                    path.unlink(missing_ok=True)


def replace_file(path, data):
    """Write bytes to a file, replacing an earlier one as a whole. Raises OSError."""
    part = path.with_name(f"{PART}{secrets.token_hex(8)}")
    try:
        create(part, data)
        os.replace(part, path)
    finally:
        discard(part)


def create(path, data):
    """Write bytes to a new file and sync it to disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # otherwise, a crash may keep the name and lose the content


def sync(folder):
    """Sync a folder's names to disk, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def discard(part):
    """Remove an unfinished file, or our files in a folder, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(part).st_mode):
            return os.unlink(part)
        for file in sorted(os.listdir(part), key=lambda name: name != "result.json"):
            if IN_A_SAMPLE.fullmatch(file) and not os.path.isdir(part / file):
                os.unlink(part / file)
        os.rmdir(part)
