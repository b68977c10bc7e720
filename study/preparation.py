"""What a run needs before its first prompt: the model, the output directory, and what an earlier run left there."""

import functools
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import diffusers
import psutil
import torch

from models.loading import MIRRORS, choose_device, choose_dtype, find_model, load_pipeline
from refinement import Trajectory
from sampler import Sampler
from settings import Failure, SettingError, split_scale
from study import preview
from study.directory import WriteError, read_run
from study.earlier import Lock
from study.fingerprint import made_by
from study.planning import describe_plan
from study.processes import wait_until
from study.record import KEPT, Record, compare, folder_names
from study.samples import label

NO_BITS = (
    "note: on this device a network call's bits depend on its other lanes, so --fixed-batch makes results equal to "
    "float rounding only"
)


class Study(NamedTuple):
    """What a run works with once it is prepared.

    samplers: one for each of the command's settings, which its samples take in turn. record: the output directory.
    left: the numbers of the samples that are to be made. seeds: of all samples. starts: what each starts from, a
    `refinement.Trajectory` or None. pending: whether another run's results are there until this one has some. metrics:
    a `study.metrics.Metrics`, or None. show: what shows a refinement's image while the run lasts, see `preview.show`,
    or None.
    """

    samplers: list
    record: Record
    left: list
    seeds: list
    starts: list
    pending: bool
    metrics: object
    show: Callable | None

    @property
    def processes(self):
        return self.samplers[0].processes


def prepare(command, processes, stack, metrics=None):
    """The command's `Study`. `stack` lets go of the output directory. metrics: `study.metrics.Metrics`, or None."""
    device, folder = processes.own_device(choose_device(command.loading)), Path(command.output_dir)
    processes.join(device.type == "cpu", command.parallel or default_parallel(command.texts, processes))
    with processes.in_turn():
        model = find_model(command.loading.model)
    dtype = str(choose_dtype(command.loading, model, device)).removeprefix("torch.")
    resolved, starts = [settings.resolve(model) for settings in command.settings], [None] * len(command.texts)
    if command.start_from is not None:
        count = len(command.swept)
        starts = kept_trajectories(command.start_from, len(command.texts) // count, processes)
        starts = [start for start in starts for _ in range(count)]
    for settings in resolved:
        for start in filter(None, starts):
            start.check(model.family.shape(settings.height, settings.width), model.name)
        check_size(settings, command.loading, model.family, device)
    metrics = metrics and metrics(command.metrics, device)
    folders = folder_names(command.texts, command.seeds, [label(each) for each in command.swept])
    seeds = [seed_of(i, command, model) for i in range(len(command.texts))]
    run, begun = processes.broadcast([secrets.token_hex(8), datetime.now().astimezone().isoformat()])
    if processes.first:
        lock = Lock(folder, run)
        # Others may still write where this process fails: then the system lets go of the lock as the last one ends.
        stack.callback(lambda: lock.release() if processes.size == 1 or processes.closed else None)
        preview.clear(folder, command.preview)
        stack.callback(preview.clear, folder)
    before = processes.broadcast(read_run(folder / "run.json").get("plans") if command.resume else None)
    plans = before if before and len(before) == len(resolved) else [None] * len(resolved)
    resolved = [
        replace(settings, coarse_steps=plan["blocks"], schedule=plan["schedule"])
        if plan and settings.coarse_steps == "auto" else settings
        for settings, plan in zip(resolved, plans)
    ]  # fmt: skip

    def earlier(settings):
        """What each result depends on, and what the directory holds of an earlier run."""
        if not processes.first:
            return processes.broadcast()
        recorded = [{**recorded_settings(command, each, processes), "dtype": dtype} for each in settings]
        adapters = [*(split_scale(lora)[0] for lora in command.loading.lora), *command.loading.textual_inversion]
        try:
            made = made_by(recorded, model, adapters, command.texts, seeds, starts)
        except OSError as error:
            raise Failure(f"{error.filename} cannot be read: {error.strerror}") from error
        return processes.broadcast([made, *compare(folder, folders, made, command.resume)])

    planned = any(settings.coarse_steps == "auto" for settings in resolved)
    found = None if planned else earlier(resolved)
    with processes.in_turn():
        pipeline = load_pipeline(model, replace(command.loading, device=str(device)))
    samplers = [
        Sampler(pipeline, settings, processes=processes, plan=plan) for settings, plan in zip(command.settings, plans)
    ]
    made, files, difference, whole = found or earlier([sampler.settings for sampler in samplers])
    about = {"run": run, "begun": begun, **describe(command, samplers, device, dtype)}
    takes_over = functools.partial(is_to_take_over, folder, run, processes)
    record = Record(
        folder, about, folders, made, files, difference, varied=varied(command, samplers), overwrite=command.overwrite,
        report=command.report, takes_over=takes_over,
    )  # fmt: skip
    left = [i for i in range(len(command.texts)) if i not in whole]
    show = functools.partial(preview.show, folder, run) if command.preview and processes.first else None
    return Study(samplers, record, left, seeds, starts, bool(files) and not command.resume, metrics, show)


def check_size(settings, loading, family, device):
    """Raise SettingError for an image that the device has no room for."""
    if loading.vae_tiling or device.type not in ("cpu", "cuda"):
        return
    on_cpu = device.type == "cpu"
    has = psutil.virtual_memory().total if on_cpu else torch.cuda.get_device_properties(device).total_memory
    needed = family.memory(settings.height, settings.width, attention=on_cpu)
    if needed > has:
        side = "height" if settings.height >= settings.width else "width"
        room = f"take {needed / 2**30:.0f} GiB or more, of {has / 2**30:.0f} here"
        remedy = f"makes images of {settings.height} x {settings.width} pixels, which {room}; give less"
        raise SettingError(side, getattr(settings, side), remedy)


def describe(command, samplers, device, dtype):
    """What `run.json` says of a run from its start on; what of it is not plain is printed."""
    first, plans = samplers[0], [sampler.plan for sampler in samplers]
    if first.model.name == MIRRORS.get(command.loading.model):
        print(f"{command.loading.model} was withdrawn from the hub by its owner; using its mirror {first.model.name}")
    for plan in filter(None, plans):
        print(describe_plan(plan))
    about = {
        "command": shlex.join(["python", "main.py", *command.argv]),
        "settings": recorded_settings(command, first.settings, first.processes) | dict.fromkeys(command.swept[0]),
        "texts": command.texts,
        "environment": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "device": str(device),
            "dtype": dtype,
            "processes": first.processes.size,
        },
        "model": {
            "name": first.model.name,
            "family": type(first.model.family).__name__,
            "prediction_type": first.grid.prediction_type,
            "native_height": first.model.family.native_size[0],
            "native_width": first.model.family.native_size[1],
        },
    }
    if any(plans):
        about["plans"] = plans
    if fixed := [sampler for sampler in samplers if sampler.settings.fixed_batch]:
        about["keeps_bits"] = all(sampler.keeps_bits() for sampler in fixed)
        if not about["keeps_bits"]:
            print(NO_BITS)
    return about


