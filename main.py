"""Sample images with Self-Refining Diffusion Samplers and show how they converge.

python main.py --prompts prompts.txt --output-dir output/my_experiment
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import stat
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from processes import ProcessError, Processes

# Defaults: edit them for experiments.
MODEL = "stabilityai/stable-diffusion-2"
COARSE_STEPS = 10  # or "auto"
FINE_STEPS = 100
TOLERANCE = 0.1  # mean absolute change of the 8-bit image, 0 to 255
SOLVER = None  # ddim; for flow matching, euler
ETA = 0.0  # of ddim: 0 takes no noise, 1 as much as ddpm
GUIDANCE_SCALE = None  # the usual one of the model's family: 7.5 for Stable Diffusion
DEMO_GUIDANCE_SCALE = 2.0  # for --model demo
HEIGHT = None  # pixels; the model's native size, for Stable Diffusion at most 512
WIDTH = None
SEED = 42
SCHEDULE = "pipelined"
CORRECTION = "damped"
STOP_RULE = "final"
MAX_ITERATIONS = None  # as many as blocks
NEGATIVE_PROMPT = ""
DEVICE = "auto"
DTYPE = "auto"
VARIANT = None
MAX_BATCH = None  # all lanes of a tick in one network call
PARALLEL = None  # of several processes: prompts where there are more of them than processes, else lanes
EXPECTED_REFINEMENTS = 3  # that --coarse-steps auto plans for: what most runs of benchmarks/stopping.py use

# Arguments that may differ in a run to --resume: results depend on them by rounding at most.
NOT_COMPARED = ("output_dir", "prompts", "prompt", "texts", "resume", "parallel", "device", "offload")
SCHEDULES = ("pipelined", "sweep")  # as in srds.py, which is imported late
CORRECTIONS = ("damped", "paper")
STOP_RULES = ("final", "trajectory", "predicted")
MOST_FLOW_STEPS = 4000  # a flow has no limit of its own, but tables of steps x steps
SOLVERS = ("ddim", "euler", "ddpm", "dpmsolver++")
DTYPES = ("auto", "float32", "float16", "bfloat16")


class Failure(Exception):
    """What ends the command with one line on stderr: status 2 for bad arguments, 1 for what fails later."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


# Arguments


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise Failure(message)


def integer(low, high=None):
    """An argument type: a whole number from low to high."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            most = "up" if high is None else f"to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not usable; give a whole number from {low} {most}")
        return value

    return parse


def blocks(text):
    """An argument type: a whole number from 1, or "auto"."""
    try:
        return text if text == "auto" else integer(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def real(text):
    """An argument type: a finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable; give a finite number that is not negative")
    return value


