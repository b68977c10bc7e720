"""One run of the command: the samples that are left, each one's files, the closing table."""

import contextlib
import functools
import time
from dataclasses import asdict

from tqdm import tqdm

from models.loading import ModelError
from settings import Failure, SettingError, in_one_line
from study.directory import WriteError
from study.earlier import is_locked_by
from study.forecast import Forecast
from study.preparation import prepare
from study.processes import ProcessError, wait_until
from study.results import summary
from study.samples import label
from study.sampling import Shared, explain, sample, warn_if_cut


def run(command, processes, metrics=None):
    """Load, sample and write what a `main.Command` asks for. What can fail without being a bug ends in a Failure.

    metrics: `study.metrics.Metrics`, where the command asks for some, as it takes a second to import.
    """
    try:
        processes.check_alike(without_places(command))
        with contextlib.ExitStack() as stack:
            study = prepare(command, processes, stack, metrics)
            failing = try_out(command, study) if study.left else {}
            if processes.first and not study.pending:
                study.record.begin()
            if processes.parallel == "prompts":
                check_shared(study.record.folder, study.record.about["run"])
            sample_all(command, study, failing)
            processes.close()
    except Failure:
        raise
    except Exception as error:
        message = explain(command.settings[0], command.loading, error)
        if not message:
            raise
        raise Failure(message) from error


def try_out(command, study):
    """Warm up. Returns what fails at some of a sweep's settings, a line by number; what fails at all is raised.

    Where all that is put in is the model's own, it is told as the model's failure.
    """
    failing, warm = {which: Failure(message) for which, message in study.failing.items()}, {}
    for which, (settings, sampler) in enumerate(zip(command.settings, study.samplers)):
        calls = *sampler.encoded_for, sampler.widest, settings.max_batch, settings.fixed_batch
        if which not in failing and calls not in warm:
            warm[calls] = warm_up(sampler, settings, command.loading)
        if failure := warm.get(calls):
            failing.setdefault(which, failure)
    if len(failing) == len(study.samplers):
        raise failing[0]
    return {which: str(failure) for which, failure in failing.items()}


def warm_up(sampler, settings, loading):
    """Warm up; returns why that cannot be, a Failure, or None."""
    try:
        sampler.warm_up()
    except Failure as failure:
        return failure
    except Exception as error:
        why = in_one_line(f"{type(error).__name__}: {error}")
        unknown = f"{sampler.model.name}: it cannot be run with what its configs say: {why}"
        failure = ModelError(explain(settings, loading, error) or unknown)
        failure.__cause__ = error
        return failure


def without_places(command):
    """What all processes of a launch must have been given alike; folders may have other names on other machines."""
    asked = command.ground_truth, command.resume, command.overwrite, command.keep_trajectories, command.parallel
    settings = [*map(asdict, command.settings)], asdict(command.loading), bool(command.start_from), command.metrics
    return [*settings, command.texts, command.seeds, *asked]


def check_shared(folder, run):
    """Raise SettingError unless this process sees the output directory that the first one has locked for the run."""
    if not wait_until(lambda: is_locked_by(folder, run)):
        remedy = "is not one directory for all machines; give one that they share, or --parallel lanes"
        raise SettingError("output_dir", str(folder), remedy)


def sample_all(command, study, failing):
    """Sample what is left, by number, and write its files. A sample that fails does not end the run.

    failing: why the settings of some samples cannot be used, by number.
    """
    processes, left, count = study.processes, study.left, len(command.texts)
    if len(left) < count:
        print(f"{count - len(left)} of {count} {command.kind} are complete")
    try:
        if processes.parallel == "lanes" and not processes.first:
            return follow(study)
        announce(command, study)
        steps, dealt = [each.settings.fine_steps for each in study.samplers], processes.parallel == "prompts"
        forecast, shared = Forecast(left, steps, processes.size if dealt else 1), None
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        with tqdm(desc=command.kind, total=len(left), bar_format=layout, disable=None) as bar:
            for group in processes.take(together(left, len(study.samplers))):
                text, seed = command.texts[group[0]], study.seeds[group[0]]
                prompts = shared.prompts if shared and shared.text == text else {}
                shared = Shared(text, seed, study.samplers, prompts)
                for i in group:
                    known = forecast.known
                    attempt(command, study, shared, i, failing, forecast)
                    bar.n = processes.count("sampled")
                    bar.set_postfix_str(forecast.time_left(), False)
                    bar.refresh()
                    if forecast.known > known and 1 < len(study.samplers) < len(left):
                        tqdm.write(f"foretold from one sample of each: {forecast}")
            while processes.first and bar.n < len(left):
                time.sleep(0.5)
                bar.n = processes.count("sampled", 0)
                bar.refresh()
        if processes.parallel == "lanes":
            processes.broadcast(None)
        if processes.first:
            sum_up(command, study)
    except KeyboardInterrupt:
        results = study.record.save() if processes.first else study.record.results()
        complete = sum("error" not in result for result in results)
        message = f"interrupted; {complete} of {count} {command.kind} are complete in {command.output_dir}"
        raise Failure(message, status=130) from None