def varied(command, samplers):
    """What results say of the settings that differ in a sweep, for each sampler: a name, and values as resolved."""
    if len(samplers) == 1 and not command.swept[0]:
        return [{}]
    return [
        {"setting": label(swept), "settings": {name: getattr(sampler.settings, name) for name in swept}}
        for swept, sampler in zip(command.swept, samplers)
    ]


def seed_of(i, command, model):
    """The seed of prompt i. Without prompts, only the noise can make samples differ."""
    seed = command.settings[0].seed
    if command.seeds:
        return command.seeds[i]
    return seed if model.family.prompted else (seed + i // len(command.swept)) % 2**64


def is_to_take_over(folder, run, processes):
    """Whether this process is the first to have a set; else returns once that one has begun the run."""
    if processes.count("whole") == 1:
        return True
    while not processes.told("begun"):  # it may have much to move; the watch ends this if it has died
        time.sleep(0.2)
    if not wait_until(lambda: read_run(folder / "run.json").get("run") == run):
        raise WriteError(f"{folder} cannot be written: another process has not begun the run there")
    return False


def kept_trajectories(folder, count, processes):
    """The trajectories that an earlier run kept, one for each of `count` prompts: of each, or all of its only one.

    Raises SettingError where there are none, or as many others, or others than the first process finds.
    """
    remedy = "give the output directory of a --keep-trajectories run"
    try:
        folders = read_run(Path(folder, "run.json")).get("folders", ())
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
    loading, swept = asdict(command.loading), command.swept[0]
    return {
        "prompts": command.prompts,
        "prompt": command.prompt,
        "seeds": command.seeds and list(dict.fromkeys(command.seeds)),
        "sweep": {name: list(dict.fromkeys(each[name] for each in command.swept)) for name in swept},
        "metrics": command.metrics,
        "output_dir": command.output_dir,
        "no_ground_truth": not command.ground_truth,
        "keep_trajectories": command.keep_trajectories,
        "start_from": command.start_from,
        "parallel": processes.parallel or command.parallel,
        **asdict(settings),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in loading.items()},
    }
