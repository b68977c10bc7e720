"""One run of the command: the model, the prompts that are left, each prompt's files."""

import contextlib
import functools
import secrets
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import diffusers
import psutil
import torch
from tqdm import tqdm

import utils
from models.loading import MIRRORS, choose_device, choose_dtype, find_model, load_pipeline
from refinement import Trajectory, difference
from sampler import Sampler
from settings import Failure, SettingError, in_one_line, out_of_memory, split_scale
from study.directory import Lock, WriteError, is_locked_by, read
from study.fingerprint import made_by
from study.planning import describe_plan
from study.processes import ProcessError, wait_until
from study.record import KEPT, Record, compare


def run(command, processes):
    """Load, sample and write what a `main.Command` asks for. What can fail without being a bug ends in a Failure."""
    try:
        processes.check_alike(without_places(command))
        with contextlib.ExitStack() as stack:
            sampler, record, left, starts, pending = load(command, processes, stack)
            if left:
                sampler.warm_up()
            if processes.first and not pending:
                record.begin()
            if processes.parallel == "prompts":
                check_shared(record.folder, record.about["run"])
            sample_all(command, sampler, record, left, starts)
        processes.close()
    except Failure:
        raise
    except Exception as error:
        message = explain(command, error)
        if not message:
            raise
        raise Failure(message) from error


def without_places(command):
    """What all processes of a launch must have been given alike; folders may have other names on other machines."""
    same = command.texts, command.ground_truth, command.resume, command.parallel, command.keep_trajectories
    return [asdict(command.settings), asdict(command.loading), bool(command.start_from), command.overwrite, *same]


def load(command, processes, stack):
    """The command's sampler, record, and numbers of the prompts that are left; what each prompt starts from; and
    whether another run's results are there until this one has some.

    What a prompt starts from is a `refinement.Trajectory`, or None. `stack` lets go of the output directory.
    """
    device, folder = processes.own_device(choose_device(command.loading)), Path(command.output_dir)
    processes.join(device.type == "cpu", command.parallel or default_parallel(command.texts, processes))
    with processes.in_turn():
        model = find_model(command.loading.model)
    dtype = str(choose_dtype(command.loading, model, device)).removeprefix("torch.")
    resolved, starts = command.settings.resolve(model), [None] * len(command.texts)
    if command.start_from is not None:
        starts = kept_trajectories(command.start_from, len(command.texts), processes)
        for start in starts:
            start.check(model.family.shape(resolved.height, resolved.width), model.name)
    check_size(resolved, command.loading, model.family, device)
    run, begun = processes.broadcast([secrets.token_hex(8), datetime.now().astimezone().isoformat()])
    if processes.first:
        stack.callback(Lock(folder, run).release)
    plan = processes.broadcast(read(folder / "run.json").get("plan") if command.resume else None)
    if plan and resolved.coarse_steps == "auto":
        resolved = replace(resolved, coarse_steps=plan["blocks"], schedule=plan["schedule"])

    def earlier(settings):
        """What each result depends on, and what the directory holds of an earlier run."""
        if not processes.first:
            return processes.broadcast()
        recorded = {**recorded_settings(command, settings, processes), "dtype": dtype}
        each = command.texts, [seed_of(i, settings, model) for i in range(len(command.texts))], starts
        adapters = [*(split_scale(lora)[0] for lora in command.loading.lora), *command.loading.textual_inversion]
        made = made_by(recorded, model, adapters, *each)
        return processes.broadcast([made, *compare(folder, command.texts, made, command.resume)])

    found = None if resolved.coarse_steps == "auto" else earlier(resolved)
    with processes.in_turn():
        pipeline = load_pipeline(model, replace(command.loading, device=str(device)))
    sampler = Sampler(pipeline, command.settings, processes=processes, plan=plan)
    made, files, difference, whole = found or earlier(sampler.settings)
    name = sampler.model.name
    if name == MIRRORS.get(command.loading.model):
        print(f"{command.loading.model} was withdrawn from the hub by its owner; using its mirror {name}")
    if sampler.plan:
        print(describe_plan(sampler.plan))
    settings = recorded_settings(command, sampler.settings, processes)
    about = {"run": run, "begun": begun, "settings": settings, "texts": command.texts}
    about |= surroundings(sampler, device, dtype) | ({"plan": sampler.plan} if sampler.plan else {})
    takes_over = functools.partial(is_to_take_over, folder, run, processes)
    record = Record(folder, about, command.texts, made, files, difference, command.overwrite, takes_over)
    left = [i for i in range(len(command.texts)) if i not in whole]
    return sampler, record, left, starts, files and not command.resume