def parse_arguments(argv):
    """The arguments, checked as far as they can be on their own, with `prompts` and `prompt` as one list `texts`."""
    parser = Parser(prog="main.py", description=__doc__.splitlines()[0], allow_abbrev=False)

    group = parser.add_argument_group("required: an output directory, and prompts from a file or one by one")
    add = group.add_argument
    add("--prompts", "-p", metavar="FILE", help="text file with one prompt a line, UTF-8")
    add("--prompt", metavar="TEXT", action="append", help="a prompt; may be repeated")
    add("--output-dir", "-o", metavar="DIR", required=True, help="where images and analysis go")

    group = parser.add_argument_group("algorithm")
    add = group.add_argument
    add("--coarse-steps", "-cs", metavar="B", type=blocks, default=COARSE_STEPS,
        help="blocks, at most N; auto plans for the least time on this device (%(default)s)")  # fmt: skip
    add("--fine-steps", "-fs", metavar="N", type=integer(1), default=FINE_STEPS,
        help="steps to be equalled; in diffusion, no more than the model was trained on (%(default)s)")  # fmt: skip
    add("--solver", choices=SOLVERS, default=SOLVER, help="the sampler that makes the steps (ddim; of a flow, euler)")
    add("--eta", metavar="E", type=real, default=ETA, help="noise in ddim's steps, 0 to 1 (%(default)s)")
    add("--tolerance", "-tol", metavar="T", type=real, default=TOLERANCE,
        help="stop below this change of the image, 0-255; 0 runs to exactness (%(default)s)")  # fmt: skip
    add("--schedule", choices=SCHEDULES, help=f"which lanes move in a tick ({SCHEDULE}; auto blocks: the faster)")
    add("--correction", choices=CORRECTIONS, default=CORRECTION,
        help="the paper's, or held back where the coarse step overshoots (%(default)s)")  # fmt: skip
    add("--stop-rule", choices=STOP_RULES, default=STOP_RULE,
        help="what must be below the tolerance: the image's change, each state's as well, or the image's next change, "
        "as the last two foretell it (%(default)s)")  # fmt: skip
    add("--max-iterations", metavar="K", type=integer(1), default=MAX_ITERATIONS,
        help="most refinements (as many as blocks)")  # fmt: skip

    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--model", default=MODEL, help="hub id, local folder, or demo (%(default)s)")
    add("--variant", default=VARIANT, help="variant of the weights, such as fp16")
    add("--guidance-scale", "-gs", metavar="S", type=real, default=GUIDANCE_SCALE,
        help="classifier-free guidance, on above 1, or the network's own (the usual one of the model)")  # fmt: skip
    add("--negative-prompt", metavar="TEXT", default=NEGATIVE_PROMPT, help="what guidance leads away from")
    for side, default in (("height", HEIGHT), ("width", WIDTH)):
        add(f"--{side}", metavar="PX", type=integer(1), default=default,
            help="(the model's native one, of Stable Diffusion 512 at most)")  # fmt: skip
    add("--seed", "-s", type=integer(0, 2**64 - 1), default=SEED,
        help="of the initial noise, and of that in the steps (%(default)s)")  # fmt: skip
    add("--resume", action="store_true", help="keep what an earlier run with the same settings has completed")
    add("--no-ground-truth", action="store_true", help="only sample: no sequential run to compare with")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--parallel", choices=("lanes", "prompts"), default=PARALLEL,
        help="what the processes of accelerate launch or torchrun share: each tick's lanes, or the prompts (prompts "
        "where there are more of them than processes)")  # fmt: skip
    add("--device", default=DEVICE, help="auto, cpu, cuda, cuda:1, mps ... (%(default)s)")
    add("--dtype", choices=DTYPES, default=DTYPE, help="auto: float16 or bfloat16 on cuda, float32 elsewhere")
    add("--max-batch", metavar="M", type=integer(1), default=MAX_BATCH,
        help="most network samples in one call, where memory is short")  # fmt: skip
    add("--offload", action="store_true", help="keep on the device only the part of the model that runs")
    add("--vae-tiling", action="store_true", help="decode large images in tiles, where memory is short")
    add("--fixed-batch", action="store_true", help="pad every network call to one shape: reproducible to the bit")
    add("--compile", action="store_true", help="torch.compile the network: minutes once, then faster calls")

    args = parser.parse_args(argv)
    if (args.prompts is None) == (args.prompt is None):
        got = "neither was given" if args.prompts is None else "both were given"
        raise Failure(f"argument --prompts/-p or --prompt: {got}; give one of them")
    if not args.model:
        raise Failure("argument --model: '' is empty; give a hub id, a folder or demo")
    if args.coarse_steps == "auto" and (args.compile or args.fixed_batch):
        given = "--compile" if args.compile else "--fixed-batch"
        raise Failure(
            f"argument --coarse-steps/-cs: auto measures calls of many sizes, {given} leaves few; give a number"
        )
    if args.coarse_steps != "auto" and args.coarse_steps > args.fine_steps:
        raise Failure(
            f"argument --coarse-steps/-cs: {args.coarse_steps} is more than the {args.fine_steps} of --fine-steps; "
            "give at most as many"
        )
    if args.eta > 1:
        raise Failure(f"argument --eta: {args.eta:g} is not usable; give a number from 0 to 1")
    args.texts = read_prompts(args)
    check_output_dir(args.output_dir)
    return args


def read_prompts(args):
    """The prompts, stripped, none blank."""
    for name, text in [("prompt", text) for text in args.prompt or []] + [("negative-prompt", args.negative_prompt)]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Failure(f"argument --{name}: {text!r} is not UTF-8; give text that is") from None
    if args.prompt is not None:
        texts = [text.strip() for text in args.prompt]
        if not all(texts):
            raise Failure("argument --prompt: '' is blank; give some text")
        return texts
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
        texts = [line.strip() for line in lines if line.strip()]
        problem = None if texts else "holds no prompt"
    except OSError as error:
        problem = error.strerror
    except UnicodeDecodeError:
        problem = "is not UTF-8"
    if problem:
        raise Failure(f"argument --prompts/-p: {args.prompts!r}: {problem}; give a UTF-8 text file, a prompt a line")
    return texts


