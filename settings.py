"""Every setting, once: its default, its meaning, what is refused, and its flag.

Edit the defaults below for experiments; they are checked like arguments. `main.py --help`, the command line, the
checks, `--sweep` and the table of settings in `report.html` all follow from the rows of `Settings`, `Call`, `Loading`
and `Experiment`.
"""

import difflib
import math
import numbers
import operator
import os
import re
from dataclasses import dataclass, field, fields, replace

# Sampling
METHOD = "srds"
FINE_STEPS = 100
COARSE_STEPS = 10  # blocks; "sqrt" is possible too
SOLVER = None
ETA = 0.0
TOLERANCE = 0.1  # grey levels of 255
STOP_RULE = "final"
MAX_ITERATIONS = None
SCHEDULE = None
CORRECTION = None
GUIDANCE_SCALE = None
DEMO_GUIDANCE_SCALE = 2.0  # for the demo model, if GUIDANCE_SCALE is None
NEGATIVE_PROMPT = ""
HEIGHT = None  # pixels
WIDTH = None  # pixels
SEED = 42
# Collocation
NODES = None
WINDOW = None
# The model and the machine
MODEL = "stabilityai/stable-diffusion-2"
VARIANT = None
DEVICE = "auto"
DTYPE = "auto"
MAX_BATCH = None
# The experiment
PARALLEL = None
BATCH = 1
PLOT_FORMAT = "png"

METHODS = ("srds", "collocation")
SOLVERS = ("ddim", "euler", "ddpm", "dpmsolver++")
SCHEDULES = ("pipelined", "sweep")
CORRECTIONS = ("damped", "paper")
STOP_RULES = ("final", "trajectory")
DTYPES = ("auto", "float32", "float16", "bfloat16")
VERSION = "1.0.0"
GROUPS = ("model", "sampling", "collocation", "experiment", "output")


class Failure(Exception):
    """An error that is not a bug, in one line. `status` is the exit status of a command that it ends."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class SettingError(Failure, ValueError):
    """A setting that is refused: its name, the given value, and a remedy: what is wrong with it, and what to give."""

    def __init__(self, setting, value, remedy):
        super().__init__(f"{setting}: {value!r} {remedy}", status=2)
        self.setting, self.value, self.remedy = setting, value, remedy


def in_one_line(message, most=200):
    """Return a text, or another library's error, as one line for a terminal: cut, without control characters."""
    line = " ".join(str(message).split())
    if not line and isinstance(message, BaseException):
        line = type(message).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:most])


def out_of_memory(error):
    """Return whether an exception, from any library, says that memory ran out."""
    words = "out of memory|allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def did_you_mean(word, known):
    """Return `; did you mean X?` with the known word nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(str(word), [*map(str, known)], 1)
    return f"; did you mean {near[0]}?" if near else ""


def number(text):
    """Return the number that a word stands for, or the word itself if it is not a number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# Checks: each is called with a setting's name and value, and returns the value or raises SettingError.


def accepts(convert, wanted, optional=False):
    """Return a check that `convert` takes a value without TypeError, ValueError or OverflowError.

    wanted: the values to give, as the error names them. optional: whether None is allowed.
    """

    def check(setting, value):
        try:
            return None if value is None and optional else convert(value)
        except (TypeError, ValueError, OverflowError):
            raise SettingError(setting, value, f"is not usable; give {wanted}") from None

    return check


def valid(value, condition):
    """Return the value. Raises ValueError if the condition fails, or for a bool, which Python counts as a number."""
    if not condition or isinstance(value, bool):
        raise ValueError
    return value


def whole(low=1, high=10**9, optional=False):
    convert = lambda value: int(valid(value, low <= operator.index(value) <= high))
    return accepts(convert, f"a whole number from {low} up to {high}", optional)


def real(high=math.inf, optional=False):
    wanted = "a finite number that is not negative" if high == math.inf else f"a number from 0 to {high}"
    finite = lambda value: isinstance(value, numbers.Real) and 0 <= value <= high and value < math.inf
    return accepts(lambda value: float(valid(value, finite(value))), wanted, optional)