def check_size(settings, loading, family, device):
    """Raise SettingError for an image that the device has no room for."""
    has = {"cuda": lambda: torch.cuda.get_device_properties(device).total_memory, "cpu": cpu_memory}
    needed = family.memory(settings.height, settings.width, attention=device.type == "cpu")
    if device.type in has and needed > has[device.type]() and not loading.vae_tiling:
        side = "height" if settings.height >= settings.width else "width"
        room = f"take {needed / 2**30:.0f} GiB or more, of {has[device.type]() / 2**30:.0f} here"
        remedy = f"makes images of {settings.height} x {settings.width} pixels, which {room}; give less"
        raise SettingError(side, getattr(settings, side), remedy)


def cpu_memory():
    """Bytes of memory that this machine has."""
    return psutil.virtual_memory().total


def surroundings(sampler, device, dtype):
    """What `run.json` says of the machine and the model."""
    model = sampler.model
    return {
        "environment": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "device": str(device),
            "dtype": dtype,
            "processes": sampler.processes.size,
        },
        "model": {
            "name": model.name,
            "family": type(model.family).__name__,
            "prediction_type": sampler.grid.prediction_type,
            "native_height": model.family.native_size[0],
            "native_width": model.family.native_size[1],
        },
    }


def seed_of(i, settings, model):
    """The seed of prompt i. Without prompts, only the noise can make samples differ."""
    return settings.seed if model.family.prompted else (settings.seed + i) % 2**64


def is_to_take_over(folder, run, processes):
    """Whether this process is the first to have a set; else returns once that one has begun the run."""
    if processes.count("whole") == 1:
        return True
    if not wait_until(lambda: read(folder / "run.json").get("run") == run):
        raise WriteError(f"{folder} cannot be written: another process has not begun the run there")
    return False


def kept_trajectories(folder, count, processes):
    """The trajectories that an earlier run kept, one for each of `count` prompts: of each, or all of its only one.

    Raises SettingError where there are none, or as many others, or others than the first process finds.
    """
    folders, remedy = (
        read(Path(folder, "run.json")).get("folders", ()),
        "give the output directory of a --keep-trajectories run",
    )
    try:
        found = [Trajectory.read(Path(folder, name, KEPT)) for name in folders]
    except (ValueError, TypeError) as error:
        raise SettingError("start_from", folder, f"does not serve: {error}; {remedy}") from None
    if not found:
        raise SettingError("start_from", folder, f"holds no run; {remedy}")
    if len(found) not in (1, count):
        raise SettingError("start_from", folder, f"has {len(found)} prompts; give a run of one, or of {count} as here")
    if processes.size > 1:
        digests = [start.digest for start in found]
        if processes.broadcast(digests) != digests:
            remedy = "holds other trajectories than the first process finds; give one directory that all share"
            raise SettingError("start_from", folder, remedy)
    return found * count if len(found) == 1 else found


def default_parallel(texts, processes):
    """What several processes share where they are not told."""
    return "prompts" if len(texts) > processes.size else "lanes"


def recorded_settings(command, settings, processes):
    """The settings as `run.json` has them, as JSON reads them back."""
    loading = asdict(command.loading)
    return {
        "prompts": command.prompts,
        "prompt": command.prompt,
        "output_dir": command.output_dir,
        "no_ground_truth": not command.ground_truth,
        "keep_trajectories": command.keep_trajectories,
        "start_from": command.start_from,
        "parallel": processes.parallel or command.parallel,
        **asdict(settings),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in loading.items()},
    }


