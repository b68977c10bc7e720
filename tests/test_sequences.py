"""Whatever commands, kills, damage and other people's files follow one another, no sample is lost, halved or mixed."""

import builtins
import contextlib
import functools
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from settings import SettingError, Settings
from study import folder
from study.key import Task

SETTINGS = Settings(fine_steps=9, coarse_steps=3, solver="ddim")
NUMBERS = dict.fromkeys(folder.RECORDS["$defs"]["refinement"]["required"])
NUMBERS |= {"serial_evaluations": 3, "total_evaluations": 3}
REFINEMENT = NUMBERS | {"k": 0, "network_calls": 3, "widest_tick": 3, "seconds": 0.5, "damping": 0.0}
REFINEMENT |= {"verdict": "continuing", "settled": True, "difference": 1.0}
RESULT = dict.fromkeys("model device sampled stop_reason".split(), "")
RESULT |= {"size": [8, 8], "steps": 9, "sequential_seconds": 1.0, "errors": [[1.0] * 3], "refinements": [REFINEMENT]}
RUN = dict.fromkeys("begun command reproduce".split(), "")
RUN |= {"settings": {}, "environment": {}, "samples": []}


def make_task(text="a moon", seed=0):
    made = {"prompt": text, **asdict(SETTINGS), "seed": seed, "ground_truth": True, "dtype": "float32"}
    return Task(text, seed, SETTINGS, {}, None, made | {"arguments": {}})


def make_files(task, content=b"image"):
    """The files of a sample, bytes by name, all with a content of their own."""
    files = {f"srds_{name}.png": content for name in ("initialized", "ddim_gt", "ddim_course")}
    files["srds_final.png"] = 2 * content
    record = {"made_by": task.made_by, "result": {**RESULT, "sampled": content.decode()}}
    sizes = {name: len(data) for name, data in files.items()}
    return files | {"result.json": folder.pack({**record, "files": sizes})}


def age(out):
    """Have all unfinished files and folders be those of a command that was killed more than an hour ago."""
    for part in out.rglob(f"{folder.PART}*"):
        os.utime(part, (time.time() - folder.STALE - 1,) * 2)


class Killed(BaseException):
    """The end of a process: none of its handlers changes anything more."""


