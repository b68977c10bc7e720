"""`preview.png`: the image as it is while a run lasts, for who watches from afar; gone once the run has ended."""

import contextlib
import stat

import utils
from settings import SettingError
from study.directory import WriteError, write
from study.earlier import is_locked_by

NAME, MARK = "preview.png", "srds-preview"


def clear(folder, wanted=False):
    """Remove the picture of a run that was killed, or has ended. Raises SettingError where another's is in the way."""
    path = folder / NAME
    with contextlib.suppress(OSError):
        if _is_of_a_run(path):
            path.unlink()
    if wanted and (path.is_symlink() or path.exists()):
        raise SettingError("preview", True, f"writes {path}, which is there and of no run; move it elsewhere")


def show(folder, run, named, image, line):
    """Write a sample's image, uint8 (height, width, 3), with what it is called, texts, and its refinement's line.

    folder: the directory; nothing is written once it has this run's lock no more, as it is gone, or another's. run: the
    run's id.
    """
    if not is_locked_by(folder, run):
        return
    with contextlib.suppress(WriteError):  # it is to be looked at, not kept
        picture = utils.captioned(image, [*named, *line.split(", ")])
        write(folder / NAME, utils.png(picture, {MARK: run}), run)


def _is_of_a_run(path):
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(200)  # the chunk before the picture
