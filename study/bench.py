"""The means to make samples: the model, loaded when it is first needed, and a sampler for each of the settings."""

import functools
import os
from dataclasses import replace

from asked import Arguments
from models.adapters import find_adapters
from models.loading import ModelError, choose_device, choose_dtype, find_model, load_pipeline
from models.loop import Refused
from refinement import Trajectory
from sampler import Prompt, Sampler
from settings import Failure, SettingError, in_one_line, out_of_memory
from study import key
from study.folder import read_file, read_run
from study.key import Task, made_by
from study.sampling import Shared, sample


class Bench:
    """The model of a `main.Command`, found but not yet loaded, its device, and the samples that the command asks for.

    device, dtype: those in use; dtype is a text. weights: digests of the model's and the adapters' files. variants: the
    settings and arguments of the pipeline's call to sample with, pairs, with the model's usual values.

    Raises Failure for what the model or the device cannot do.
    """

    def __init__(self, command, processes):
        key.code_digest()  # before the code can change
        loading, experiment = command.loading, command.experiment
        pairs = len(command.texts or [""]) * len(command.seeds or [0])
        self.together, count = min(experiment.batch, pairs), pairs * len(command.variants)  # of a pair, one at a time
        parallel = experiment.parallel or ("samples" if count > processes.size else "lanes")
        self.command, self.processes = command, processes
        self.device = processes.join(choose_device(loading), parallel)
        if experiment.batch > 1 and processes.sharing > 1:
            raise SettingError("batch", experiment.batch, "is not for lanes that are shared; give --parallel samples")
        with processes.in_turn():
            self.model, self.adapters = find_model(loading.model, loading.pipeline), find_adapters(loading)
        self.dtype = str(choose_dtype(loading, self.model, self.device)).removeprefix("torch.")
        self.weights = key.weights(self.model, self.adapters)
        last = functools.lru_cache(2 * experiment.batch - 1)  # of the last prompts, and seeds
        self.encoded = last(lambda text: Prompt(text, {}, self.pipeline))
        self.shared = last(lambda text, seed: Shared(replace(self.encoded(text), loops={}), seed))
        if self.model.prompted and not command.texts:
            raise Failure("argument --prompts/-p or --prompt: give one of them", status=2)
        self.variants = []
        for settings, arguments in command.variants:
            self.model.check_call(arguments)
            arguments = Arguments(self.model.usual | arguments)
            if len(sides := {"height", "width"} & arguments.keys()) == 1:  # many pipelines then use neither
                raise SettingError(*sides, arguments[min(sides)], "is one of two sides; give both")
            self.variants.append((settings.resolve(self.model), arguments))
        self.starts = self._starts()

    def _starts(self):
        """Return the trajectories of the --start-from run by prompt and seed; {} if the flag is not given."""
        folder = self.command.experiment.start_from
        if folder is None:
            return {}
        if os.path.realpath(folder) == os.path.realpath(self.command.experiment.output_dir):
            raise SettingError("start_from", folder, "is the output directory; give the directory of another run")
        try:
            samples = (read_run(folder) or {"samples": []})["samples"]
            read = lambda said: read_file(folder, f"samples/{said['folder']}/trajectory.safetensors", 2**32)
            starts = {(said["prompt"], said["seed"]): Trajectory.unpack(read(said)) for said in samples}
            if not 0 < len(starts) == len(samples):
                raise ValueError("it has no samples, or several of one prompt and seed")
            return starts
        except (OSError, ValueError) as error:
            remedy = f"is not the directory of a run that kept its trajectories ({error}); give one"
            raise SettingError("start_from", folder, remedy) from None

    def tasks(self):
        """Return the command's `study.key.Task`s, in its order: each variant for each prompt and seed."""
        command, prompted, seed = self.command, self.model.prompted, self.variants[0][0].seed
        # Without prompts, samples differ only by their noise.
        seeds = lambda i: command.seeds or [seed if prompted else (seed + i) % 2**64]
        pairs = [(text, each) for i, text in enumerate(command.texts or [""]) for each in seeds(i)]
        tasks = [self._task(text, each, *variant) for text, each in pairs for variant in self.variants]
        names = key.key([task.folder for task in tasks])
        if self.processes.broadcast(names) != names:
            raise Failure(f"process {self.processes.rank} has other prompts, settings or weights; start all alike", 2)
        return tasks

    def _task(self, text, seed, settings, arguments):
        starts = self.starts
        start = starts.get((text, seed)) if len(starts) != 1 else next(iter(starts.values()))  # one is for all samples
        if starts and not start:
            remedy = f"has no sample of {in_one_line(text, 40)!r} with seed {seed}; give a run that has it"
            raise SettingError("start_from", self.command.experiment.start_from, remedy)
        return Task(text, seed, settings, arguments, start, made_by(self, text, seed, settings, arguments, start))

    @functools.cached_property
    def pipeline(self):
        """The pipeline, loaded when first used."""
        with self.processes.in_turn():
            pipeline = load_pipeline(self.model, replace(self.command.loading, device=str(self.device)))
        tokens = pipeline.tokenizer.get_added_vocab() if self.adapters["textual_inversion"] else ()
        for token in tokens:
            if not token.startswith("<|") and not any(token in text for text in self.command.texts):
                print(f"note: no prompt names {token}")
        return pipeline

    @functools.cache  # noqa: B019
    def sampler(self, settings, arguments):
        """Return a `sampler.Sampler` with these settings and arguments of the pipeline's call."""
        processes = self.processes if self.processes.sharing > 1 else None
        return Sampler(self.pipeline, settings, arguments, processes=processes, together=self.together)

    @functools.cache  # noqa: B019
    def warm(self, settings, arguments):
        """Return the warmed-up sampler with these settings and arguments. Raises Failure if the model cannot run."""
        sampler = self.sampler(settings, arguments)
        try:
            sampler.warm_up()
        except Exception as error:
            why = f"{type(error).__name__}: {in_one_line(error)}"
            raise failure_of(error) or ModelError(f"{self.model.name} cannot be run with its configs: {why}") from error
        return sampler

    def sample(self, task, say):
        """Make a sample, see `study.sampling.sample`."""
        # Several side by side would each warm it up, in calls that they share.
        sampler = (self.sampler if self.command.experiment.batch > 1 else self.warm)(task.settings, task.arguments)
        if task.start:  # before its ground truth is made
            task.start.check(sampler.shape)
        return sample(sampler, task, self.shared(task.text, task.seed), say)

    def follow(self, tasks):
        """Share the ticks of each sample that the first process makes, until there are no more."""
        known = {task.folder: task for task in tasks}
        while folder := self.processes.broadcast():
            task = known[folder]
            self.processes.serve(self.sampler(task.settings, task.arguments).loop(task.text, task.seed))

    def explain(self, error):
        """Return why a sample failed, in one line. Raises an error that is a bug or that ends the run."""
        failure = failure_of(error)
        of_sample = type(failure) is Failure or (isinstance(failure, Refused) and len(self.command.variants) > 1)
        # Processes that share lanes are still in step if a sample is not finite, but not after another error.
        in_step = self.processes.sharing == 1 or isinstance(error, FloatingPointError)
        if not of_sample or not in_step:
            raise failure or error
        return in_one_line(failure, 1000)


def failure_of(error):
    """Return a Failure that says what went wrong in the network or on the device, and a remedy; None for a bug."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, FloatingPointError):
        of_dtype = "float32" not in str(error)
        remedy = "--dtype bfloat16 or float32" if of_dtype else "other settings, such as a lower --guidance-scale"
        return Failure(f"{error}; try {remedy}")
    if out_of_memory(error):
        return Failure("out of memory; try a smaller --max-batch, a smaller image, or --offload on a GPU")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return Failure(f"argument --compile: torch cannot compile here ({in_one_line(error)}); leave it out")
    return None
