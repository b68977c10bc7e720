"""Every default, what each setting means, and what is refused. Edit the defaults for experiments.

Edited defaults are checked like arguments.
"""

import math
import numbers
import operator
import os
import re
from dataclasses import dataclass, fields, replace

# The algorithm
METHOD = "srds"
FINE_STEPS = 100
COARSE_STEPS = 10  # or "auto"
SOLVER = None  # ddim; for flow matching, euler
ETA = 0.0  # of ddim: 0 takes no noise, 1 as much as ddpm
TOLERANCE = 0.1  # mean absolute change of the 8-bit image, 0 to 255
SCHEDULE = None  # pipelined; with auto blocks, the faster of the two
CORRECTION = None  # damped
STOP_RULE = "final"
MAX_ITERATIONS = None  # as many as blocks; of collocation, until every grid point is a node
NODES = None  # of collocation's first solution: 13; of pixels, or where the model is rough in time, 100
WINDOW = None  # of collocation's nodes in a network call: 8; where nodes are dense, half the root of their number
EXPECTED_REFINEMENTS = 3  # that auto blocks are planned for: what most runs of benchmarks/stopping.py use
# Generation
MODEL = "stabilityai/stable-diffusion-2"
VARIANT = None
GUIDANCE_SCALE = None  # the usual one of the model's family: 7.5 for Stable Diffusion
DEMO_GUIDANCE_SCALE = 2.0  # the usual one of the demo model
NEGATIVE_PROMPT = ""
HEIGHT = None  # pixels; the model's native size, for Stable Diffusion at most 512
WIDTH = None
SEED = 42
# The machine
DEVICE = "auto"
DTYPE = "auto"
MAX_BATCH = None  # all lanes of a tick in one network call
PARALLEL = None  # of several processes: prompts where there are more of them than processes, else lanes

METHODS = ("srds", "collocation")
SOLVERS = ("ddim", "euler", "ddpm", "dpmsolver++")
SCHEDULES = ("pipelined", "sweep")
CORRECTIONS = ("damped", "paper")
STOP_RULES = ("final", "trajectory", "predicted")
DTYPES = ("auto", "float32", "float16", "bfloat16")
PARALLELS = ("lanes", "prompts")
MEASURES = ("lpips", "clip", "scene")
MOST_GUIDANCE = 1000  # far above what makes an image
MOST_PIXELS = 2**16  # on a side
MOST_FLOW_STEPS = 4000  # flow matching sets no limit; the solver's tables have steps x steps entries


class Failure(Exception):
    """What can go wrong without being a bug, in one line. `status` is the exit status of a command that it ends."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class SettingError(Failure, ValueError):
    """A setting that is refused: its name, the value that was given, and what is wrong with it and would be right."""

    def __init__(self, setting, value, remedy):
        super().__init__(f"{setting}: {value!r} {remedy}", status=2)
        self.setting, self.value, self.remedy = setting, value, remedy


def in_one_line(message, most=200):
    """A text, or another library's error, as a terminal may show it: one line, without control characters, cut."""
    line = " ".join(str(message).split())
    if not line and isinstance(message, BaseException):
        line = type(message).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:most])


def out_of_memory(error):
    """Whether an exception, of any of the libraries, says that memory ran out."""
    words = "out of memory|allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def number(text):
    """A number from a word, or the word itself where it is none; the domains know what may be given."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# Domains: each is called with a setting's name and value, and returns the value or raises SettingError.


def domain(convert, wanted, optional=False):
    """What `convert` takes without a TypeError or ValueError, and None if optional."""

    def check(setting, value):
        try:
            return None if value is None and optional else convert(value)
        except (TypeError, ValueError, OverflowError):
            raise SettingError(setting, value, f"is not usable; give {wanted}") from None

    return check


def valid(value, condition):
    """The value, if the condition holds and it is not True or False, which are numbers to Python."""
    if not condition or isinstance(value, bool):
        raise ValueError
    return value


def whole(low=1, high=10**9, optional=False, auto=False):
    """Whole numbers from low to high, and perhaps "auto"."""

    def convert(value):
        if auto and value == "auto":
            return value
        return int(valid(value, low <= operator.index(value) <= high))

    wanted = f"a whole number from {low} up to {high}{', or auto' if auto else ''}"
    return domain(convert, wanted, optional)


def real(high=math.inf, optional=False):
    """Finite numbers from 0 to high."""
    wanted = "a finite number that is not negative" if high == math.inf else f"a number from 0 to {high}"
    number = lambda value: isinstance(value, numbers.Real) and 0 <= value <= high and value < math.inf
    return domain(lambda value: float(valid(value, number(value))), wanted, optional)


def choice(*names, optional=False):
    """One of some names."""
    return domain(lambda value: valid(value, value in names), f"one of {', '.join(names)}", optional)


def text(wanted="some text, in UTF-8, without NUL", empty=False, optional=False):
    """Text that can be written as UTF-8, without NUL."""
    return domain(lambda value: valid(value, (str.encode(value) or empty) and "\0" not in value), wanted, optional)


def flag(setting, value):
    if not isinstance(value, bool):
        raise SettingError(setting, value, "is not usable; give True or False")
    return value


def split_scale(adapter):
    """A LoRA's path or hub id, and its scale: "me/watercolour:0.8" is ("me/watercolour", 0.8)."""
    path, colon, scale = adapter.rpartition(":")
    try:
        return (path, float(scale)) if colon and path else (adapter, 1.0)
    except ValueError:
        return adapter, 1.0


