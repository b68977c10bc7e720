"""What the records of a run say of it: its settings, the machine, the model."""

import shlex
import sys
from dataclasses import asdict

import diffusers
import torch

from models.loading import MIRRORS
from study.planning import describe_plan
from study.samples import label
from study.sampling import explain

NO_BITS = (
    "note: on this device a network call's bits depend on its other lanes, so --fixed-batch makes results equal to "
    "float rounding only"
)


def describe(command, samplers, device, dtype):
    """What `run.json` says of a run from its start on; what of it is not plain is printed."""
    first, plans = samplers[0], [sampler.plan for sampler in samplers]
    if first.model.name == MIRRORS.get(command.loading.model):
        print(f"{command.loading.model} was withdrawn from the hub by its owner; using its mirror {first.model.name}")
    for swept, plan in zip(command.swept, plans):
        if plan:
            print(f"{label(swept)}: {describe_plan(plan)}" if len(plans) > 1 else describe_plan(plan))
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
        about["keeps_bits"] = all(keeps_bits(sampler, command.loading) for sampler in fixed)
        if not about["keeps_bits"]:
            print(NO_BITS)
    return about


def keeps_bits(sampler, loading):
    """Whether a fixed batch keeps bits; False where it cannot be known, as what fails here fails in the warm-up too."""
    try:
        return sampler.keeps_bits()
    except Exception as error:
        if not explain(sampler.settings, loading, error):
            raise
        return False


def varied(swept, settings):
    """What results say of the settings that differ in a sweep, for each of these: a name, and values as resolved."""
    settings = [*map(asdict, settings)]
    differing = {name for name in settings[0] if any(each[name] != settings[0][name] for each in settings)}
    names = [name for name in settings[0] if name in differing | swept[0].keys()]
    return [
        {"setting": label(combination), "settings": {name: each[name] for name in names}} if combination else {}
        for combination, each in zip(swept, settings)
    ]


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