def check_output_dir(folder):
    """Raise Failure unless the directory is there, or can be made, and can be written. Nothing is made yet."""
    path, problem = Path(folder), "" if folder else "is empty"
    while not problem:
        try:
            writable = os.access(path, os.W_OK | os.X_OK)
            problem = (
                "is not a directory" if not stat.S_ISDIR(path.stat().st_mode) else not writable and "is not writable"
            )
            break
        except FileNotFoundError:
            problem = "is a broken link" if path.is_symlink() else ""
            path = path.parent
        except OSError as error:
            problem = f"cannot be used ({error.strerror})"
    if problem:
        raise Failure(f"argument --output-dir/-o: {folder!r} {problem}; give a directory, existing or new")


def choose_device(args, processes):
    """The torch device of --device; of several processes, each has its own GPU."""
    import torch

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= count.get(device.type, 0):
        there = ", ".join(kind for kind in count if count[kind])
        raise Failure(f"argument --device: {args.device!r} is not on this machine; give auto or one of: {there}")
    if args.offload and device.type == "cpu":
        raise Failure("argument --offload: the device is the cpu, there is nowhere to offload to; leave it out")
    if processes.size > 1 and device.type != "cpu":
        if device.index is not None or device.type == "mps":
            raise Failure(f"argument --device: {args.device!r} is one device for several processes; give cuda or cpu")
        if processes.local_rank >= count[device.type]:
            raise Failure(
                f"argument --device: {args.device!r}: more processes than the {count[device.type]} GPUs of a machine; "
                "launch one a GPU"
            )
        device = torch.device(device.type, processes.local_rank)
    return device


def choose_model(args):
    """The configs of --model, and the defaults and limits that depend on them put into `args`."""
    import diffusion

    model = diffusion.find_model(args.model)
    family, trained = model.family, model.scheduler.config.num_train_timesteps
    most = MOST_FLOW_STEPS if family.flow else trained
    if args.fine_steps > most:
        why = "what a flow's tables have room for" if family.flow else f"the model's {trained} training timesteps"
        raise Failure(f"argument --fine-steps/-fs: {args.fine_steps} exceeds {why}; give at most {most}")
    if args.vae_tiling and not family.latent:
        raise Failure(f"argument --vae-tiling: {args.model} has no autoencoder; leave it out")
    given, args.solver = args.solver, args.solver or family.solvers[0]
    if args.solver not in family.solvers:
        raise Failure(f"argument --solver: {given} does not sample {args.model}; give {' or '.join(family.solvers)}")
    if args.eta and args.solver != "ddim":
        raise Failure(f"argument --eta: {args.eta:g} is for --solver ddim, not {args.solver}; leave it out")
    for side, default in zip(("height", "width"), family.default_size):
        pixels = getattr(args, side) or default
        if pixels % family.multiple:
            near = max(1, round(pixels / family.multiple)) * family.multiple
            raise Failure(
                f"argument --{side}: {pixels} is not a multiple of {family.multiple}; give {near}, for instance"
            )
        if pixels > family.largest:
            raise Failure(
                f"argument --{side}: {pixels} is more than {args.model} has places for; give at most {family.largest}"
            )
        setattr(args, side, pixels)
    if family.guidance is None and args.guidance_scale is not None:
        raise Failure(
            f"argument --guidance-scale/-gs: {args.guidance_scale:g}: {args.model} has no guidance; leave it out"
        )
    if family.guidance != "classifier-free" and args.negative_prompt:
        raise Failure(
            f"argument --negative-prompt: {args.negative_prompt!r}: {args.model} has no use for it; leave it out"
        )
    if args.guidance_scale is None:
        args.guidance_scale = DEMO_GUIDANCE_SCALE if args.model == "demo" else family.guidance_scale
    return model


def check_resume(args, dtype):
    """The plan of the earlier run in --output-dir, if it was planned; where there is none, nothing is resumed.

    Raises Failure where that was of other prompts or settings.
    """
    import utils

    try:
        earlier = utils.earlier_run(args.output_dir)
        if not earlier:
            args.resume = False
            return
        before, texts, plan = earlier["settings"], earlier["texts"], earlier.get("plan")
        before = {**before, "dtype": earlier["environment"]["dtype"]}  # what "auto" was
        now = {**vars(args), "schedule": args.schedule or SCHEDULE, "dtype": dtype}
        if plan and args.coarse_steps == "auto":
            now |= {"coarse_steps": plan["blocks"], "schedule": plan["schedule"]}
    except (KeyError, TypeError):
        raise Failure(f"argument --resume: {args.output_dir}/run.json is not of a run that can be resumed") from None
    free = NOT_COMPARED if args.fixed_batch else (*NOT_COMPARED, "max_batch", "compile")
    different = [key for key in now if key not in free and before.get(key) != now[key]]
    if different:
        key = different[0]
        raise Failure(
            f"argument --{key.replace('_', '-')}: {now[key]!r}, but {before.get(key)!r} in the run to --resume; "
            "give the same, or leave out --resume"
        )
    if texts != args.texts:
        raise Failure(
            "argument --resume: the prompts are not those of the earlier run; give the same, or leave out --resume"
        )
    return plan