def adapters(setting, value):
    """Paths or hub ids, as a tuple; one may be given alone."""
    given = value if isinstance(value, (list, tuple)) else [value]
    values = tuple(os.fspath(each) if isinstance(each, os.PathLike) else each for each in given)
    for each in values:
        text("a file, a folder or a hub id")(setting, each)
        if setting == "lora" and not math.isfinite(split_scale(each)[1]):
            raise SettingError(setting, each, "has no usable scale; give a finite number after the colon")
    return values


class Checked:
    """A dataclass whose `domains` check each of its fields as it is made."""

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, self.domains[field.name](field.name, getattr(self, field.name)))


@dataclass(frozen=True)
class Settings(Checked):
    """How to sample. Raises SettingError for what no model can do; None is what the model usually takes.

    fine_steps: N, the steps of the sequential sampler that the method reproduces.
    coarse_steps: B, the blocks, at most N; or "auto", those that take the least predicted time on this device. Of
        collocation, it is only told at their boundaries how the trajectory changes.
    method: "srds", see `srds.srds`, or "collocation", see `collocation.collocation`.
    solver: "ddim", "ddpm", "dpmsolver++" or, of flow matching, "euler" or "dpmsolver++".
    eta: noise in ddim's steps, 0 to 1 (Song, Meng and Ermon, 2021, eq. 16).
    tolerance: stop when a refinement changes the image by less, in grey levels of 255 (mean absolute difference), or,
        if it is 0, only when the sample is exact; with strong guidance, collocation evaluates no more than it asks for.
    schedule: of srds, which lanes move in a tick, "pipelined" (all) or "sweep" (Algorithm 1).
    correction: of srds, the predictor-corrector, "paper", or "damped" where the coarse step overshoots.
    nodes, window: of collocation, the first nodes (None: 13; of pixels, or where the model turns out to be rough in
        time, 100; all up to twice as many), and most in a tick (None: `collocation.usual_window`).
    stop_rule: what must be below the tolerance: "final", the image's change; "trajectory", each boundary's state as
        well; "predicted", the next change of the image, as the last two predict it.
    max_iterations: most refinements; None: B, or of collocation, until every grid point is a node.
    guidance_scale: classifier-free (Ho and Salimans, 2022), on above 1, or the scale embedded in the network.
    negative_prompt: what guidance leads away from.
    height, width: of the image, in pixels.
    seed: of the initial noise and of the noise in the steps, 0 to 2^64 - 1.
    max_batch: most network samples in one call, of which guidance makes two a lane; None: no limit.
    fixed_batch: pad every call to one shape, so that all of SRDS's refinements equal the sequential sample to the bit.
    """

    fine_steps: int = FINE_STEPS
    coarse_steps: int | str = COARSE_STEPS
    method: str = METHOD
    solver: str | None = SOLVER
    eta: float = ETA
    tolerance: float = TOLERANCE
    schedule: str | None = SCHEDULE
    correction: str | None = CORRECTION
    nodes: int | None = NODES
    window: int | None = WINDOW
    stop_rule: str = STOP_RULE
    max_iterations: int | None = MAX_ITERATIONS
    guidance_scale: float | None = GUIDANCE_SCALE
    negative_prompt: str = NEGATIVE_PROMPT
    height: int | None = HEIGHT
    width: int | None = WIDTH
    seed: int = SEED
    max_batch: int | None = MAX_BATCH
    fixed_batch: bool = False

    domains = {
        "fine_steps": whole(), "coarse_steps": whole(auto=True), "method": choice(*METHODS),
        "solver": choice(*SOLVERS, optional=True), "eta": real(1), "tolerance": real(),
        "schedule": choice(*SCHEDULES, optional=True),
        "correction": choice(*CORRECTIONS, optional=True), "nodes": whole(2, optional=True),
        "window": whole(optional=True), "stop_rule": choice(*STOP_RULES), "max_iterations": whole(optional=True),
        "guidance_scale": real(MOST_GUIDANCE, optional=True), "negative_prompt": text(empty=True),
        "height": whole(1, MOST_PIXELS, optional=True), "width": whole(1, MOST_PIXELS, optional=True),
        "seed": whole(0, 2**64 - 1), "max_batch": whole(optional=True),
        "fixed_batch": flag,
    }  # fmt: skip

    ONLY_OF = (("srds", "schedule"), ("srds", "correction"), ("collocation", "nodes"), ("collocation", "window"))

    def __post_init__(self):
        super().__post_init__()
        for method, setting in self.ONLY_OF:
            if self.method != method and getattr(self, setting) is not None:
                raise SettingError(setting, getattr(self, setting), f"is of {method}, not {self.method}; leave it out")
        if self.coarse_steps == "auto" and self.method != "srds":
            raise SettingError("coarse_steps", "auto", f"is of srds, not {self.method}; give a number")
        if self.coarse_steps == "auto" and self.fixed_batch:
            remedy = "measures calls of many sizes, a fixed batch has one; give a number"
            raise SettingError("coarse_steps", "auto", remedy)
        if self.coarse_steps != "auto" and self.coarse_steps > self.fine_steps:
            remedy = f"is more than the {self.fine_steps} fine steps; give at most as many"
            raise SettingError("coarse_steps", self.coarse_steps, remedy)

    def check_compiled(self):
        """Raise SettingError for what a compiled network cannot do."""
        if self.coarse_steps == "auto":
            remedy = "measures calls of many sizes, a compiled network has few; give a number"
            raise SettingError("coarse_steps", "auto", remedy)

    def resolve(self, model):
        """These settings with what `model`, a `models.loading.Model`, usually takes in place of None.

        A schedule stays None where "auto" is to choose it. Raises SettingError for what the model cannot do.
        """
        family = model.family
        solver = self.solver or family.solvers[0]
        if solver not in family.solvers:
            remedy = f"cannot be used with {model.name}; give {' or '.join(family.solvers)}"
            raise SettingError("solver", solver, remedy)
        if self.eta and solver != "ddim":
            raise SettingError("eta", self.eta, f"is for ddim, not {solver}; leave it out")
        most = MOST_FLOW_STEPS if family.flow else model.training_steps
        if self.fine_steps > most:
            why = "what a flow's tables have room for" if family.flow else f"the model's {most} training timesteps"
            raise SettingError("fine_steps", self.fine_steps, f"exceeds {why}; give at most {most}")
        if family.guidance is None and self.guidance_scale is not None:
            remedy = f"is of no use, as {model.name} has no guidance; leave it out"
            raise SettingError("guidance_scale", self.guidance_scale, remedy)
        if family.guidance != "classifier-free" and self.negative_prompt:
            remedy = f"is of no use to {model.name}; leave it out"
            raise SettingError("negative_prompt", self.negative_prompt, remedy)
        height, width = (self._side(*side, model) for side in zip(("height", "width"), family.default_size))
        scale = model.guidance_scale if self.guidance_scale is None else self.guidance_scale
        usual = {"solver": solver, "height": height, "width": width, "guidance_scale": scale}
        if self.method == "srds":
            usual["schedule"] = self.schedule or (None if self.coarse_steps == "auto" else SCHEDULES[0])
            usual["correction"] = self.correction or CORRECTIONS[0]
        return replace(self, **usual)

    def _side(self, side, default, model):
        pixels, multiple = getattr(self, side) or default, model.family.multiple
        if pixels % multiple:
            near = max(1, round(pixels / multiple)) * multiple
            raise SettingError(side, pixels, f"is not a multiple of {multiple}; give {near}, for instance")
        if pixels > model.family.largest:
            remedy = f"is more than {model.name} has places for; give at most {model.family.largest}"
            raise SettingError(side, pixels, remedy)
        return pixels


