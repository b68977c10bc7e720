"""What earlier runs left in an output directory, and that only one run at a time writes there."""

import contextlib
import errno
import os
import re
import stat
import sys
from pathlib import Path
from typing import NamedTuple

from settings import Failure, SettingError
from study.directory import FOLDER, OURS, WriteError, name_of, pack, read, read_run, read_set, reporting, write

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK, MOVING = ".srds.lock", ".srds.moving"
PLACE = re.compile(r"earlier/([0-9T]+(-[0-9T]+)*|unknown(-[0-9]+)?)")  # of what was set aside


class Earlier(NamedTuple):
    """What earlier runs left in a directory, as their own records tell.

    about: the run's `run.json`; empty where there is none that is whole. entries: each `result.json` by its folder, ""
    for the directory itself. files: the names of all their files, the records last.
    """

    folder: Path
    about: dict
    entries: dict
    files: list

    @classmethod
    def find(cls, folder):
        about, entries = read_run(folder / "run.json"), {}
        for name in ["", *_prompt_folders(folder)]:
            if entry := read_set(folder / name / "result.json"):
                entries[name] = entry
        files = [*about.get("files", ())]
        for name, entry in entries.items():
            own = [name_of(name, file) for file in entry["files"]]
            files += [*own, name_of(name, "result.json")]
            if not about:  # then nothing else tells of the overview, whose pictures have the names of a set's
                files += [*(entry["files"] if name else ()), "results.csv", "report.html"]
        files += ["run.json"] * bool(about or entries)  # a damaged one beside whole sets is theirs
        # The records last: while a file is there, so is what tells of it.
        files = sorted(dict.fromkeys(files), key=lambda name: (name == "run.json", name.endswith("result.json")))
        return cls(folder, about, entries, [name for name in files if _is_regular(folder / name)])

    @property
    def made_by(self):
        """What each set was made by, by its folder; `run.json` tells it of those whose own record is not whole."""
        told = self.about.get("made_by", {"common": {}, "each": {}})
        known = {folder: told["common"] | own for folder, own in told["each"].items()}
        return known | {folder: entry["made_by"] for folder, entry in self.entries.items()}

    def _place(self):
        """A folder named after when the run began, that is not there yet."""
        begun = [record.get("begun", "") for record in (self.about, *self.entries.values())]
        stamp = re.sub("[^0-9T]", "-", max(begun)[:19]).strip("-") or "unknown"
        places = (f"earlier/{stamp}{f'-{i}' if i else ''}" for i in range(10**6))
        return next(place for place in places if not os.path.lexists(self.folder / place))

    def check(self, folders):
        """Raise SettingError where a run of prompts in such folders would meet what is not ours, or cannot be moved."""
        known = set(self.files)
        places = ["", *folders, *_prompt_folders(self.folder), *self.about.get("folders", ())]
        for folder in dict.fromkeys(places):
            path = self.folder / folder
            if folder and (path.is_symlink() or (os.path.lexists(path) and not path.is_dir())):
                what = f"has what is no folder of ours at {folder}; move it elsewhere"
                raise SettingError("output_dir", str(self.folder), what)
            with reporting(path, "cannot be read"):
                names = sorted(os.listdir(path) if path.is_dir() else ())
            for name in names:
                if OURS.fullmatch(name) and name_of(folder, name) not in known:
                    remedy = f"holds {name_of(folder, name)}, which no whole record here tells of; move it elsewhere"
                    raise SettingError("output_dir", str(self.folder), remedy)
        for place in {(self.folder / name).parent for name in self.files} | {self.folder}:
            if not os.access(place, os.W_OK | os.X_OK):
                raise SettingError("output_dir", str(self.folder), f"has {place}, which cannot be written; see to it")
        aside = self.folder / "earlier"
        if aside.is_symlink() or (aside.exists() and not aside.is_dir()):
            raise SettingError("output_dir", str(self.folder), "has no folder at earlier/; move it elsewhere")

    def set_aside(self, run):
        """Move the files, as they are, into a folder of the directory: all or, with a WriteError, none. Returns where.

        Where the run is killed in between, the next one finishes it.
        """
        place = self._place()
        write(self.folder / MOVING, pack({"place": place}), run)
        self.move(place)
        with reporting(self.folder / MOVING, "cannot be removed"):
            (self.folder / MOVING).unlink()
        return place

    def move(self, place):
        """Move the files to a place in the directory."""
        moved = []
        try:
            for name in self.files:
                target = self.folder / place / name
                with reporting(self.folder / name, "of an earlier run, cannot be moved"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.rename(self.folder / name, target)
                moved.append((self.folder / name, target))
        except WriteError:
            for path, target in reversed(moved):
                with contextlib.suppress(OSError):
                    os.rename(target, path)
            with contextlib.suppress(OSError):
                (self.folder / MOVING).unlink(missing_ok=True)
            raise
        self._clear()

    def remove(self):
        """Remove the files. Raises WriteError."""
        for name in self.files:
            with reporting(self.folder / name, "of an earlier run, cannot be removed"):
                (self.folder / name).unlink(missing_ok=True)
        self._clear()

    def _clear(self):
        for name in {Path(name).parent for name in self.files} - {Path()}:
            with contextlib.suppress(OSError):  # it holds something that is not ours
                (self.folder / name).rmdir()


def _prompt_folders(folder):
    """The folders in a directory that may be of prompts; links are none."""
    if not folder.is_dir():
        return []
    with reporting(folder, "cannot be read"):
        entries = [entry for entry in os.scandir(folder) if FOLDER.fullmatch(entry.name)]
    return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def _is_regular(path):
    """Whether it is a file, not a link to one, and not through a link either."""
    try:
        beyond_a_link = FOLDER.fullmatch(path.parent.name) and path.parent.is_symlink()
        return stat.S_ISREG(path.lstat().st_mode) and not beyond_a_link
    except OSError:
        return False


class Lock:
    """That only one run writes into a directory: a lock of the process, which ends with it, on a file in there.

    The file tells the run's id, by which the next one removes what a killed run had not yet given its name. The
    directory is made if it is not there.

    Raises SettingError where another run has it, and WriteError where it cannot be written.
    """

    def __init__(self, folder, run):
        self.folder, self.path = folder, folder / LOCK
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        with reporting(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.file = self._open()
        try:
            with reporting(self.path):
                before = os.read(self.file, 100)
                if before and not re.fullmatch(rb"[0-9a-f]{16}", before):
                    self._refuse("that is not ours; move it elsewhere")
                _tidy(folder, before.decode())
                os.lseek(self.file, 0, os.SEEK_SET)
                os.write(self.file, run.encode())
        except BaseException:
            os.close(self.file)
            raise

    def _open(self):
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        while True:
            if self.path.is_symlink():
                self._refuse("that is a link; remove it")
            with reporting(self.path):
                file = os.open(self.path, flags, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    self._refuse("that is no file; remove it")
                if not self._lock(file) or os.path.samestat(os.fstat(file), os.lstat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            except Failure:
                os.close(file)
                raise
            os.close(file)  # of a run that has just ended

    def _lock(self, file):
        """Lock an open file; returns whether its system has locks."""
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "no locks on this system")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            remedy = "is being written by another run; wait until that ends, or give another directory"
            raise SettingError("output_dir", str(self.folder), remedy) from None
        except OSError as error:
            doubt = "cannot know whether another run writes there"
            print(f"note: {self.folder} cannot be locked ({error.strerror}); this run {doubt}", file=sys.stderr)
            return False

    def _refuse(self, what):
        raise SettingError("output_dir", str(self.folder), f"has a {LOCK} {what}")

    def release(self):
        """Let others write; a directory that was made for nothing is removed."""
        with contextlib.suppress(OSError):  # or the directory is gone, and perhaps another run's by now
            if os.path.samestat(os.fstat(self.file), os.lstat(self.path)):
                self.path.unlink()
        os.close(self.file)
        for path in self.made:
            with contextlib.suppress(OSError):
                path.rmdir()


def is_locked_by(folder, run):
    """Whether it is a run, by its id, that has a directory's lock."""
    try:
        return (folder / LOCK).read_bytes() == run.encode()
    except OSError:
        return False


def _tidy(folder, run):
    """Remove what a killed run had not yet given its names, and finish what it was moving."""
    for name in ["", *_prompt_folders(folder)] if run else ():
        for part in (folder / name).glob(f".*.{run}.part"):
            with reporting(part, "of a killed run, cannot be removed"):
                part.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is more in it
                (folder / name).rmdir()
    place = read(folder / MOVING).get("place")
    if isinstance(place, str) and PLACE.fullmatch(place) and not (folder / "earlier").is_symlink():
        Earlier.find(folder).move(place)
        with reporting(folder / MOVING, "cannot be removed"):
            (folder / MOVING).unlink()