# The run. torch and all that imports it wait until the arguments are known to be good.


def load(args, processes):
    """The `Problem` that the arguments set, and what run.json says of the run as a whole."""
    device = choose_device(args, processes)
    if processes.tell(device.type) != device.type:
        raise Failure(
            f"argument --device: {args.device!r} is {device.type} here, but not for the first process; name one"
        )
    processes.join(cpu=device.type == "cpu")
    if processes.size > 1:
        args.parallel = args.parallel or ("prompts" if len(args.texts) > processes.size else "lanes")
    with processes.in_turn():
        model = choose_model(args)

    import diffusers
    import torch

    import diffusion

    automatic = model.family.dtype if device.type == "cuda" else torch.float32
    dtype = automatic if args.dtype == "auto" else getattr(torch, args.dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    plan = processes.tell(check_resume(args, dtype_name) if args.resume and processes.first else None)
    settings = device, dtype, args.variant, args.offload, args.vae_tiling
    with processes.in_turn():
        try:
            pipeline = diffusion.load_pipeline(model, *settings)
        except diffusion.ModelError:
            if model.name not in diffusion.MIRRORS:
                raise
            model = diffusion.find_model(diffusion.MIRRORS[model.name])
            pipeline = diffusion.load_pipeline(model, *settings)
    if args.compile:
        diffusion.compile_network(getattr(pipeline, model.family.network))
    if model.name == diffusion.MIRRORS.get(args.model):
        print(f"{args.model} was withdrawn from the hub by its owner; using its mirror {model.name}")
    problem = Problem(args, model, pipeline, device, processes)
    if args.coarse_steps == "auto":
        plan = plan or processes.tell(make_plan(problem))
        problem = problem.vary(coarse_steps=plan["blocks"], schedule=plan["schedule"])
        args = problem.args
        print(describe_plan(plan))
    args.schedule = args.schedule or SCHEDULE
    about = {
        "begun": datetime.now().astimezone().isoformat(),
        "settings": {key: value for key, value in vars(args).items() if key not in ("texts", "resume")},
        "texts": args.texts,
        "environment": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "device": str(device),
            "dtype": dtype_name,
            "processes": processes.size,
        },
        "model": {
            "name": model.name,
            "family": type(model.family).__name__,
            "prediction_type": problem.grid.prediction_type,
            "native_height": model.family.native_size[0],
            "native_width": model.family.native_size[1],
        },
    }
    if plan:
        about["plan"] = plan
    return problem, about


def run(args, processes):
    """Load, sample and write; what can fail without being a bug becomes a Failure."""
    import diffusion
    import utils

    try:
        check_alike(args, processes)
        problem, about = load(args, processes)
        output = utils.Output(args.output_dir, about, args.texts)
        done = output.entry if processes.first and args.resume else lambda i: None
        left = processes.tell([i for i in range(len(args.texts)) if not done(i)])
        if left:
            problem.warm_up()
        if processes.first:
            output.begin(args.resume)  # not before it is known that the model runs, as this removes an earlier run
        if processes.size > 1 and args.parallel == "prompts":
            check_shared(output, processes)
        sample_all(problem, output, left)
        processes.close()
    except Failure:
        raise
    except (diffusion.ModelError, utils.WriteError, ProcessError) as error:
        raise Failure(error, 1) from error
    except Exception as error:
        message = explain(args, error)
        if not message:
            raise
        raise Failure(message, 1) from error


def check_alike(args, processes):
    """Raise Failure unless all processes are there and have the same prompts and settings, as machines may differ."""
    if processes.missing:
        raise Failure(
            "accelerate launch has started one process, not several; give it --multi_gpu as well, or use torchrun (or, "
            "if one was meant, unset MASTER_ADDR)"
        )
    known = {key: value for key, value in vars(args).items() if key not in ("output_dir", "prompts")}
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    if processes.tell(digest) != digest:
        raise Failure(
            f"argument --prompts/-p: process {processes.rank} of the launch has other prompts or settings than the "
            "first; give all the same"
        )


