"""The means to make samples: the model, loaded when it is first needed, and a sampler for each of the settings."""

import contextlib
import functools
import hashlib
import json
from dataclasses import asdict, replace

import psutil
import torch

from models.adapters import find_adapters
from models.loading import ModelError, choose_device, choose_dtype, find_model, load_pipeline
from refinement import Trajectory
from sampler import Sampler
from settings import SCHEDULES, Failure, SettingError, in_one_line
from study import key
from study.folder import COUNT, MAPPING, NUMBER, TEXT, pack, read_file, read_json, read_run
from study.key import Task, made_by
from study.planning import describe_plan, make_plan
from study.sampling import Shared, explain, sample, warn_if_cut

SMALLEST = 32  # pixels a side of images for LPIPS
PLAN = {"made_by": MAPPING(lambda value: True), "blocks": COUNT, "schedule": TEXT, "refinements": COUNT, "srds": NUMBER,
        "sequential": NUMBER, "calls": MAPPING(NUMBER)}  # fmt: skip


class Bench:
    """The model of a `main.Command`, found but not yet loaded, its device, and the samples that the command asks for.

    device, dtype: as results depend on them, texts. weights: digests of the model's and the adapters' files. texts:
    the prompts, [""] if the model reads none and none was given.

    Raises Failure for what the model or the device cannot do.
    """

    def __init__(self, command, processes):
        loading, experiment = command.loading, command.experiment
        count = len(command.texts) * len(command.seeds or [0]) * len(command.variants)
        parallel = experiment.parallel or ("samples" if count > processes.size else "lanes")
        self.command, self.processes = command, processes
        self.device = processes.join(choose_device(loading), parallel)
        with processes.in_turn():
            self.model, self.adapters = find_model(loading.model), find_adapters(loading)
        self.dtype = str(choose_dtype(loading, self.model, self.device)).removeprefix("torch.")
        self.weights = key.weights(self.model, self.adapters)
        self.failures, self.shared, self.group = {}, None, None  # the group is that of `shared`
        self.texts = command.texts or [""]
        self._check()
        self.starts = self._starts()
        with processes.in_turn():
            self.metrics = self._metrics()

    def _check(self):
        command, family = self.command, self.model.family
        if family.prompted and not command.texts:
            raise Failure("argument --prompts/-p or --prompt: give one of them", status=2)
        if command.seeds and not family.prompted and len({*command.texts}) > 1:
            remedy = f"would make the same samples for each line, as {self.model.name} reads no prompts; give one line"
            raise SettingError("seeds", command.experiment.seeds, remedy)
        if "clip" in command.metrics and not family.prompted:
            raise SettingError("metrics", "clip", f"scores prompts, but {self.model.name} reads none; leave it out")
        for settings in (variant.settings.resolve(self.model) for variant in command.variants):
            if "lpips" in command.metrics and min(settings.height, settings.width) < SMALLEST:
                raise SettingError("metrics", "lpips", f"needs sides of {SMALLEST} pixels or more; leave it out")
            self._check_size(settings)

    def _check_size(self, settings):
        """Raise SettingError for an image that does not fit in the device's memory."""
        if self.command.loading.vae_tiling or self.device.type not in ("cpu", "cuda"):
            return
        on_cpu = self.device.type == "cpu"
        has = psutil.virtual_memory().total if on_cpu else torch.cuda.get_device_properties(self.device).total_memory
        needed = self.model.family.memory(settings.height, settings.width, attention=on_cpu)
        if needed > has:
            side = "height" if settings.height >= settings.width else "width"
            room = f"need {needed / 2**30:.0f} GiB or more, but there are {has / 2**30:.0f}"
            remedy = f"gives images of {settings.height} x {settings.width} pixels, which {room}; give less"
            raise SettingError(side, getattr(settings, side), remedy)

    def _metrics(self):
        if not self.command.metrics or (self.processes.sharing > 1 and not self.processes.first):
            return None
        from study.metrics import Metrics  # takes a second to import

        return Metrics(self.command.metrics)

    def _starts(self):
        """Return the trajectories of the --start-from run, by prompt and seed; by None if it has only one sample."""
        folder = self.command.experiment.start_from
        if folder is None:
            return {}
        try:
            samples = (read_run(folder) or {"samples": None})["samples"]
            if samples is None:
                raise ValueError("it has no run.json of this program")
            found = [Trajectory.unpack(read_file(folder, f"samples/{said['folder']}/trajectory.safetensors", 2**32))
                     for said in samples]  # fmt: skip
        except (OSError, TypeError, ValueError) as error:
            remedy = f"is not the directory of a run that kept its trajectories ({error}); give one"
            raise SettingError("start_from", folder, remedy) from None
        pairs = [(said["prompt"], said["seed"]) for said in samples]
        if len({*pairs}) < len(pairs) or not pairs:
            raise SettingError("start_from", folder, "has none or several of a prompt and seed; give a run with one")
        return dict(zip(pairs if len(pairs) > 1 else [None], found))

    def planned(self, variant, folder):
        """Return the settings of a `study.asked.Variant`, resolved for the model, with planned blocks for -cs auto.

        The plan is read from the folder, or made and stored there.
        """
        if not variant.auto:
            return variant.settings.resolve(self.model)
        settings, expected = variant.settings, self.command.experiment.expected_refinements
        about = {**asdict(settings), "seed": None, "expected": expected, **self.weights, "dtype": self.dtype}
        about |= {"device": str(self.device), "processes": self.processes.sharing}
        name = f"plan-{key.key(about)}.json"
        plan = self.processes.broadcast(read_json(folder.path, name, PLAN))
        usable = plan and 1 <= plan["blocks"] <= settings.fine_steps and plan["schedule"] in SCHEDULES
        if not usable or plan["made_by"] != json.loads(json.dumps(about)):
            sampler = self.sampler(settings)
            with self._explaining(settings):
                plan = make_plan(sampler, settings, expected)
            plan = self.processes.broadcast({"made_by": about, **plan})
            if self.processes.first:
                folder.write(name, pack(plan))
        print(describe_plan(plan))
        return replace(settings, coarse_steps=plan["blocks"], schedule=plan["schedule"]).resolve(self.model)

    def tasks(self, settings):
        """Return the command's `study.key.Task`s, in its order: each of these settings for each prompt and seed."""
        command, tasks, seed = self.command, [], settings[0].seed
        for i, text in enumerate(self.texts):
            # Without prompts, samples differ only by their noise.
            rising = seed if self.model.family.prompted else (seed + i) % 2**64
            for each in command.seeds or [rising]:
                start = self.starts.get(None) or self.starts.get((text, each))
                if self.starts and not start:
                    remedy = f"has no sample of {in_one_line(text, 40)!r} with seed {each}; give a run that has it"
                    raise SettingError("start_from", command.experiment.start_from, remedy)
                for own in settings:
                    if start:
                        start.check(self.model.family.shape(own.height, own.width), self.model.name)
                    sharing = self.processes.sharing if own.fixed_batch else 1  # it sets the size of a call
                    made = made_by(text, each, own, start, command=command, model=self.model, weights=self.weights,
                                   device=self.device.type, dtype=self.dtype, sharing=sharing)  # fmt: skip
                    tasks.append(Task(text, each, own, start, made))
        names = hashlib.sha256(" ".join(task.folder for task in tasks).encode()).hexdigest()
        if self.processes.broadcast(names) != names:
            what = "other prompts, settings, weights or versions than the first"
            raise Failure(f"process {self.processes.rank} has {what}; start all alike", status=2)
        return tasks

    @functools.cached_property
    def pipeline(self):
        """The pipeline, loaded when first used. Raises Failure if its files have changed in the meantime."""
        with self.processes.in_turn():
            pipeline = load_pipeline(self.model, replace(self.command.loading, device=str(self.device)))
        if key.weights(self.model, self.adapters) != self.weights:
            raise Failure(f"the files of {self.model.name} or an adapter changed while they were loaded; run it again")
        return pipeline

    @functools.cache  # noqa: B019
    def sampler(self, settings):
        """Return a `sampler.Sampler` with these settings."""
        return Sampler(self.pipeline, settings, processes=self.processes)

    @functools.cache  # noqa: B019
    def warm(self, settings):
        """Return the sampler with these settings, warmed up. Raises Failure if the model cannot be run with them."""
        sampler = self.sampler(settings)
        warn_if_cut(settings.negative_prompt, sampler.ignored(settings.negative_prompt))
        with self._explaining(settings):
            sampler.warm_up()
        return sampler

    def sample(self, task, group):
        """Make a sample, see `study.sampling.sample`. group: the tasks of its prompt and seed."""
        if task.settings in self.failures:
            raise self.failures[task.settings]
        try:
            sampler = self.warm(task.settings)
        except Failure as failure:
            self.failures[task.settings] = failure  # later samples with them fail at once
            raise
        if group is not self.group:
            prompts = self.shared.prompts if self.shared and self.shared.text == task.text else {}
            self.shared = Shared(task.text, task.seed, [self.sampler(each.settings) for each in group], prompts)
            self.group = group
        begin = functools.partial(self.processes.broadcast, task.folder) if self.processes.sharing > 1 else lambda: None
        return sample(sampler, task, self.shared, begin, self.metrics)

    def follow(self, tasks):
        """Share the ticks of each sample that the first process makes, until it dismisses the others."""
        known = {task.folder: task for task in tasks}
        while folder := self.processes.broadcast():
            task = known[folder]
            for _ in self.sampler(task.settings).iterates(task.text, task.seed, start=task.start):
                pass

    def dismiss(self):
        """Tell the processes that follow this one that there are no more samples."""
        if self.processes.sharing > 1:
            self.processes.broadcast(None)

    def explain(self, task, error):
        """Return why a sample failed, in one line. Raises an error that is a bug or stops a shared tick."""
        message = explain(task.settings, self.command.loading, error)
        message = message or (str(error) if type(error) is Failure else None)
        if not message or (self.processes.sharing > 1 and not isinstance(error, FloatingPointError)):
            raise error
        return message

    @contextlib.contextmanager
    def _explaining(self, settings):
        try:
            yield
        except Exception as error:
            if message := explain(settings, self.command.loading, error):
                raise Failure(message) from error
            why = in_one_line(f"{type(error).__name__}: {error}")
            raise ModelError(f"{self.model.name} cannot be run with its configs: {why}") from error