@dataclass(frozen=True)
class Loading(Checked):
    """How to bring a model into memory. Raises SettingError for what no model could be loaded with.

    model: a hub id, a local folder, "demo" or "fashion". variant: of its weights, such as "fp16".
    lora: paths or hub ids of LoRA weights, each with ":SCALE" if it is not 1. textual_inversion: of embeddings.
    device: "auto", "cpu", "cuda", "cuda:1", "mps" ... or a torch device.
    dtype: one of DTYPES or a torch dtype; "auto" is the family's half precision on cuda, and float32 elsewhere.
    offload: keep on the device only the part of the model that runs. vae_tiling: decode large images in tiles.
    compile: torch.compile the network, for a few batch sizes.
    """

    model: str = MODEL
    device: str = DEVICE
    dtype: str = DTYPE
    variant: str | None = VARIANT
    lora: tuple[str, ...] = ()
    textual_inversion: tuple[str, ...] = ()
    offload: bool = False
    vae_tiling: bool = False
    compile: bool = False

    domains = {
        "model": text("a hub id, a folder or demo"), "device": text("auto, cpu, cuda or another device of torch's"),
        "dtype": choice(*DTYPES), "variant": text(optional=True), "lora": adapters, "textual_inversion": adapters,
        "offload": flag, "vae_tiling": flag, "compile": flag,
    }  # fmt: skip

    def __post_init__(self):
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        for name in ("device", "dtype"):
            if type(getattr(self, name)).__module__ == "torch":
                object.__setattr__(self, name, str(getattr(self, name)).removeprefix("torch."))
        super().__post_init__()
