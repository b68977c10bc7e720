"""An output directory: a folder for each sample, complete or absent, and files that show the last command's samples.

A sample's files are written into `samples/.part-.../` and synced; then that folder is renamed, as one, to its place.
A command that is killed before leaves no half sample. All other files are replaced one by one, each as a whole.
"""

import contextlib
import json
import os
import re
import secrets
import stat
import time
from dataclasses import fields
from pathlib import Path

from jsonschema import Draft202012Validator

from settings import Failure, SettingError, Settings
from study.key import folder_name

PICTURES = (r"srds_(initialized|iteration_[0-9]+|final|filmstrip|ddim_gt|ddim_course)\.png"
            r"|srds_(final|refinements)\.webp|trajectory_errors_(plot\.(png|pdf|svg)|table\.csv)")  # fmt: skip
IN_A_SAMPLE = re.compile(rf"{PICTURES}|trajectory\.safetensors|result\.json")
AT_THE_TOP = re.compile(rf"{PICTURES}|sweep\.(png|pdf|svg)|results\.csv|report\.html|run\.json")
PART = ".part-"  # the names of unfinished files and folders begin with this
STALE = 3600  # seconds after which an unfinished file or folder is taken to be a killed command's

RECORDS = json.loads(Path(__file__).with_name("records.schema.json").read_text(encoding="utf-8"))


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


def read_json(root, name, kind):
    """Return the content of a JSON file if our schema has it as a `kind`, "sample" or "run"; None otherwise."""
    try:
        content = json.loads(read_file(root, name), parse_constant=int)  # which refuses NaN
        valid = Draft202012Validator({**RECORDS, "$ref": f"#/$defs/{kind}"}).is_valid(content)
        return content if valid else None
    except (OSError, ValueError, RecursionError):
        return None


def read_sample(root, name):
    """Return the content of `result.json` in a sample's folder; None unless the folder is complete."""
    record = read_json(root, f"{name}/result.json", "sample")
    if not record or not is_consistent(record["result"]):
        return None
    try:
        Settings(**{each.name: record["made_by"][each.name] for each in fields(Settings)})  # checks them
        for file, size in record["files"].items():
            facts = os.lstat(os.path.join(root, name, file))
            if not IN_A_SAMPLE.fullmatch(file) or not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
                return None
    except (OSError, KeyError, ValueError):
        return None
    return record


def is_consistent(result):
    """Return whether refinements are numbered from 0, with differences if there are errors, in rows of one length."""
    refinements, errors = result["refinements"], result["errors"] or []
    numbered = [(entry["k"], entry["difference"] is not None) for entry in refinements]
    return numbered == [*enumerate([bool(errors)] * len(refinements))] and len({*map(len, errors)}) <= 1


def read_run(folder):
    """Return the content of `run.json` in an output directory; None if there is none of ours."""
    return read_json(folder, "run.json", "run")


def load_samples(root, run):
    """Return the samples of a run: pairs of the entry in `run.json` and the record or None, see `study.results`."""
    read = lambda folder: read_sample(root, f"samples/{folder}")
    return [(said, None if said["error"] else read(said["folder"])) for said in run["samples"]]


def pack(content):
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


class FileError(Failure):
    """A file in the output directory that cannot be read or written, in one line."""


@contextlib.contextmanager
def reporting(path):
    """Turn the system's errors into a FileError that names the path."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error


class Folder:
    """An output directory, which is made when it is opened.

    path: with its links resolved when the object was made.
    """

    def __init__(self, path):
        self.given, self.path = path, Path(os.path.realpath(path))
        self.samples = self.path / "samples"

    def open(self, dry=False):
        """Make the directory, and finish or remove what a killed command has left; if it is a dry run, only look.

        Raises SettingError if it cannot be made or written to, or if it holds files with our names, but no run.json.
        """
        try:
            ours = sorted(path.name for path in self.path.glob("*") if AT_THE_TOP.fullmatch(path.name))
            if ours and not read_run(self.path):
                raise OSError(f"it holds {ours[0]}, but no run.json of this program")
            if not dry:
                self.samples.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.stat(self.samples)
            if self.samples.is_symlink():
                raise OSError("its `samples` is a link")
            if not all(os.access(place, os.W_OK | os.X_OK) for place in (self.path, self.samples) if place.exists()):
                raise OSError("it is not writable")
        except OSError as error:
            remedy = f"cannot be used ({error.strerror or error}); give another directory, existing or new"
            raise SettingError("output_dir", self.given, remedy) from None
        unfinished = PART + 16 * "[0-9a-f]"
        for part in () if dry else [*self.samples.glob(unfinished), *self.path.glob(unfinished)]:
            found = read_sample(part.parent, part.name)
            place = found and self.samples / folder_name(found["made_by"])
            with contextlib.suppress(OSError):
                if found and not os.path.lexists(place):
                    os.rename(part, place)
                elif time.time() - os.lstat(part).st_mtime >= STALE:
                    discard(part)

    def has(self, task):
        """Return whether a `study.key.Task`'s sample is there. Raises FileError if something else has its name."""
        place = self.samples / task.folder
        if os.path.islink(place) or place.is_file():
            raise FileError(f"{place} does not hold the sample of that name; move it elsewhere")
        return bool(read_sample(self.samples, task.folder))

    def add(self, name, files, again=False):
        """Put a complete sample's folder in its place; files: bytes by name. Raises FileError.

        If a complete one is there, it stays and the new one is dropped; with `again`, the new one replaces it. Other
        files in a folder that is replaced are kept.
        """
        part, replaced = (self.samples / f"{PART}{secrets.token_hex(8)}" for _ in range(2))
        place = self.samples / name
        with reporting(place):
            os.mkdir(part)
            try:
                for file, data in files.items():
                    create(part / file, data)
                sync(part)
                if again or not read_sample(self.samples, name):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(place, replaced)
                try:
                    os.rename(part, place)
                except OSError as error:  # another command has found `part`, or put its own in the place
                    if not (isinstance(error, FileNotFoundError) or read_sample(self.samples, name)):
                        raise
                for file in os.listdir(replaced) if replaced.is_dir() else ():
                    if not (IN_A_SAMPLE.fullmatch(file) or os.path.lexists(place / file)):
                        os.rename(replaced / file, place / file)
                sync(self.samples)
            finally:
                with contextlib.suppress(OSError):  # back; fails if a new one is there
                    os.rename(replaced, place)
                discard(part)
                discard(replaced)

    def write(self, name, data):
        """Write a file at the top level, replacing an earlier one as a whole. Raises FileError."""
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
