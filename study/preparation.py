"""What a run needs before its first prompt: the model, the output directory, and what an earlier run left there."""

import functools
import secrets
import shlex
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import diffusers
import psutil
import torch

from models.loading import MIRRORS, choose_device, choose_dtype, find_model, load_pipeline
from refinement import Trajectory
from sampler import Sampler
from settings import Failure, SettingError, split_scale
from study.directory import WriteError, read_run
from study.earlier import Lock
from study.fingerprint import made_by
from study.planning import describe_plan
from study.processes import wait_until
from study.record import KEPT, Record, compare, folder_names

NO_BITS = (
    "note: on this device a network call's bits depend on its other lanes, so --fixed-batch makes results equal to "
    "float rounding only"
)


def prepare(command, processes, stack):
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
    folders = folder_names(command.texts, command.seeds)
    check_size(resolved, command.loading, model.family, device)
    run, begun = processes.broadcast([secrets.token_hex(8), datetime.now().astimezone().isoformat()])
    if processes.first:
        lock = Lock(folder, run)
        # Others may still write where this process fails: then the system lets go of the lock as the last one ends.
        stack.callback(lambda: lock.release() if processes.size == 1 or processes.closed else None)
    plan = processes.broadcast(read_run(folder / "run.json").get("plan") if command.resume else None)
    if plan and resolved.coarse_steps == "auto":
        resolved = replace(resolved, coarse_steps=plan["blocks"], schedule=plan["schedule"])

    def earlier(settings):
        """What each result depends on, and what the directory holds of an earlier run."""
        if not processes.first:
            return processes.broadcast()
        recorded = {**recorded_settings(command, settings, processes), "dtype": dtype}
        each = command.texts, [seed_of(i, command, model) for i in range(len(command.texts))], starts
        adapters = [*(split_scale(lora)[0] for lora in command.loading.lora), *command.loading.textual_inversion]
        try:
            made = made_by(recorded, model, adapters, *each)
        except OSError as error:
            raise Failure(f"{error.filename} cannot be read: {error.strerror}") from error
        return processes.broadcast([made, *compare(folder, folders, made, command.resume)])

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
    line = shlex.join(["python", "main.py", *command.argv])
    about = {"run": run, "begun": begun, "command": line, "settings": settings, "texts": command.texts}
    about |= surroundings(sampler, device, dtype) | ({"plan": sampler.plan} if sampler.plan else {})
    if command.settings.fixed_batch:
        about["keeps_bits"] = sampler.keeps_bits()
        if not about["keeps_bits"]:
            print(NO_BITS)
    takes_over = functools.partial(is_to_take_over, folder, run, processes)
    record = Record(folder, about, folders, made, files, difference, command.overwrite, command.report, takes_over)
    left = [i for i in range(len(command.texts)) if i not in whole]
    return sampler, record, left, starts, files and not command.resume


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


def seed_of(i, command, model):
    """The seed of prompt i. Without prompts, only the noise can make samples differ."""
    if command.seeds:
        return command.seeds[i]
    return command.settings.seed if model.family.prompted else (command.settings.seed + i) % 2**64


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
    loading = asdict(command.loading)
    return {
        "prompts": command.prompts,
        "prompt": command.prompt,
        "seeds": command.seeds and list(dict.fromkeys(command.seeds)),
        "output_dir": command.output_dir,
        "no_ground_truth": not command.ground_truth,
        "keep_trajectories": command.keep_trajectories,
        "start_from": command.start_from,
        "parallel": processes.parallel or command.parallel,
        **asdict(settings),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in loading.items()},
    }