def check_shared(folder, run):
    """Raise SettingError unless this process sees the output directory that the first one has locked for the run."""
    if not wait_until(lambda: is_locked_by(folder, run)):
        remedy = "is not one directory for all machines; give one that they share, or --parallel lanes"
        raise SettingError("output_dir", str(folder), remedy)


def explain(command, error):
    """What went wrong in the network or on the device, and the remedy, in one line; None for a bug."""
    settings, loading = command.settings, command.loading
    if isinstance(error, FloatingPointError):
        if "float32" in str(error):
            return f"{error}; try other settings, such as a lower --guidance-scale, or other weights"
        return f"argument --dtype: {loading.dtype!r}: {error}; try --dtype float32 or bfloat16"
    if out_of_memory(error):
        nowhere = loading.device == "cpu" or not torch.accelerator.is_available()
        useless = {"a smaller --max-batch": settings.max_batch == 1, "--offload": loading.offload or nowhere}
        remedies = [remedy for remedy in useless if not useless[remedy]]
        return f"out of memory; try {' or '.join([*remedies, 'a smaller image'])}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"argument --compile: torch cannot compile here ({in_one_line(error)}); leave it out"


def sample_all(command, sampler, record, left, starts):
    """Sample the prompts that are left, by number, and write their files. A prompt that fails does not end the run.

    starts: of each prompt, see `load`.
    """
    texts, processes = command.texts, sampler.processes
    if len(left) < len(texts):
        print(f"{len(texts) - len(left)} of {len(texts)} prompts are complete")
    try:
        if processes.parallel == "lanes" and not processes.first:
            return follow(sampler, starts)
        if not sampler.model.family.prompted and len(texts) > 1:
            print(f"{sampler.model.name} reads no prompts: seeds rise from {sampler.settings.seed}, one a line")
        if command.settings.negative_prompt:
            warn_if_cut(command.settings.negative_prompt, sampler.ignored(command.settings.negative_prompt))
        with tqdm(desc="prompts", total=len(left), unit="prompt", disable=None) as bar:
            for i in processes.take(left):
                tqdm.write(f"prompt {i + 1} of {len(texts)}: {in_one_line(texts[i])}")
                seed = seed_of(i, sampler.settings, sampler.model)
                try:
                    result, refinement, *files = sample(sampler, texts[i], seed, command.ground_truth, starts[i], i)
                    trajectory = sampler.trajectory(refinement.states, seed) if command.keep_trajectories else None
                    said = record.add(i, result, *files, trajectory)
                    if said:
                        tqdm.write(said)
                except (WriteError, ProcessError):
                    raise
                except Exception as error:
                    message = explain(command, error)
                    if not message or processes.broken:
                        raise
                    processes.tell(f"failed/{i}", [seed, message])
                    tqdm.write(f"  failed: {in_one_line(message, 1000)}")
                bar.n = processes.count("sampled")
                bar.refresh()
            while processes.first and bar.n < len(left):
                time.sleep(0.5)
                bar.n = processes.count("sampled", 0)
                bar.refresh()
        if processes.parallel == "lanes":
            processes.broadcast(None)
        if processes.first:
            sum_up(command, record, left, processes)
    except KeyboardInterrupt:
        results = record.save() if processes.first else record.results()
        complete = sum("error" not in result for result in results)
        message = f"interrupted; {complete} of {len(texts)} prompts are complete in {command.output_dir}"
        raise Failure(message, status=130) from None


def follow(sampler, starts):
    """Take part in the ticks of each prompt that the first process samples, until it says that there are no more."""
    while called := sampler.processes.broadcast():
        text, seed, i = called
        prompt = sampler.encode(text)
        sampler.processes.wait()
        for _ in sampler.iterates(prompt, seed, start=starts[i]):
            pass