CHANGES = [(os, name) for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")]


@contextlib.contextmanager
def killing(steps, meanwhile=None, when=0):
    """Kill what a block does, in place of its change after so many: each from then on raises Killed.

    A file that is being synced is cut in half. steps: None for never. meanwhile: is called ahead of change `when`, and
    its changes do not count. Yields a list of the changes.
    """
    done, busy = [], []

    def change(name, original, first, *more, **how):
        if busy:
            return original(first, *more, **how)
        done.append(name)
        if meanwhile and len(done) == when + 1:
            busy.append(True)
            meanwhile()
            busy.clear()
        if steps is not None and len(done) > steps:
            with contextlib.suppress(OSError):  # a folder
                if name == "fsync" and len(done) == steps + 1:
                    os.truncate(first, os.fstat(first).st_size // 2)
            raise Killed
        return original(first, *more, **how)

    with contextlib.suppress(Killed), pytest.MonkeyPatch.context() as patch:
        for place, name in [*CHANGES, (builtins, "open")]:
            patch.setattr(place, name, functools.partial(change, name, getattr(place, name)))
        yield done


TASKS = [make_task(text, seed) for text in ("a moon", "a sun") for seed in (0, 1)]
some = strategies.lists(strategies.integers(0, 3), min_size=1, max_size=3, unique=True)
steps = strategies.none() | strategies.integers(0, 80)


class Directory(RuleBasedStateMachine):
    """An output directory, commands with it, and files of somebody's in it.

    versions: the files that were made for each sample's folder. there: samples that must be there, or be finished by
    the next command. foreign: paths of somebody's files. tops: what was written at the top.
    """

    def __init__(self):
        super().__init__()
        self.place, self.runs = tempfile.TemporaryDirectory(), 0
        self.out = Path(self.place.name) / "out"
        self.versions, self.there, self.foreign, self.tops = {}, set(), set(), {b""}

    def teardown(self):
        self.place.cleanup()

    @rule(tasks=some, again=strategies.booleans(), steps=steps, other=strategies.none() | some, others=steps,
          other_again=strategies.booleans(), when=strategies.integers(0, 40))  # fmt: skip
    def run(self, tasks, again, steps, other, others, other_again, when):
        """Run a command that may be killed; while it runs, another one may run, and may be killed as well."""

        def meanwhile():
            with killing(others):
                self.command(other, other_again)

        if self.shown() and not folder.read_run(self.out):
            with pytest.raises(SettingError, match="but no run.json"):
                folder.Folder(self.out).open()
            for name in self.shown():
                (self.out / name).unlink()
        before = {path for path in self.foreign if path.exists()}
        with killing(steps, meanwhile if other else None, when) as done:
            self.command(tasks, again)
        assert other or (steps is not None and len(done) > steps) or before <= {*self.out.rglob("*")}

    def command(self, tasks, again):
        """What the command does with a directory."""
        self.runs += 1
        content, output = f"{self.runs}".encode(), folder.Folder(self.out)
        output.open()
        for task in [TASKS[i] for i in tasks]:
            if again or not output.has(task):
                files = make_files(task, content)
                self.versions.setdefault(task.folder, []).append(files)
                output.add(task.folder, files, again)
                self.there.add(task.folder)
        run = folder.pack({**RUN, "begun": content.decode()})
        self.tops |= {run, content}
        output.write("run.json", run)
        output.show({"srds_final.png": content})

    @rule()
    def put(self):
        """Put somebody's files everywhere, once there is a run."""
        inside = [f"samples/{sample}/mine.txt" for sample in self.versions if (self.out / "samples" / sample).is_dir()]
        for name in (*inside, "notes.txt", "samples/notes.txt", "samples/mine/a.png"):
            if (self.out / "samples").is_dir():
                (self.out / name).parent.mkdir(exist_ok=True)
                (self.out / name).write_text("mine")
                self.foreign.add(self.out / name)

    @rule(which=strategies.integers(0, 60), cut=strategies.sampled_from([0, 5, None]))
    def damage(self, which, cut):
        """Cut or remove one of the files that are not somebody's."""
        ours = [path for path in sorted(self.out.rglob("*")) if path.is_file() and path not in self.foreign]
        ours = [path for path in ours if path.name != "mine.txt"]
        if ours:
            path = ours[which % len(ours)]
            self.there -= {sample for name, sample, _ in self.samples() if name == path.parent.name}
            path.unlink() if cut is None else os.truncate(path, min(cut, path.stat().st_size // 2))
            self.tops |= {path.read_bytes()} if path.parent == self.out and cut is not None else set()

    @rule()
    def wait(self):
        """Let the hour pass after which what a killed command left is removed."""
        age(self.out)

    def shown(self):
        return [path.name for path in self.out.glob("*") if folder.AT_THE_TOP.fullmatch(path.name)]

    def samples(self):
        """What is read as a sample: the name of each folder, the name that it should have, its record."""
        found = [(path.name, folder.read_sample(path.parent, path.name)) for path in self.out.glob("samples/*")]
        right = lambda made: make_task(made["prompt"], made["seed"]).folder
        return [(name, right(record["made_by"]), record) for name, record in found if record]

    @invariant()
    def somebodys_files_are_untouched(self):
        """Those in a sample's folder go where that goes."""
        for path in self.foreign:
            there = self.out.rglob(path.name) if path.name == "mine.txt" else [path]
            assert "mine" in [each.read_text() for each in there]

    @invariant()
    def no_sample_is_half_mixed_or_lost(self):
        for name, sample, record in self.samples():
            assert name == sample or name.startswith(folder.PART)
            there = {file: (self.out / "samples" / name / file).read_bytes() for file in record["files"]}
            assert any(there.items() <= files.items() for files in self.versions[sample])
        assert self.there <= {sample for _, sample, _ in self.samples()}

    @invariant()
    def files_at_the_top_are_whole_and_there_are_none_outside(self):
        assert all((self.out / name).read_bytes() in self.tops for name in self.shown())
        assert {path.name for path in self.out.parent.iterdir()} <= {"out"}


Directory.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None, derandomize=True)
test_sequences = Directory.TestCase