def check_shared(output, processes):
    """Raise Failure unless all processes see the output directory that the first one has begun."""
    import utils

    begun = processes.tell(output.about["begun"])
    if not wait_until(lambda: utils.earlier_run(output.folder).get("begun") == begun):
        raise Failure(
            f"argument --output-dir/-o: {str(output.folder)!r} is not one directory for all machines; give one that "
            "they share, or --parallel lanes"
        )


def wait_until(seen, seconds=90):
    """Whether something is seen before so many seconds are over; network file systems show changes late."""
    limit = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < limit:
        time.sleep(0.5)
    return found


def explain(args, error):
    """What went wrong in the network or on the device, and the remedy, in one line; None for a bug."""
    import diffusion

    if isinstance(error, FloatingPointError):
        remedy = "try --dtype float32 or bfloat16" if "float16" in str(error) else "try other settings"
        return f"argument --dtype: {args.dtype!r}: {error}; {remedy}"
    if diffusion.out_of_memory(error):
        remedies = {"a smaller --max-batch": args.max_batch == 1, "--offload": args.offload}
        remedies |= {"--vae-tiling": args.vae_tiling, "a smaller image": False}
        untried = " or ".join(remedy for remedy, tried in remedies.items() if not tried)
        return f"argument --max-batch: {args.max_batch or 'not given'}: out of memory; try {untried}"
    if diffusion.of_the_compiler(error):
        line = " ".join(str(error).split())[:200]
        return f"argument --compile: torch cannot compile here ({line}); leave it out"


def sample_all(problem, output, left):
    """Sample the prompts that are left, by number, and write what comes of it; one that fails leaves the others be."""
    import utils

    args, processes = problem.args, problem.processes
    kept = len(args.texts) - len(left)
    if kept:
        print(f"{kept} of {len(args.texts)} prompts are complete")
    try:
        if problem.in_lanes and not processes.first:
            return follow(problem)
        if args.negative_prompt:
            warn_if_cut(problem, args.negative_prompt)
        with tqdm(desc="prompts", total=len(left), unit="prompt", disable=None) as bar:
            for i in processes.take(left):
                text = args.texts[i]
                tqdm.write(f"prompt {i + 1} of {len(args.texts)}: {' '.join(text.split())}")
                # Without prompts, only the noise can make samples differ.
                at = problem if problem.model.family.prompted else problem.vary(seed=(args.seed + i) % 2**64)
                try:
                    output.add(i, *sample(at, text))
                except (utils.WriteError, ProcessError):
                    raise
                except Exception as error:
                    message = explain(args, error)
                    if not message or processes.broken:
                        raise
                    output.fail(i, at.args.seed, message)
                    tqdm.write(f"  failed: {message}")
                bar.n = processes.count("sampled")
                bar.refresh()
            while processes.first and bar.n < len(left):
                time.sleep(0.5)
                bar.n = processes.count("sampled", 0)
                bar.refresh()
        if problem.in_lanes:
            processes.tell(None)
        if processes.first:
            sum_up(args, output, processes)
    except KeyboardInterrupt:
        done = sum("error" not in result for result in (output.save() if processes.first else output.results()))
        done = f"{done} of {len(args.texts)} prompts are complete in {args.output_dir}"
        raise Failure(f"interrupted; {done}", 130) from None


def sum_up(args, output, processes):
    """Write the overview and print the closing table; raises Failure where a prompt failed."""
    import utils

    if processes.size > 1 and not wait_until(lambda: len(output.results()) == len(args.texts)):
        raise Failure(f"results of other processes do not show up in {args.output_dir}", 1)
    results = output.finish()
    print(utils.summary(results, args.fine_steps))
    failures = [result["error"] for result in results if "error" in result]
    if failures:
        raise Failure(f"{len(failures)} of {len(args.texts)} prompts failed; the first: {failures[0]}", 1)


def follow(problem):
    """Take part in the ticks of each prompt that the first process samples, until it tells that there are no more."""
    while called := problem.processes.tell():
        text, seed = called
        at = problem if seed == problem.args.seed else problem.vary(seed=seed)
        denoise = at.denoiser(text)
        problem.processes.wait()
        for _ in at.iterates(denoise):
            pass