def choice(*names, optional=False):
    def check(setting, value):
        if value in names or (optional and value is None):
            return value
        near = did_you_mean(value, names)
        raise SettingError(setting, value, f"is not usable; give one of {', '.join(names)}{near}")

    check.names = names
    return check


def text(wanted="some text, in UTF-8, without NUL", empty=False, optional=False):
    return accepts(lambda value: valid(value, (str.encode(value) or empty) and "\0" not in value), wanted, optional)


def path(wanted="a path", optional=False):
    """Return a check for paths, which need not be UTF-8."""
    return accepts(lambda value: valid(os.fspath(value), value and "\0" not in os.fspath(value)), wanted, optional)


def flag(setting, value):
    if not isinstance(value, bool):
        raise SettingError(setting, value, "is not usable; give True or False")
    return value


def split_scale(adapter):
    """Return a LoRA's path or hub id and its scale: "me/watercolour:0.8" gives ("me/watercolour", 0.8)."""
    place, colon, scale = adapter.rpartition(":")
    try:
        return (place, float(scale)) if colon and place else (adapter, 1.0)
    except ValueError:
        return adapter, 1.0


def adapters(setting, value):
    """Check paths or hub ids and return them as a tuple; a single one need not be in a list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    values = tuple(os.fspath(each) if isinstance(each, os.PathLike) else each for each in values)
    for each in values:
        text("a file, a folder or a hub id")(setting, each)
        if setting == "lora" and not math.isfinite(split_scale(each)[1]):
            raise SettingError(setting, each, "has no usable scale; give a finite number after the colon")
    return values


anything = lambda setting, value: value
of_torch = lambda check: lambda setting, value: check(setting, str(value).removeprefix("torch."))


def row(default, check, meaning, metavar=None, group="sampling", short="", usual=None):
    """Return a field of the tables below.

    meaning: its line of help. metavar: the name of its value in help; None for the choices. short: its second flag.
    usual: the default that help shows if the default is None.
    """
    about = {"check": check, "meaning": meaning, "metavar": metavar, "group": group, "short": short, "usual": usual}
    return field(default=default, metadata=about)


class Checked:
    """A dataclass whose fields are checked when it is made."""

    def __post_init__(self):
        for each in fields(self):
            object.__setattr__(self, each.name, each.metadata["check"](each.name, getattr(self, each.name)))


@dataclass(frozen=True)
class Settings(Checked):
    """How to sample. None stands for the model's usual value. Raises SettingError for what no model can do."""

    # fmt: off
    fine_steps: int = row(FINE_STEPS, whole(), "steps of the sequential sampler to reproduce; at most the model's "
                          "timesteps", "N", short="-fs")
    coarse_steps: int = row(COARSE_STEPS, whole(), "number of blocks, at most N; sqrt: square root of N; for "
                            "collocation, it only sets where differences are reported", "B", short="-cs")
    method: str = row(METHOD, choice(*METHODS), "srds refines blocks of steps; collocation refines points in time")
    solver: str | None = row(SOLVER, choice(*SOLVERS, optional=True), "solver of each step",
                             usual="ddim; euler for flow matching")
    eta: float = row(ETA, real(1), "noise in the steps of ddim: from 0 for none to 1 for as much as ddpm", "E")
    tolerance: float = row(TOLERANCE, real(10**6), "stop when a refinement changes the image by less, in grey levels "
                           "of 255; 0: go on until exact", "T", short="-tol")
    stop_rule: str = row(STOP_RULE, choice(*STOP_RULES), "what must be below the tolerance: the image's last change "
                         "(final), or also the last change of the state at each boundary (trajectory)")
    max_iterations: int | None = row(MAX_ITERATIONS, whole(0, optional=True), "most refinements", "K",
                                     usual="as many as make the sample exact")
    schedule: str | None = row(SCHEDULE, choice(*SCHEDULES, optional=True), "for srds: work on the blocks of all "
                               "refinements at once (pipelined), or of one at a time (sweep)", usual="pipelined")
    correction: str | None = row(CORRECTION, choice(*CORRECTIONS, optional=True), "for srds: the paper's correction, "
                                 "or one that is damped if the coarse step overshoots", usual="damped")
    seed: int = row(SEED, whole(0, 2**64 - 1), "seed of all noise", "SEED", short="-s")
    nodes: int | None = row(NODES, whole(2, optional=True), "points in time in the first solution", "M", "collocation",
                            usual="13, or 100 for pixels or a model that proves rough in time, or with "
                            "--window 1 as the tolerance needs")
    window: int | None = row(WINDOW, whole(optional=True), "most nodes in a tick, not counting those that a "
                             "refinement adds; 1: one evaluation at a time, for devices without room for batches", "W",
                             "collocation", usual="8; at first, with 100 nodes or more, half their root")
    max_batch: int | None = row(MAX_BATCH, whole(optional=True), "most network samples in one call, two for a guided "
                                "state; give fewer if memory is short", "M", "model", usual="no limit")
    fixed_batch: bool = row(False, flag, "pad every network call to one shape, for results that are reproducible to "
                            "the bit (on devices that allow it)", group="model")
    # fmt: on

    def __post_init__(self):
        super().__post_init__()
        for name in ("nodes", "window") if self.method == "srds" else ("schedule", "correction"):
            if getattr(self, name) is not None:
                raise SettingError(name, getattr(self, name), f"is not for {self.method}; leave it out")
        if self.coarse_steps > self.fine_steps:
            remedy = f"is more than the {self.fine_steps} fine steps; give at most that"
            raise SettingError("coarse_steps", self.coarse_steps, remedy)

    def resolve(self, model):
        """Return these settings with None replaced by the usual values of `model`, a `models.loading.Model`.

        Raises SettingError for what the model cannot do.
        """
        solver = self.solver or model.solvers[0]
        if solver not in model.solvers:
            remedy = f"cannot be used with {model.name}; give {' or '.join(model.solvers)}"
            raise SettingError("solver", solver, remedy)
        if self.eta and solver != "ddim":
            raise SettingError("eta", self.eta, f"is for ddim, not {solver}; leave it out")
        most = model.scheduler.config.num_train_timesteps
        if self.fine_steps > most:
            raise SettingError("fine_steps", self.fine_steps, f"exceeds the model's {most} timesteps; give fewer")
        how = {"schedule": self.schedule or SCHEDULES[0], "correction": self.correction or CORRECTIONS[0]}
        return replace(self, solver=solver, **how if self.method == "srds" else {})


