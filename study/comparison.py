"""What a directory has of an earlier run, and whether it is of the one that is to be made."""

import itertools
from pathlib import Path

from settings import SettingError
from study.directory import checksum
from study.earlier import Earlier

OTHER_PROMPTS = ["prompts", "these", "others"]


def compare(folder, folders, made_by, resume):
    """What there is of an earlier run in a directory, and whether it is of this one; nothing is touched.

    folders: of the samples, in it, where no earlier run has them. made_by: for each, all that its result depends on.
    resume: whether that run is to be resumed, whose samples must be among these.

    Returns the samples' folders; the names of that run's files; the first thing that its results had otherwise (a list
    of its name and what it is now and was then), or None; and the numbers of the samples that are complete, where they
    may be kept.

    Raises SettingError where what is not ours is in the way, and where another run is to be resumed.
    """
    folder = Path(folder)
    earlier = Earlier.find(folder)
    folders = extended(folders, made_by, earlier.made_by)
    earlier.check(folders)
    difference = first_difference(dict(zip(folders, made_by)), earlier.made_by)
    if resume and difference:
        name, now, before = difference
        if difference == OTHER_PROMPTS and "" in earlier.made_by and len(folders) > 1:
            raise SettingError(
                "resume", True, "finds a run of one sample, which has no folder of its own; leave it out"
            )
        if difference == OTHER_PROMPTS:
            remedy = "finds other prompts in the earlier run, or seeds or settings; give those too, or leave it out"
            raise SettingError("resume", True, remedy)
        if " " in name:  # no setting
            raise SettingError(
                "resume", True, f"finds another {name} ({now}) than the earlier run had ({before}); leave it out"
            )
        has = "none" if before is None else repr(before)
        remedy = f"differs from the run to resume, which has {has}; give the same, or leave out --resume"
        raise SettingError(name, now, remedy)
    whole = [i for i, name in enumerate(folders) if resume and is_whole(folder, name, earlier.entries.get(name), True)]
    return folders, earlier.files, difference, whole


def extended(folders, made_by, earlier):
    """The folders of samples where those of an earlier run, its `made_by` by folder, are among them, in any order.

    These keep theirs, and the others have the numbers after them.
    """
    words, left, kept = (lambda name: name.partition("-")[2]), {}, {}
    for name, before in earlier.items():
        left.setdefault((before.get("text"), before.get("seed")), []).append(name)
    for same_words in (True, False):  # two settings of a sweep can be the same, once a plan is made
        for i, (new, now) in enumerate(zip(folders, made_by)):
            alike = left.get((now.get("text"), now.get("seed")), []) if i not in kept else []
            fits = (name for name in alike if not differing(earlier[name], now))
            if found := next((name for name in fits if not same_words or words(name) == words(new)), None):
                kept[i] = found
                alike.remove(found)
    if not earlier or "" in {*earlier, *folders} or any(left.values()):
        return folders
    numbers = itertools.count(1 + max(int(name.partition("-")[0]) for name in earlier))
    return [kept[i] if i in kept else f"{next(numbers):03d}-{words(new)}" for i, new in enumerate(folders)]


def differing(before, now):
    """The names of what a result depends on and an earlier one had otherwise; a plan that failed was none."""
    free = {"coarse_steps", "schedule"} if before.get("coarse_steps") == "auto" else ()
    return [key for key, value in now.items() if before.get(key) != value and key not in free]


def first_difference(own, earlier):
    """The first thing that results of an earlier run had otherwise, as `compare` returns it; both by folder.

    Each is held against what is in its folder now, or against the only sample of its prompt.
    """
    of_text = {}
    for made in own.values():
        of_text.setdefault(made.get("text"), []).append(made)
    for name, before in earlier.items():
        alike = of_text.get(before.get("text"), [])
        now = own.get(name)
        if not now or now.get("text") != before.get("text"):
            now = alike[0] if len(alike) == 1 else None
        keys = differing(before, now) if now else []
        if keys:
            return [keys[0], now[keys[0]], before.get(keys[0])]
        if not now or name not in own:
            return OTHER_PROMPTS
    return None


def is_whole(folder, name, entry, to_the_bit=False):
    """Whether the set that an entry, as `result.json` has it, tells of is complete, and its files as they were."""
    if not entry or not entry["complete"]:
        return False
    try:
        for file, (size, digest) in entry["files"].items():
            path = folder / name / file
            if path.stat().st_size != size or (to_the_bit and checksum(path.read_bytes()) != digest):
                return False
    except OSError:
        return False
    return True