def sample(sampler, text, seed, ground_truth, start, i):
    """One prompt's entry in `run.json`, last refinement, images by file name, trajectory errors (None without truth).

    start: a `refinement.Trajectory`, or None. i: the prompt's number.
    """
    settings, processes = sampler.settings, sampler.processes
    prompt, images, truth, errors = sampler.encode(text), {}, None, None
    warn_if_cut(text, prompt.ignored)
    if start and start.seed != seed:
        tqdm.write(
            f"  note: what it starts from has seed {start.seed}, not {seed}; other noise costs more than it saves"
        )
    if ground_truth:
        with ticking("ground truth", settings.fine_steps) as on_tick:
            truth, errors = sampler.sequential(prompt, seed, on_tick=on_tick), []
        images["srds_ddim_gt"] = truth.image
        images["srds_ddim_course"] = sampler.sequential(prompt, seed, coarse=True).image
    if processes.parallel == "lanes":
        processes.call([text, seed, i])  # they encode the prompt first: that is not the sampler's time

    iterations = []
    most = None if settings.schedule == "sweep" else settings.fine_steps
    with contextlib.ExitStack() as stack:
        on_tick = stack.enter_context(ticking(settings.method, most))
        for refinement in stack.enter_context(contextlib.closing(sampler.refine(prompt, seed, on_tick, start))):
            images["srds_initialized" if refinement.k == 0 else f"srds_iteration_{refinement.k - 1}"] = refinement.image
            iterations.append(iteration_entry(refinement, truth))
            if truth:
                errors.append((refinement.states - truth.states)[1:].cpu().double().flatten(1).norm(dim=1).tolist())
            tqdm.write(utils.report(iterations[-1], refinement.verdict))
    images["srds_final"] = refinement.image

    if not refinement.settled:
        tqdm.write(
            f"  note: it did not settle within {settings.fine_steps} serial evaluations, which is what the sequential "
            "sampler takes; that one is better here"
        )
    unsettled = refinement.trajectory_change is not None and refinement.trajectory_change >= settings.tolerance
    if settings.stop_rule == "final" and refinement.stop_reason == "tolerance" and unsettled:
        tqdm.write(
            f"  note: the image has settled, but the trajectory still changes by {refinement.trajectory_change:.3f}; "
            "--stop-rule trajectory waits for both"
        )
    last = iterations[-1]
    result = {
        "prompt": text,
        "ignored": prompt.ignored or None,
        "seed": seed,
        "converged": refinement.stop_reason != "max-iterations",
        "stop_reason": refinement.stop_reason,
        **{key: last[key] for key in ("serial_evaluations", "total_evaluations", "image_error", "trajectory_change")},
        "damping": max(entry["damping"] for entry in iterations),
        "seconds": {"srds": refinement.seconds, "ground_truth": truth.seconds if truth else None},
        "iterations": iterations,
    }
    return result, refinement, images, errors


def iteration_entry(refinement, truth):
    """A refinement as `result.json` has it."""
    return {
        "iteration": refinement.k - 1,
        "serial_evaluations": refinement.serial_evaluations,
        "total_evaluations": refinement.total_evaluations,
        "image_change": refinement.image_change,
        "trajectory_change": refinement.trajectory_change,
        "predicted_change": refinement.predicted_change,
        "damping": refinement.damping,
        "image_error": difference(refinement.image, truth.image) if truth else None,
    }


def warn_if_cut(text, ignored):
    """Say what the model's limit in tokens cuts from a text, if it does."""
    if ignored:
        cut = in_one_line(ignored) + "..." * (len(ignored) > 200)
        tqdm.write(f"warning: {text[:20]!r}... is longer than the model reads; ignored: {cut!r}", file=sys.stderr)


@contextlib.contextmanager
def ticking(name, most):
    """A progress bar of network calls, at `most` so many; to be called at each."""
    with tqdm(desc=name, total=most, unit="tick", leave=False, disable=None) as bar:
        yield bar.update


def sum_up(command, record, left, processes):
    """Write the overview and print the closing table; raises Failure where a prompt failed."""

    def gather():
        for i in left:
            if told := processes.told(f"failed/{i}"):
                record.fail(i, *told)
        return len(record.results()) == len(command.texts)

    if not gather() and processes.size > 1:
        wait_until(gather)  # until what others have written shows up here
    results = record.finish()
    print(utils.summary(results, command.settings.fine_steps))
    failures = [result["error"] for result in results if "error" in result]
    if failures:
        raise Failure(f"{len(failures)} of {len(command.texts)} prompts failed; the first: {failures[0]}")