SETTINGS = {each.name for each in fields(Settings)}


@dataclass(frozen=True)
class Call(Checked):
    """Arguments of the pipeline's own call, as flags give them; None and "" stand for the usual ones."""

    # fmt: off
    guidance_scale: float | None = row(GUIDANCE_SCALE, real(1000, optional=True), "scale of classifier-free guidance "
                                       "(off at 1 and below) or of embedded guidance", "S", short="-gs",
                                       usual="the model's usual one")
    negative_prompt: str = row(NEGATIVE_PROMPT, text(empty=True), "text that guidance leads away from", "TEXT")
    height: int | None = row(HEIGHT, whole(1, 2**16, optional=True), "height of the image in pixels", "PX",
                             usual="the pipeline's own; for Stable Diffusion at most 512")
    width: int | None = row(WIDTH, whole(1, 2**16, optional=True), "width of the image, as for height", "PX")
    call: tuple[str, ...] = row((), anything, "any other argument of the pipeline's call, such as image=photo.png or "
                                "strength=0.6: an image file, a JSON or Python value, or text; may be repeated",
                                "NAME=VALUE")
    # fmt: on


@dataclass(frozen=True)
class Loading(Checked):
    """How to load a model. `device` and `dtype` may be torch's own objects. Raises SettingError."""

    # fmt: off
    model: str = row(MODEL, path("a hub id, a folder, demo or fashion"), "hub id, local folder, demo or fashion",
                     "MODEL", "model")
    device: str = row(DEVICE, of_torch(text("auto, cpu, cuda or another device")), "auto, cpu, cuda, cuda:1, mps, ...",
                      "DEVICE", "model")
    dtype: str = row(DTYPE, of_torch(choice(*DTYPES)), "auto: float16 or bfloat16 on cuda, float32 elsewhere",
                     f"{{{','.join(DTYPES)}}}", "model")
    pipeline: str | None = row(None, text(optional=True), "diffusers class to load the model as, such as "
                               "StableDiffusionImg2ImgPipeline", "CLASS", "model", usual="the model's own")
    variant: str | None = row(VARIANT, text(optional=True), "variant of the weights, such as fp16", "NAME", "model")
    lora: tuple[str, ...] = row((), adapters, "LoRA weights: a file, folder or hub id, with a scale; may be repeated",
                                "FILE[:SCALE]", "model", usual="scale 1")
    textual_inversion: tuple[str, ...] = row((), adapters, "textual inversion embeddings: a file, folder or hub id; "
                                             "may be repeated", "FILE", "model")
    offload: bool = row(False, flag, "keep on the device only the part of the model that is running", group="model")
    compile: bool = row(False, flag, "compile the network with torch: takes minutes once, then calls are faster",
                        group="model")
    # fmt: on


