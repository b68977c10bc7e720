"""What a run needs before its first prompt: the model, the output directory, and what an earlier run left there."""

import functools
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from models.loading import choose_device, choose_dtype, find_model, load_pipeline
from refinement import Trajectory
from sampler import Sampler
from settings import Failure, SettingError, split_scale
from study import preview
from study.comparison import compare
from study.description import describe, recorded_settings, varied
from study.directory import WriteError, read_run
from study.earlier import Lock
from study.fingerprint import made_by
from study.processes import wait_until
from study.record import KEPT, Record, folder_names
from study.samples import combinations, label
from study.sampling import explain

SMALLEST = 32  # pixels that the network of LPIPS leaves something of


class Study(NamedTuple):
    """What a run works with once it is prepared.

    samplers: one for each of the command's settings, which its samples take in turn. failing: why some of these cannot
    be used, a line by number. record: the output directory. left: the numbers of the samples that are to be made.
    seeds: of all samples. starts: what each starts from, a `refinement.Trajectory` or None. pending: whether another
    run's results are there until this one has some. metrics: a `study.metrics.Metrics`, or None. show: what shows a
    refinement's image while the run lasts, see `preview.show`, or None.
    """

    samplers: list
    failing: dict
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


def prepare(command, processes, stack, measures=None):
    """The command's `Study`. `stack` lets go of the output directory. measures: `study.metrics.Metrics`, or None."""
    device, folder = processes.own_device(choose_device(command.loading)), Path(command.output_dir)
    pairs = len(command.texts) // len(command.swept)
    processes.join(device.type == "cpu", command.parallel or ("prompts" if pairs > processes.size else "lanes"))
    with processes.in_turn():
        model = find_model(command.loading.model)
    dtype = str(choose_dtype(command.loading, model, device)).removeprefix("torch.")
    resolved, starts = [settings.resolve(model) for settings in command.settings], kept_starts(command, processes)
    check_model(command, resolved, starts, model, device)
    with processes.in_turn():
        measured = processes.first or processes.parallel == "prompts"
        metrics = measures(command.metrics) if measures and measured else None
    folders = folder_names(command.texts, command.seeds, [label(each) for each in command.swept])
    seeds = [seed_of(i, command, model) for i in range(len(command.texts))]
    run, begun = processes.broadcast([secrets.token_hex(8), datetime.now().astimezone().isoformat()])
    if processes.first:
        lock = Lock(folder, run)
        # Others may still write where this process fails: then the system lets go of the lock as the last one ends.
        stack.callback(lambda: lock.release() if processes.size == 1 or processes.closed else None)
        preview.clear(folder, command.preview)
        stack.callback(preview.clear, folder)
    plans = processes.broadcast(kept_plans(read_run(folder / "run.json") if command.resume else {}, command.swept))
    resolved = [planned(settings, plan) for settings, plan in zip(resolved, plans)]
    earlier = functools.partial(find_earlier, command, processes, model, dtype, folders, seeds, starts)
    found = None if any(settings.coarse_steps == "auto" for settings in resolved) else earlier(resolved)
    with processes.in_turn():
        pipeline = load_pipeline(model, replace(command.loading, device=str(device)))
    samplers, failing = make_samplers(command, pipeline, processes, plans)
    used = [resolved[i] if i in failing else sampler.settings for i, sampler in enumerate(samplers)]
    made, folders, files, difference, whole = found or earlier(used)
    about = {"run": run, "begun": begun, **describe(command, samplers, device, dtype)}
    record = Record(
        folder, about, folders, made, files, difference, varied=varied(command.swept, used),
        overwrite=command.overwrite, report=command.report,
        takes_over=functools.partial(is_to_take_over, folder, run, processes),
    )  # fmt: skip
    left = [i for i in range(len(command.texts)) if i not in whole]
    show = functools.partial(preview.show, folder, run) if command.preview and processes.first else None
    return Study(samplers, failing, record, left, seeds, starts, bool(files) and not command.resume, metrics, show)


def find_earlier(command, processes, model, dtype, folders, seeds, starts, resolved):
    """What each sample's result depends on, and what the directory has of an earlier run, see `comparison.compare`."""
    if not processes.first:
        return processes.broadcast()
    recorded = [{**recorded_settings(command, each, processes), "dtype": dtype} for each in resolved]
    adapters = [*(split_scale(lora)[0] for lora in command.loading.lora), *command.loading.textual_inversion]
    try:
        made = made_by(recorded, model, adapters, command.texts, seeds, starts)
    except OSError as error:
        raise Failure(f"{error.filename} cannot be read: {error.strerror}") from error
    return processes.broadcast([made, *compare(Path(command.output_dir), folders, made, command.resume)])


