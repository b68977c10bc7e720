"""Whatever runs, kills and damage follow one another in a directory: a file is of one run, whole, or not ours."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_record import ABOUT

from settings import Failure
from study.comparison import compare
from study.directory import OURS, checksum, read
from study.earlier import MOVING, Earlier, Lock
from study.record import Record, folder_names

SECONDS = {"seconds": {"srds": 1.0, "ground_truth": None}}
TEXTS = (["a"], ["a", "b"], ["a", "c", "b"])


class Killed(BaseException):
    """The end of a process: none of its handlers does anything more, and its lock is let go."""


class Directory(RuleBasedStateMachine):
    """An output directory, with runs of other seeds or prompts into it, and files of somebody's."""

    def __init__(self):
        super().__init__()
        self.out, self.runs = Path(tempfile.mkdtemp()) / "out", 0
        self.foreign, self.damaged, self.removed, self.removing = {}, {}, set(), False

    def teardown(self):
        shutil.rmtree(self.out.parent)

    @rule(
        seed=strategies.integers(0, 1), texts=strategies.sampled_from(TEXTS), mode=strategies.sampled_from("nro"),
        steps=strategies.none() | strategies.integers(0, 60), fails=strategies.sets(strategies.integers(0, 2)),
        length=strategies.integers(1, 2),
    )  # fmt: skip
    def run(self, seed, texts, mode, steps, fails, length):
        """One run, new, resuming or overwriting; killed after some of its changes to the directory, or not at all."""
        self.runs += 1
        with killing(steps), contextlib.suppress(Failure):
            lock = Lock(self.out, f"{self.runs:016x}")
            try:
                self.sample(seed, texts, mode, fails, length)
            except Killed:
                os.close(lock.file)
                self.removing |= mode == "o"  # what is to be overwritten may be gone in part
                raise
            except Failure:
                pass
            lock.release()

    def sample(self, seed, texts, mode, fails, length):
        made = [{"seed": seed, "text": text} for text in texts]
        folders, earlier, difference, whole = compare(self.out, folder_names(texts), made, resume=mode == "r")
        about = {"run": f"{self.runs:016x}", **ABOUT}
        record = Record(self.out, about, folders, made, earlier, difference, overwrite=mode == "o")
        if mode == "r" or not earlier:
            record.begin()
        names = ["srds_initialized", "srds_final", *(f"srds_iteration_{k}" for k in range(length - 1))]
        images = {name: np.full((8, 8, 3), 9 * seed, np.uint8) for name in names}
        entry = {"iteration": -1, "serial_evaluations": 1, "image_error": None}
        for i, text in enumerate(texts):
            if i in fails:
                record.fail(i, seed, "failed")
            elif i not in whole:
                record.add(i, {"prompt": text, "seed": seed, "iterations": [entry] * length, **SECONDS}, images)
        record.finish()

    @rule(name=strategies.sampled_from(["notes.txt", "srds_final.png", "000-a/run.json", "000-a/mine.png"]))
    def put(self, name):
        """Somebody's file, where there is none."""
        path, known = self.out / name, [self.out / file for file in Earlier.find(self.out).files]
        listed = {*read(path.parent / "result.json").get("files", ()), *read(self.out / "run.json").get("files", ())}
        guessed = name == "srds_final.png" and not read(self.out / "run.json")  # see `damage`
        free = not os.path.lexists(path) and path not in known and not {name, path.name} & listed
        if path.parent.is_dir() and free and not guessed:
            path.write_text("mine")
            self.foreign[path] = path.read_bytes()

    @rule(which=strategies.integers(0, 60), cut=strategies.sampled_from([0, 20, None]))
    def damage(self, which, cut):
        """Cut or remove one of our files; what only it told of is nobody's from then on.

        Without a whole `run.json`, what lies beside prompts' folders by the names of their files is taken for theirs.
        """
        ours = [path for path in sorted(self.out.rglob("*")) if path.is_file() and path not in self.foreign]
        if ours:
            path = ours[which % len(ours)]
            data = path.read_bytes()
            path.unlink()
            if path.name == "run.json":
                self.foreign = {file: content for file, content in self.foreign.items() if file.parent != self.out}
            self.removed.add(f"/{path.relative_to(self.out)}")
            if cut is not None:
                path.write_bytes(data[:cut])
            known = {self.out / name for name in Earlier.find(self.out).files}
            unknown = [file for file in self.ours() if file not in known]
            self.damaged = {file: file.read_bytes() for file in {path, *unknown, *self.damaged} if file.is_file()}

    def ours(self):
        """The files in the directory, but not in what was set aside, that have names of ours, and are not foreign."""
        paths = [path for place in ("", "[0-9]*/") for path in self.out.glob(f"{place}*")]
        return [path for path in paths if OURS.fullmatch(path.name) and path not in self.foreign]

    def is_damaged(self, path):
        return path in self.damaged and path.is_file() and path.read_bytes() == self.damaged[path]

    @invariant()
    def somebodys_files_are_untouched(self):
        for path, content in self.foreign.items():
            assert path.read_bytes() == content, path

    @invariant()
    def the_next_run_knows_every_file_of_ours(self):
        known = {self.out / name for name in Earlier.find(self.out).files}
        for path in self.ours():
            assert path in known or self.is_damaged(path), path

    @invariant()
    def the_files_of_a_complete_set_are_as_they_were_and_no_others_are_beside_them(self):
        for path in self.out.rglob("result.json"):
            entry = read(path)
            if entry.get("complete"):
                for name, facts in entry["files"].items():
                    file = path.parent / name
                    gone = not file.exists() and (self.removing or (self.out / MOVING).exists())
                    data = b"" if gone or not file.exists() else file.read_bytes()
                    assert gone or [len(data), checksum(data)] == facts or self.was_damaged(file), file
                if path.parent.name.startswith("00"):
                    there = {file for file in path.parent.iterdir() if OURS.fullmatch(file.name)}
                    others = there - {path, *(path.parent / name for name in entry["files"])} - self.foreign.keys()
                    assert all(map(self.is_damaged, others)), others

    def was_damaged(self, path):
        """Whether it is the very file that was cut or removed, or that was set aside afterwards."""
        if path.exists():
            return path.stat().st_size in (0, 20)
        return any(path.as_posix().endswith(name) for name in self.removed)


@contextlib.contextmanager
def killing(steps):
    """Have Killed raised, in place of the change to a directory after so many, and of all after that one."""
    left, originals = [steps], {}

    def counted(name):
        def change(*args, **more):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return originals[name](*args, **more)

        return change

    for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
        originals[name] = getattr(os, name)
        setattr(os, name, counted(name))
    try:
        yield
    except Killed:
        pass
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


Directory.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None, derandomize=True)
test_sequences = Directory.TestCase