@dataclass(frozen=True)
class Experiment(Checked):
    """What the command samples and writes, as its flags give it; `asked` reads the texts among them."""

    # fmt: off
    config: str | None = row(None, path(optional=True), "run again what a run.json has recorded, with its "
                             "prompts; other flags replace what it records", "FILE", "experiment")
    prompts: str | None = row(None, path(optional=True), "text file in UTF-8, one prompt a line; lines that begin "
                              "with # are comments", "FILE", "experiment", "-p")
    prompt: tuple[str, ...] | None = row(None, anything, "a prompt; may be repeated", "TEXT", "experiment")
    seeds: str | None = row(None, anything, "several seeds, such as 42-61 or 1,5,9: a sample for each prompt and seed",
                            "SEEDS", "experiment")
    sweep: tuple[str, ...] = row((), anything, "a sample with each value of a setting, such as coarse-steps=5,10,20; "
                                 "or of settings that change together, such as fine-steps:coarse-steps=25:5,100:10; "
                                 "may be repeated, for all combinations", "NAME=V1,V2", "experiment")
    no_ground_truth: bool = row(False, flag, "skip the sequential run that images are compared with",
                                group="experiment")
    start_from: str | None = row(None, path(optional=True), "start from the trajectories in the output directory of "
                                 "a run with --keep-trajectories", "DIR", "experiment")
    parallel: str | None = row(PARALLEL, choice("lanes", "samples", optional=True), "what several processes share: the "
                               "lanes of each tick, or the samples", group="experiment",
                               usual="samples if there are more of them than processes, else lanes")
    batch: int = row(BATCH, whole(), "samples made side by side, in network calls that they share", "S", "experiment")
    output_dir: str = row(None, path(), "directory for images and analysis (required)", "DIR", "output", "-o")
    dry_run: bool = row(False, flag, "print what would be made, and its cost; load and write nothing", group="output")
    again: bool = row(False, flag, "make samples again that are there already", group="output")
    keep_trajectories: bool = row(False, flag, "keep trajectories, for --start-from", group="output")
    plot_format: str = row(PLOT_FORMAT, choice("png", "pdf", "svg"), "format of plots, besides png", group="output")
    no_report: bool = row(False, flag, "do not write report.html, the page of the run", group="output")
    # fmt: on


ROWS = {each.name: each for kind in (Loading, Settings, Call, Experiment) for each in fields(kind)}


def flag_of(name):
    """Return the long flag of a setting."""
    return f"--{name.replace('_', '-')}"


def words_of(given):
    """Return the words of a command line that gives these values, by setting; None and False are left out."""
    some = lambda value: value if isinstance(value, tuple) else [value] * (value is not None and value is not False)
    return [flag_of(name) + f"={one}" * (one is not True) for name, value in given.items() for one in some(value)]