class Problem:
    """What all prompts of a run share: model, pipeline, initial noise x, time grid, solver, correction, blocks."""

    def __init__(self, args, model, pipeline, device, processes):
        import diffusion
        import srds

        self.args, self.model, self.pipeline, self.device, self.processes = args, model, pipeline, device, processes
        family = model.family
        height, width = args.height // family.factor, args.width // family.factor
        self.x = diffusion.initial_noise((family.channels, height, width), args.seed, device)
        if family.flow:
            tokens = height * width // family.patch**2
            self.grid = diffusion.flow_grid(model.scheduler, args.fine_steps, family.sigmas(args.fine_steps), tokens)
        else:
            self.grid = diffusion.diffusion_grid(model.scheduler, args.fine_steps, args.solver)
        restarts = () if args.coarse_steps == "auto" else self.boundaries
        solver = diffusion.Solver(self.grid, args.solver, args.eta, args.seed, restarts)
        self.step, self.correct = solver.step, {"damped": solver.damped, "paper": srds.algorithm_1}[args.correction]

    def vary(self, **settings):
        """The same pipeline with other settings."""
        args = argparse.Namespace(**{**vars(self.args), **settings})
        return Problem(args, self.model, self.pipeline, self.device, self.processes)

    @property
    def boundaries(self):
        return boundaries(self.args.fine_steps, self.args.coarse_steps)

    @property
    def in_lanes(self):
        """Whether several processes share the lanes of each tick."""
        return self.processes.size > 1 and self.args.parallel == "lanes"

    @property
    def widest(self):
        """Most lanes in one process's call."""
        return -(-self.args.coarse_steps // (self.processes.size if self.in_lanes else 1))

    def denoiser(self, text):
        import diffusion

        args, family, pipeline = self.args, self.model.family, self.pipeline
        size = args.height, args.width
        conditions = family.encode(pipeline, text, args.negative_prompt, args.guidance_scale, size, self.device)
        predict, dtype = functools.partial(family.predict, pipeline), getattr(pipeline, family.network).dtype
        denoise = diffusion.Denoiser(
            predict, conditions, self.grid.times, args.guidance_scale, args.max_batch, dtype=dtype
        )
        if args.fixed_batch:
            denoise.sizes = [diffusion.fixed_batch(denoise.rows * self.widest, args.max_batch)]
        elif args.compile:
            most = min(denoise.rows * self.widest, args.max_batch or math.inf)
            denoise.sizes = diffusion.compiled_batches(min(denoise.rows, most), most)
        return denoise

    def iterates(self, denoise):
        """The iterates of a run with these settings."""
        from srds import srds

        args = self.args
        settings = args.schedule, args.max_iterations, self.correct
        iterates = srds(self.x, self.shared(denoise), self.step, self.boundaries, *settings)
        return self.processes.in_step(iterates) if self.in_lanes else iterates

    def shared(self, denoise):
        """The denoiser with its lanes shared among the processes, if that is how they share the work."""
        return self.processes.split(denoise) if self.in_lanes else denoise

    def image(self, states):
        """The image of a trajectory's last state, uint8 (height, width, 3)."""
        import diffusion

        return diffusion.decode(self.model.family, self.pipeline, states[-1])

    def warm_up(self):
        """Make each call that the clock will time once before: a first call chooses kernels and takes memory."""
        import torch

        args, denoise = self.args, self.denoiser("")
        widths = range(1, self.widest + 1) if args.compile else (1, self.widest)
        for lanes in [*widths] * (3 if args.compile else 1):  # a CUDA graph is recorded at the second call
            denoise(self.x.expand(lanes, -1, -1, -1), torch.zeros(lanes, dtype=int))
        self.image(self.x)


def boundaries(N, B):
    """The grid points 0 = n_0 < ... < n_B = N between which the B blocks of N steps lie, as even as can be."""
    return [i * N // B for i in range(B + 1)]


# The plan: --coarse-steps auto


def tick_widths(N, B, schedule, refinements, bound=None):
    """Lanes in each tick of a run that stops after so many refinements: the engine's own, on states of one number."""
    import torch

    from srds import srds

    widths = []

    def denoise(x, n):
        widths.append(len(x))
        return x

    def step(x, m, start, end, past):
        return x, past

    for iterate in srds(torch.zeros(1, 1, 1), denoise, step, boundaries(N, B), schedule, bound):
        if iterate.k >= refinements:
            break
    return widths


def clock(call, device):
    """Seconds of a call, until the device has done what it asks for."""
    import torch

    def wait():
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize()

    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def measure_calls(problem, widest):
    """Seconds of a tick by its lanes, {1: ..., 2: ..., ..., widest: ...}, and of a decoding; the median of five."""
    import numpy as np
    import torch

    def seconds(call):
        call()
        return float(np.median([clock(call, problem.x.device) for _ in range(5)]))

    denoise, x = problem.shared(problem.denoiser("")), problem.x
    lanes = sorted({widest, *(L for i in range(12) for L in (2**i, 3 * 2**i) if L < widest)})
    calls = {L: seconds(functools.partial(denoise, x.expand(L, -1, -1, -1), torch.zeros(L, dtype=int))) for L in lanes}
    return calls, seconds(lambda: problem.image(x))


def predict_seconds(calls, decoding, N, B, schedule, refinements, bound=None):
    """Seconds of a run that stops after so many refinements, from `measure_calls`."""
    import numpy as np

    ticks = np.interp(tick_widths(N, B, schedule, refinements, bound), list(calls), list(calls.values()))
    return float(ticks.sum()) + (refinements + 1) * decoding


def make_plan(problem):
    """The blocks and the schedule of the least predicted time, and the predictions, in seconds a prompt."""
    args, N = problem.args, problem.args.fine_steps
    # Fewer blocks than this refine badly; more only widen the ticks.
    candidates = {min(N, max(1, round(factor * math.sqrt(N)))) for factor in (0.7, 1, 1.4, 2)}
    calls, decoding = measure_calls(problem, max(candidates))
    plans = []
    for B in candidates:
        refinements = min(B if args.tolerance == 0 else EXPECTED_REFINEMENTS, args.max_iterations or B, B)
        for schedule in [args.schedule] if args.schedule else SCHEDULES:
            seconds = predict_seconds(calls, decoding, N, B, schedule, refinements, args.max_iterations)
            plans.append((seconds, B, schedule, refinements))
    seconds, B, schedule, refinements = min(plans)
    return {
        "blocks": B,
        "schedule": schedule,
        "refinements": refinements,
        "srds": seconds,
        "sequential": N * calls[1] + decoding,
        "calls": calls,
    }


def describe_plan(plan):
    verdict = "" if plan["srds"] < plan["sequential"] else "; on this device SRDS is not the faster"
    return (
        f"plan: {plan['blocks']} blocks, {plan['schedule']}: about {plan['srds']:.2f} s a prompt "
        f"for {plan['refinements']} refinements, sequential {plan['sequential']:.2f} s{verdict}"
    )


def warn_if_cut(problem, text):
    """Say, and return, what the tokenizer's limit cuts from a text, if it does."""
    import diffusion

    family = problem.model.family
    cut = family.prompted and diffusion.cut_from_prompt(*family.reader(problem.pipeline), text)
    if cut:
        tqdm.write(f"warning: {text[:20]!r}... is longer than the model reads; ignored: {cut!r}", file=sys.stderr)
    return cut or None


def ground_truth(problem, denoise):
    """The sequential states at the boundaries, its image and the coarse one's by file name, its seconds."""
    import diffusion

    started = time.perf_counter()
    with ticking(denoise, "ground truth", problem.args.fine_steps) as ticks:
        points = range(problem.args.fine_steps + 1)
        truth = diffusion.sequential(problem.x, ticks, problem.step, points, problem.boundaries)
    image = problem.image(truth)
    seconds = time.perf_counter() - started
    coarse = diffusion.sequential(problem.x, denoise, problem.step, problem.boundaries)
    return truth, {"srds_ddim_gt": image, "srds_ddim_course": problem.image(coarse)}, seconds


def sample(problem, text):
    """One prompt's entry in run.json, its images by file name, its trajectory errors (None without ground truth)."""
    import utils

    args, denoise = problem.args, problem.denoiser(text)
    cut = warn_if_cut(problem, text)
    truth, images, truth_seconds = (None, {}, None) if args.no_ground_truth else ground_truth(problem, denoise)

    if problem.in_lanes:
        problem.processes.tell([text, args.seed])
        problem.processes.wait()  # until the others have encoded the prompt: that is not the sampler's time

    errors, seconds = [], 0.0
    most = args.fine_steps if args.schedule == "pipelined" else None
    with ticking(denoise, "srds", most) as ticks, contextlib.closing(problem.iterates(ticks)) as iterates:
        started = time.perf_counter()
        for iterate, image, history in watched(problem, iterates):
            history[-1] = {
                "iteration": iterate.k - 1,
                "serial_evaluations": iterate.ticks,
                "total_evaluations": iterate.lane_steps,
                **history[-1],
                "damping": 127.5 * float(iterate.damping),
                "image_error": None,
            }
            seconds += time.perf_counter() - started

            images[f"srds_iteration_{iterate.k - 1}" if iterate.k else "srds_initialized"] = image
            if truth is not None:
                history[-1]["image_error"] = difference(image, images["srds_ddim_gt"])
                errors.append((iterate.states - truth)[1:].cpu().double().flatten(1).norm(dim=1).tolist())
            verdict = "converged" if iterate.exact else judge(history, args.stop_rule, args.tolerance)
            tqdm.write(utils.report(history[-1], verdict))
            if verdict == "converged":
                break
            started = time.perf_counter()
    images["srds_final"] = image

    last = history[-1]
    stop_reason = "exact" if iterate.exact else "tolerance" if verdict == "converged" else "max-iterations"
    if args.stop_rule == "final" and stop_reason == "tolerance" and last["trajectory_change"] >= args.tolerance:
        tqdm.write(
            f"  note: the image has settled, but the trajectory still changes by {last['trajectory_change']:.3f}; "
            "--stop-rule trajectory waits for both"
        )
    result = {
        "prompt": text,
        "ignored": cut,
        "seed": args.seed,
        "converged": stop_reason != "max-iterations",
        "stop_reason": stop_reason,
        **{key: last[key] for key in ("serial_evaluations", "total_evaluations", "image_error", "trajectory_change")},
        "damping": max(at["damping"] for at in history),
        "seconds": {"srds": seconds, "ground_truth": truth_seconds},
        "iterations": history,
    }
    return result, images, None if truth is None else errors


@contextlib.contextmanager
def ticking(denoise, name, most):
    """The denoiser with a progress bar of its calls, at `most` so many."""
    with tqdm(desc=name, total=most, unit="tick", leave=False, disable=None) as bar:

        def counted(x, n):
            bar.update()
            return denoise(x, n)

        yield counted


# When to stop


def watched(problem, iterates):
    """Each iterate with its image and the history of `changes` that it ends, a dictionary a refinement."""
    history, states, image = [], None, None
    for iterate in iterates:
        earlier, image = image, problem.image(iterate.states)
        history.append(changes(image, earlier, iterate.states, states, history))
        states = iterate.states
        yield iterate, image, history


def changes(image, earlier_image, states, earlier_states, history):
    """What the stop rules watch of a refinement, in grey levels; None where nothing came before."""
    if not history:
        return dict.fromkeys(("image_change", "trajectory_change", "predicted_change"))
    change, before = difference(image, earlier_image), history[-1]["image_change"]
    return {
        "image_change": change,
        "trajectory_change": trajectory_change(states, earlier_states),
        # The next refinement's, were changes to shrink at their present rate; they shrink faster (superlinearly).
        "predicted_change": change * change / before if before else change if before == 0 else None,
    }


def difference(image, other):
    """Mean absolute difference of two 8-bit images, 0 to 255."""
    return float(abs(image.astype(float) - other).mean())


def trajectory_change(states, earlier):
    """The largest change of a boundary's state, (B + 1, C, H, W), on the images' scale: see --stop-rule trajectory.

    A boundary's change is the mean absolute change of its state, times 127.5 / standard deviation of the new state.
    """
    change = (states - earlier).abs().flatten(1).mean(1) * 127.5 / states.flatten(1).std(1, correction=0)
    return float(change[1:].max())


def judge(history, rule, tolerance):
    """Whether the last refinement of `history` is "converged", "growing" or "continuing".

    Each change that the rule watches must be below the tolerance. A change that grew, and is not below it, is told
    apart, because parareal can diverge on its way to exactness.
    """
    measured = ("image_change", "trajectory_change") if rule == "trajectory" else ("image_change",)
    watched = ("predicted_change",) if rule == "predicted" else measured
    now, before = history[-1], history[-2] if len(history) > 1 else {}
    if all(now[key] is not None and now[key] < tolerance for key in watched):
        return "converged"
    pairs = [(now[key], before.get(key)) for key in measured]
    grew = any(earlier is not None and change > earlier and change >= tolerance for change, earlier in pairs)
    return "growing" if grew else "continuing"


def main(argv=None):
    """Run the command and return its exit status: 0; 1 for a run that failed, 2 for bad input, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a prompt may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    processes = Processes()
    try:
        with processes.quiet():
            run(parse_arguments(argv), processes)
    except Failure as failure:
        return processes.end(failure, failure.status)
    except KeyboardInterrupt:
        return processes.end("interrupted; what was complete is kept", 130)
    except SystemExit as done:  # --help
        processes.stop_watching()
        return done.code
    except Exception as error:
        if processes.size == 1:
            raise
        traceback.print_exc()
        return processes.end(f"process {processes.rank} failed with a {type(error).__name__}; see its traceback", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