def announce(command, study):
    """Say what is about to be sampled, where that is not plain."""
    family, asked = study.samplers[0].model.family, command.settings[0]
    count, pairs = len(study.samplers), len(command.texts) // len(study.samplers)
    if not family.prompted and pairs > 1 and not command.seeds:
        print(f"{in_one_line(study.samplers[0].model.name)} reads no prompts: seeds rise from {asked.seed}, one a line")
    for negative in {settings.negative_prompt for settings in command.settings} - {""}:
        warn_if_cut(negative, study.samplers[0].ignored(negative))
    if count > 1:
        truths = [each for group in together(study.left, count) for each in truths_of(group, study.samplers)]
        shared = f"; {len(truths)} ground truths, {sum(truths)} evaluations" if command.ground_truth else ""
        print(f"sweep: {count} settings of {pairs} samples, {len(study.left)} to sample{shared}")


def truths_of(group, samplers):
    """Evaluations of each ground truth of a group of samples, by their numbers."""
    own = [samplers[i % len(samplers)] for i in group]
    return {sampler.truth_depends_on: sampler.settings.fine_steps for sampler in own}.values()


def together(left, settings):
    """Numbers of samples in groups of one prompt and seed, whose settings are next to each other."""
    groups = {}
    for i in left:
        groups.setdefault(i // settings, []).append(i)
    return [*groups.values()]


def attempt(command, study, shared, i, failing, forecast):
    """Sample number i and write its files, or note why it failed."""
    which, processes, record = i % len(study.samplers), study.processes, study.record
    sampler, started, evaluations = study.samplers[which], time.monotonic(), 0
    named = [in_one_line(shared.text), *([f"seed {shared.seed}"] if command.seeds else [])]
    named += [label(command.swept[which])] if len(study.samplers) > 1 else []
    tqdm.write(f"{command.kind[:-1]} {i + 1} of {len(command.texts)}: {', '.join(named)}")
    try:
        if which in failing:
            raise Failure(failing[which])
        result, refinement, *files = sample(
            sampler, shared, i, ground_truth=command.ground_truth, start=study.starts[i], metrics=study.metrics,
            show=study.show and functools.partial(study.show, named),
        )  # fmt: skip
        trajectory = sampler.trajectory(refinement.states, shared.seed) if command.keep_trajectories else None
        said = record.add(i, result, *files, trajectory)
        evaluations = result["total_evaluations"]
        processes.tell("begun", True)
        if said:
            tqdm.write(said)
    except (WriteError, ProcessError):
        raise
    except Exception as error:
        message = failing.get(which) or explain(command.settings[which], command.loading, error)
        if not message or processes.broken:
            raise
        processes.tell(f"failed/{i}", [shared.seed, message])
        tqdm.write(f"  failed: {in_one_line(message, 1000)}")
    forecast.add(i, time.monotonic() - started, evaluations)


def follow(study):
    """Take part in the ticks of each sample that the first process makes, until it says that there are no more."""
    while called := study.processes.broadcast():
        text, seed, i = called
        sampler = study.samplers[i % len(study.samplers)]
        prompt = sampler.encode(text)
        study.processes.wait()
        for _ in sampler.iterates(prompt, seed, start=study.starts[i]):
            pass


def sum_up(command, study):
    """Write the overview and print the closing table; raises Failure where a sample failed."""
    record, processes = study.record, study.processes

    def gather():
        for i in study.left:
            if failed := processes.told(f"failed/{i}"):
                record.fail(i, *failed)
        return len(record.results()) == len(command.texts)

    if processes.size > 1:
        wait_until(lambda: record.begun or not processes.told("begun"))
    if not gather() and processes.size > 1:
        wait_until(gather)  # what others have written shows up here
    results = record.finish()
    print(summary(results, record.about))
    failures = [result for result in results if "error" in result]
    if failures:
        first = f"the first{', of ' * ('setting' in failures[0])}{failures[0].get('setting', '')}"
        failed = f"{len(failures)} of {len(command.texts)} {command.kind} failed"
        raise Failure(f"{failed}; {first}: {failures[0]['error']}")