def kept_plans(record, swept):
    """The plan that an earlier run, as its `run.json` has it, has made for each combination of a sweep, or None."""
    settings = record.get("settings", {})
    known = [
        (settings | old, plan) for old, plan in zip(combinations(settings.get("sweep", {})), record.get("plans", ()))
    ]
    same = lambda old, new: all(old.get(name) == new[name] for name in new.keys() - {"coarse_steps", "schedule"})
    return [next((plan for old, plan in known if plan and same(old, new)), None) for new in swept]


def planned(settings, plan):
    """Settings as an earlier run has planned them, where they are those of a plan."""
    if not plan or settings.coarse_steps != "auto":
        return settings
    return replace(settings, coarse_steps=plan["blocks"], schedule=plan["schedule"])


def make_samplers(command, pipeline, processes, plans):
    """A sampler for each of the command's settings, and why some of a sweep's cannot be planned, a line by number."""
    samplers, failing = [], {}
    for which, (settings, plan) in enumerate(zip(command.settings, plans)):
        try:
            samplers.append(Sampler(pipeline, settings, processes=processes, plan=plan))
        except Exception as error:
            failing[which] = explain(settings, command.loading, error)
            if not failing[which] or len(command.settings) == 1 or processes.size > 1:
                raise
            samplers.append(Sampler(pipeline, replace(settings, coarse_steps=1), processes=processes))
    return samplers, failing


def check_model(command, resolved, starts, model, device):
    """Raise SettingError for what the model, or the device, cannot do; `resolved` are the settings for it."""
    family, distinct = model.family, {id(start): start for start in starts if start}.values()  # one may be all samples'
    if command.seeds and not family.prompted and len({*command.texts}) > 1:
        remedy = f"makes the same samples for each line, as {model.name} reads no prompts; give one line"
        raise SettingError("seeds", ",".join(map(str, dict.fromkeys(command.seeds))), remedy)
    if "clip" in command.metrics and not family.prompted:
        raise SettingError("metrics", "clip", f"scores prompts, and {model.name} reads none; leave it out")
    for settings in resolved:
        if "lpips" in command.metrics and min(settings.height, settings.width) < SMALLEST:
            raise SettingError("metrics", "lpips", f"needs images of {SMALLEST} pixels or more a side; leave it out")
        for start in distinct:
            start.check(family.shape(settings.height, settings.width), model.name)
        check_size(settings, command.loading, family, device)


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


def seed_of(i, command, model):
    """The seed of sample i. Without prompts, only the noise can make samples differ."""
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


def kept_starts(command, processes):
    """What each sample starts from, a `refinement.Trajectory` or None: all from an earlier run's only one, or each from
    that of its prompt and seed, or from its own of the same sweep.

    Raises SettingError where there are none, or as many others, or others than the first process finds.
    """
    folder, settings = command.start_from, len(command.swept)
    remedy = "give the output directory of a --keep-trajectories run"
    if folder is None:
        return [None] * len(command.texts)
    record, pairs = read_run(Path(folder, "run.json")), len(command.texts) // settings
    swept = math.prod(map(len, record.get("settings", {}).get("sweep", {}).values()))
    try:
        found = [Trajectory.read(Path(folder, name, KEPT)) for name in record.get("folders", ())]
    except (ValueError, TypeError) as error:
        raise SettingError("start_from", folder, f"does not serve: {error}; {remedy}") from None
    if not found:
        raise SettingError("start_from", folder, f"holds no run; {remedy}")
    if swept > 1 and (swept, len(found)) != (settings, len(command.texts)):
        raise SettingError("start_from", folder, "is of another sweep; give a run of one setting, or of this sweep")
    if swept == 1 and len(found) not in (1, pairs):
        remedy = f"has {len(found)} prompts; give a run of one, or of {pairs} as here"
        raise SettingError("start_from", folder, remedy)
    if processes.size > 1:
        digests = [start.digest for start in found]
        if processes.broadcast(digests) != digests:
            remedy = "holds other trajectories than the first process finds; give one directory that all share"
            raise SettingError("start_from", folder, remedy)
    return [start for start in found for _ in range(len(command.texts) // len(found))]
