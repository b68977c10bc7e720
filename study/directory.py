"""The files of an output directory: each whole or not there, and records that are told from all else."""

import contextlib
import hashlib
import json
import os
import re
import stat
from pathlib import Path

from settings import Failure

# What a run writes, in the directory and in the folders of its prompts.
OURS = re.compile(
    r"(srds|trajectory)_[a-z0-9_]+\.(png|csv)|(result|run)\.json|results\.csv|report\.html|trajectory\.safetensors"
)
FOLDER = re.compile(r"[0-9]{3,}-[a-z0-9-]+")
PLANNED = {"blocks", "schedule", "refinements", "srds", "sequential", "calls"}


class WriteError(Failure):
    """A file that could not be written, in one line."""


def checksum(data):
    return hashlib.sha256(data).hexdigest()[:32]


def pack(content):
    """The bytes of a record: JSON, with the checksum that tells `read` that it is whole and a record of ours."""
    content = json.loads(json.dumps(content))
    return (json.dumps({**content, "checksum": _seal(content)}, indent=2) + "\n").encode()


def read(path):
    """A record that `pack` made, a dictionary; empty for all else that may lie there."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return {}  # reading a pipe would wait
        content = json.loads(path.read_bytes())
        return content if content.pop("checksum") == _seal(content) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def read_set(path):
    """A `result.json` that `pack` made, of the shape that a run gives it; empty for all else."""
    found = read(path)
    whole = _has(found, complete=bool, files=dict, result=dict, made_by=dict, begun=str, run=str)
    whole = whole and _has(found["result"], prompt=str, seed=int, iterations=list, seconds=dict, folder=str)
    return found if whole and _are_files(found["files"]) else {}


def read_run(path):
    """A `run.json` that `pack` made, of the shape that a run gives it; empty for all else."""
    found = read(path)
    whole = _has(found, run=str, begun=str, settings=dict, folders=list, prompts=list, overview=dict, files=list)
    whole = whole and _has(found, made_by=dict) and _has(found["made_by"], common=dict, each=dict)
    plans = found.get("plans", [])
    if not whole or not _are_files(found["overview"]) or not isinstance(plans, list):
        return {}
    planned = all(plan is None or (isinstance(plan, dict) and PLANNED <= plan.keys()) for plan in plans)
    made = all(isinstance(each, dict) for each in found["made_by"]["each"].values())
    folders = all(isinstance(name, str) and (not name or FOLDER.fullmatch(name)) for name in found["folders"])
    return found if planned and made and folders and all(map(_is_ours, found["files"])) else {}


def _has(record, **kinds):
    """Whether a dictionary has values of such types, by name."""
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _are_files(files):
    """Whether a dictionary has names of ours, and a size and a checksum, or None where they are not known, for each."""
    facts = [value for value in files.values() if value is not None]
    pairs = all(isinstance(value, list) and len(value) == 2 for value in facts)
    return all(map(OURS.fullmatch, files)) and pairs


def _seal(content):
    return checksum(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def reporting(path, what="cannot be written"):
    """The system's errors as a WriteError that names the path."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} {what}: {error.strerror}") from error


def stage(path, data, run):
    """Write bytes beside `path`, whole, under a name that only this run knows; returns where. Raises WriteError.

    Its folder is made, but not that one's: an output directory removed in mid-run stays removed.
    """
    part = path.with_name(f".{path.name}.{run}.part")
    with reporting(path):
        try:
            file = _create(part)
        except FileNotFoundError:  # another process has just removed the folder, as empty
            file = _create(part)
        try:
            with open(file, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a machine that crashes may keep the name and lose what is in it
        except OSError:
            part.unlink(missing_ok=True)
            raise
    return part


def _create(part):
    """A descriptor of a new file, in a folder that is there or is made."""
    part.parent.mkdir(exist_ok=True)
    if FOLDER.fullmatch(part.parent.name) and part.parent.is_symlink():
        raise WriteError(f"{part.parent} is a link; a prompt's folder must be none")
    return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def write(path, data, run):
    """Write bytes to `path`, whole or not at all, in place of a file of ours. Raises WriteError."""
    part = stage(path, data, run)
    try:
        with reporting(path):
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def name_of(folder, name):
    """A file's name in the directory, from its folder's there, or ""."""
    return Path(folder, name).as_posix()


def _is_ours(name):
    if not isinstance(name, str):
        return False
    folder, _, file = name.rpartition("/")
    return bool(OURS.fullmatch(file) and (not folder or FOLDER.fullmatch(folder)))
