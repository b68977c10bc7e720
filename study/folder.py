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

from settings import Failure, SettingError, Settings
from study.key import folder_name

PICTURES = (r"srds_(initialized|iteration_[0-9]+|final|filmstrip|ddim_gt|ddim_course)\.png"
            r"|trajectory_errors_plot\.png|trajectory_errors_table\.csv")  # fmt: skip
IN_A_SAMPLE = re.compile(rf"{PICTURES}|trajectory\.safetensors|result\.json")
AT_THE_TOP = re.compile(rf"{PICTURES}|results\.csv|report\.html|run\.json|plan-[0-9a-f]{{8}}\.json")
PART = ".part-"  # the names of unfinished files and folders begin with this
UNFINISHED = re.compile(r"\.part-[0-9a-f]{16}")
STALE = 3600  # seconds after which an unfinished file or folder is taken to be a killed command's
MOST_JSON = 64 * 2**20  # bytes

METRICS = ("clip", "clip_difference", "scene", "scene_difference")
TRUTH = lambda value: isinstance(value, bool)
TEXT = lambda value: isinstance(value, str)
COUNT = lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
NUMBER = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
MAYBE = lambda shape: lambda value: value is None or fits(value, shape)
MAPPING = lambda shape: lambda value: isinstance(value, dict) and all(fits(each, shape) for each in value.values())
FILE = re.compile(r"[a-z0-9_.-]{1,100}")
# The content of `result.json` and `run.json`: a check for each value; the items of a list have one shape.
REFINEMENT = {
    "verdict": TEXT, "settled": TRUTH, "seconds": NUMBER, "damping": NUMBER, "metrics": MAPPING(MAYBE(NUMBER)),
    **dict.fromkeys("k serial_evaluations total_evaluations network_calls widest_tick".split(), COUNT),
    **dict.fromkeys("peak_memory_mib difference psnr ssim image_change trajectory_change predicted_change".split(),
                    MAYBE(NUMBER)),
}  # fmt: skip
RESULT = {
    **dict.fromkeys("model device sampled ignored stop_reason".split(), TEXT),
    "sequential_seconds": MAYBE(NUMBER), "refinements": [REFINEMENT], "errors": MAYBE([[NUMBER]]),
}  # fmt: skip
SAMPLE = {"made_by": lambda value: is_made_by(value), "result": RESULT, "files": MAPPING(COUNT)}
ASKED = {"prompt": TEXT, "seed": COUNT, "folder": lambda name: TEXT(name) and bool(FILE.fullmatch(name)),
         "settings": MAPPING(lambda value: not isinstance(value, (dict, list))), "error": MAYBE(TEXT)}  # fmt: skip
RUN = {
    **dict.fromkeys("begun command reproduce edited_defaults".split(), TEXT), "settings": MAPPING(TEXT),
    "environment": MAPPING(TEXT), "samples": [ASKED],
}  # fmt: skip


def fits(value, shape):
    """Return whether a JSON value has a shape: a check, a list of one shape, or a dictionary of shapes."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and value.keys() == shape.keys() and all(fits(value[k], shape[k]) for k in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    return bool(shape(value))


def is_made_by(value):
    """Return whether a value can be the `made_by` of a sample: a prompt, valid settings, and more."""
    try:
        Settings(**{each.name: value[each.name] for each in fields(Settings)})
        return TEXT(value["prompt"]) and TRUTH(value["ground_truth"]) and TEXT(value["dtype"])
    except (KeyError, TypeError, ValueError):
        return False


def read_file(root, name, most=MOST_JSON):
    """Return the bytes of a file in a folder that may come from others. Raises OSError and ValueError.

    It must be a regular file, of at most so many bytes, and neither a link nor beyond one.
    """
    path = os.path.join(root, name)
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), *Path(name).parts):
        raise ValueError(f"{path} is a link or outside its folder")
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most:
            raise ValueError(f"{path} is not a regular file of at most {most} bytes")
        return file.read()


def read_json(root, name, shape):
    """Return the content of a JSON file if it has a shape; None for anything else."""
    try:
        content = json.loads(read_file(root, name))
        return content if fits(content, shape) else None
    except (OSError, ValueError, RecursionError):
        return None


def read_sample(root, name):
    """Return the content of `result.json` in a sample's folder; None unless the folder is complete."""
    found = read_json(root, f"{name}/result.json", SAMPLE)
    if not found or {f"{image}.png" for image in images_of(found)} - found["files"].keys():
        return None
    if not is_consistent(**found["result"]):
        return None
    try:
        for file, size in found["files"].items():
            facts = os.lstat(os.path.join(root, name, file))
            if not IN_A_SAMPLE.fullmatch(file) or not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
                return None
    except OSError:
        return None
    return found


def is_consistent(refinements, errors, **result):
    """Return whether refinements are k = 0, 1, ... and have a difference and errors of one length, or neither."""
    compared = [entry["difference"] is not None for entry in refinements]
    widths = [len(row) for row in errors or ()]
    whole = widths == [widths[0]] * len(refinements) and widths[0] if widths else errors is None
    measured = all(entry["metrics"].keys() <= {*METRICS} for entry in refinements)
    rising = [entry["k"] for entry in refinements] == [*range(len(refinements))] != []
    return bool(rising and measured and whole and compared == [errors is not None] * len(refinements))


def images_of(record):
    """Return the names of a sample's images, without ".png"; those of its refinements first, in their order."""
    names = [f"srds_iteration_{i}" if i else "srds_initialized" for i in range(len(record["result"]["refinements"]))]
    truth = ["srds_ddim_gt", "srds_ddim_course"] if record["result"]["errors"] is not None else []
    return [*names, "srds_final", *truth]


def read_run(folder):
    """Return the content of `run.json` in an output directory; None if there is none of ours."""
    return read_json(folder, "run.json", RUN)


def load_samples(root, run):
    """Return the samples of a run: pairs of the entry in `run.json` and the record or None, see `study.results`."""
    read = lambda said: None if said["error"] else read_sample(root, f"samples/{said['folder']}")
    return [(said, read(said)) for said in run["samples"]]


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
        self.samples, self.identities = self.path / "samples", None

    def open(self):
        """Make the directory, and finish or remove what a killed command has left.

        Raises SettingError if it cannot be made or written to, or if it holds files with our names, but no run.json.
        """
        try:
            problem = self._make()
        except OSError as error:
            problem = error.strerror or str(error)
        if problem:
            remedy = f"cannot be used ({problem}); give another directory, existing or new"
            raise SettingError("output_dir", self.given, remedy)
        for part in [*self.samples.glob(f"{PART}*"), *self.path.glob(f"{PART}*")]:
            if UNFINISHED.fullmatch(part.name):
                self._tidy(part)

    def _make(self):
        """Make the directory and return what prevents its use, or ""."""
        there = sorted(os.listdir(self.path)) if os.path.lexists(self.path) else []
        ours = [name for name in there if AT_THE_TOP.fullmatch(name) and not name.startswith("plan-")]
        if ours and not read_run(self.path):
            return f"it holds {ours[0]}, but no run.json of this program"
        self.samples.mkdir(parents=True, exist_ok=True)
        self.identities = [os.lstat(place) for place in (self.path, self.samples)]
        if not stat.S_ISDIR(self.identities[1].st_mode):
            return "its `samples` is a link"
        writable = all(os.access(place, os.W_OK | os.X_OK) for place in (self.path, self.samples))
        return "" if writable else "it is not writable"

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

    def by_stem(self):
        """Return the names in `samples`, lists by what comes before the key."""
        names, stem = os.listdir(self.samples), lambda name: name[:-9]
        return {before: [*some] for before, some in itertools.groupby(sorted(names, key=stem), stem)}

    def read(self, name):
        """Return the record of the sample in a folder, see `read_sample`; None if it is not complete."""
        return read_sample(self.samples, name)

    def has(self, task):
        """Return whether a `study.key.Task`'s sample is there. Raises WriteError if another one is in its place."""
        found, place = self.read(task.folder), self.samples / task.folder
        if os.path.islink(place) or (place.exists() and not place.is_dir()):
            raise WriteError(f"{place} is not a folder; move it elsewhere")
        if found and found["made_by"] != task.made_by:
            raise WriteError(f"{place} does not hold the sample of that name; move it elsewhere")
        return bool(found)

    def add(self, name, files, again=False):
        """Put a complete sample's folder in its place; files: bytes by name. Raises WriteError.

        If a complete one is there, it stays and the new one is dropped; with `again`, the new one replaces it. Other
        files in a folder that is replaced are kept.
        """
        part, replaced = self.samples / f"{PART}{secrets.token_hex(8)}", []
        with reporting(self.samples / name):
            self._check_place()
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
                self._check_place()
            finally:
                discard(part)
                for old in replaced:
                    self._tidy(old, self.samples / name, stale=0)

    def write(self, name, data):
        """Write a file at the top level, replacing an earlier one as a whole. Raises WriteError."""
        with reporting(self.path / name):
            self._check_place()
            replace_file(self.path / name, data)

    def show(self, files):
        """Write files at the top level, bytes by name, and remove the pictures and tables of an earlier command."""
        for name, data in files.items():
            self.write(name, data)
        kept = re.compile(r"run\.json|plan-.*")
        for path in sorted(self.path.iterdir()):
            if AT_THE_TOP.fullmatch(path.name) and not kept.fullmatch(path.name) and path.name not in files:
                with reporting(path):
                    path.unlink(missing_ok=True)

    def _check_place(self):
        """Raise OSError if the directory has been replaced."""
        for place, was in zip((self.path, self.samples), self.identities):
            if not os.path.samestat(os.lstat(place), was):
                raise OSError(f"{place} has been replaced while the command ran")


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
