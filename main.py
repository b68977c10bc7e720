"""Sample images by refining all of a diffusion trajectory at once (SRDS, or collocation); show how they converge.

    python main.py --prompts prompts.txt --output-dir output/my_experiment

The defaults are in `settings.py`, to be edited for experiments.
"""

import argparse
import contextlib
import io
import math
import os
import stat
import sys
import traceback
from dataclasses import dataclass, fields
from pathlib import Path

import settings as defaults
from settings import Failure, Loading, SettingError, Settings, choice, in_one_line, number
from study.samples import MOST_RUNS, check_prompt, combinations, read_metrics, read_prompts, read_seeds, read_sweep
from study.terminal import Lasting, terminable


@dataclass(frozen=True)
class Command:
    """What the command is to do: sample `texts`, one for each sample, with a model that `loading` brings into memory.

    settings: the `Settings` of a sweep, which the samples take in turn; one of no sweep. swept: what differs there, a
    dict for each. seeds: of each text, where several were given; else None. prompts, prompt: where the texts come from,
    a file or the command line. ground_truth: whether to sample step by step as well. metrics: names of those to
    measure. resume: whether to keep what an earlier run has completed. overwrite: whether to remove an earlier run of
    other results, in place of setting it aside. keep_trajectories: whether to write them. start_from: the directory of
    a run that did, or None. parallel: what several processes share, "lanes", "prompts", or None to choose. report:
    whether to write the page. preview: whether to write the image as it is while it is refined. argv: the words of the
    command line.
    """

    settings: list
    swept: list
    loading: Loading
    texts: list
    seeds: list | None
    prompts: str | None
    prompt: list | None
    output_dir: str
    ground_truth: bool
    metrics: list
    resume: bool
    overwrite: bool
    keep_trajectories: bool
    start_from: str | None
    parallel: str | None
    report: bool
    preview: bool
    argv: list

    @property
    def kind(self):
        """What samples are called: prompts, where there is one of each."""
        return "samples" if self.seeds or len(self.swept) > 1 else "prompts"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise Failure(message, status=2)


def one_of(names):
    return f"{{{','.join(names)}}}"


# Flags, type, how the value is called, help. Defaults are in `settings`, under the flag's name.
ARGUMENTS = {
    "required: an output directory, and prompts from a file or one by one": [
        ("--prompts -p", str, "FILE",
         "text file with one prompt a line, UTF-8; of models that read none, a seed a line"),
        ("--prompt", list, "TEXT", "a prompt; may be repeated"),
        ("--output-dir -o", str, "DIR", "where images and analysis go"),
    ],
    "algorithm": [
        ("--method", str, one_of(defaults.METHODS),
         "srds refines blocks of steps, collocation a few points in time (%(default)s)"),
        ("--coarse-steps -cs", number, "B",
         "blocks, at most N; auto: as many as take the least time on this device; of collocation, only where errors "
         "are told (%(default)s)"),
        ("--fine-steps -fs", number, "N",
         "steps of the sequential sampler that is reproduced; at most the model's own (%(default)s)"),
        ("--solver", str, one_of(defaults.SOLVERS), "solver of each step (ddim; for flow matching, euler)"),
        ("--eta", number, "E", "noise in ddim's steps, 0 to 1 (%(default)s)"),
        ("--tolerance -tol", number, "T",
         "stop when a refinement changes the image by less, 0 to 255; 0: go on until exact (%(default)s)"),
        ("--schedule", str, one_of(defaults.SCHEDULES),
         "what a call works on: blocks of all refinements, or of one (pipelined; with auto blocks, the faster)"),
        ("--correction", str, one_of(defaults.CORRECTIONS),
         "the paper's, or damped where the coarse step overshoots (damped)"),
        ("--nodes", number, "M",
         "of collocation: points in time of its first solution (13; 100 of pixels, and where the model proves rough)"),
        ("--window", number, "W",
         "of collocation: most nodes in a network call, but for a refinement's new ones (8; half the root of 100 nodes "
         "or more)"),
        ("--stop-rule", str, one_of(defaults.STOP_RULES),
         "what must be below the tolerance: the image's last change, that of every boundary's state too, or the "
         "predicted next change of the image (%(default)s)"),
        ("--max-iterations", number, "K", "most refinements (until exact)"),
    ],
    "generation": [
        ("--model", str, "MODEL", "hub id, local folder, demo, or fashion (%(default)s)"),
        ("--variant", str, "NAME", "variant of the weights, such as fp16"),
        ("--lora", list, "FILE[:SCALE]", "LoRA weights, a file or hub id, and their scale (1); may be repeated"),
        ("--textual-inversion", list, "FILE",
         "textual inversion embeddings, a file or hub id; may be repeated"),
        ("--guidance-scale -gs", number, "S",
         "scale of classifier-free guidance (off at 1 and below), or of the network's own (the model's usual)"),
        ("--negative-prompt", str, "TEXT", "what guidance leads away from"),
        ("--height", number, "PX", "in pixels (the model's native one; of Stable Diffusion at most 512)"),
        ("--width", number, "PX", "(likewise)"),
        ("--seed -s", number, "SEED", "of the initial noise and of the noise in the steps (%(default)s)"),
        ("--seeds", str, "SEEDS", "several in place of one, such as 42-61 or 1,5,9: a sample of each prompt and seed"),
        ("--sweep", list, "NAME=V1,V2,...",
         "values of a setting that loads no other model, such as coarse_steps=5,10,auto: a sample with each; may be "
         "repeated, for all combinations"),
        ("--yes", bool, None, f"begin a sweep of more than {MOST_RUNS} samples"),
        ("--resume", bool, None,
         "keep what an earlier run has completed; prompts, seeds and values of a sweep may be added"),
        ("--overwrite", bool, None, "remove an earlier run of other results; else it is moved into earlier/"),
        ("--start-from", str, "DIR",
         "begin from the trajectories that an earlier run of one prompt, or of as many prompts as here, has kept"),
        ("--keep-trajectories", bool, None, "keep what --start-from of a later run takes, in trajectory.safetensors"),
        ("--metrics", str, "NAMES",
         "more measures of the images, some of: lpips, to the ground truth; clip, the score of image and prompt; "
         "scene, the share of a prompt that the demo's image shows"),
        ("--preview", bool, None, "keep preview.png, the image after the last refinement, while the run lasts"),
        ("--no-report", bool, None, "leave out report.html, the page that shows the run"),
        ("--no-ground-truth", bool, None, "skip the sequential run that images are compared with"),
    ],
    "machine": [
        ("--parallel", str, one_of(defaults.PARALLELS),
         "what the processes of accelerate launch or torchrun share: the lanes of each tick, or the prompts (prompts, "
         "if there are more of them than processes)"),
        ("--device", str, "DEVICE", "auto, cpu, cuda, cuda:1, mps ... (%(default)s)"),
        ("--dtype", str, one_of(defaults.DTYPES), "auto: float16 or bfloat16 on cuda, float32 elsewhere (%(default)s)"),
        ("--max-batch", number, "M", "most network samples in one call, where memory is short (no limit)"),
        ("--offload", bool, None, "keep on the device only the part of the model that runs"),
        ("--vae-tiling", bool, None, "decode large images in tiles, where memory is short"),
        ("--fixed-batch", bool, None, "pad every network call to one shape: reproducible to the bit"),
        ("--compile", bool, None, "torch.compile the network: takes minutes once, then calls are faster"),
    ],
}  # fmt: skip


def make_parser():
    """The parser, and the flags of each argument by its name."""
    parser, flags = Parser(prog="main.py", description=__doc__.splitlines()[0], allow_abbrev=False), {}
    for title, arguments in ARGUMENTS.items():
        group = parser.add_argument_group(title)
        for names, kind, metavar, words in arguments:
            names = names.split()
            name = names[0].removeprefix("--").replace("-", "_")
            default = getattr(defaults, name.upper(), None)
            how = {"type": kind, "metavar": metavar, "default": default, "required": name == "output_dir"}
            if default not in (None, "") and "%(default)s" not in words:
                words += " (now %(default)s)"  # edited, in place of the usual one
            if kind in (bool, list):
                how = {"action": "store_true"} if kind is bool else {"action": "append", "metavar": metavar}
            group.add_argument(*names, help=words, **how)
            flags[name] = "/".join(names)
    return parser, flags


def parse_arguments(parser, flags, argv):
    """The `Command`, checked as far as it can be before the model is known. Raises Failure."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    seeds, values = None if args.seeds is None else read_seeds(args.seeds), read_sweep(args.sweep or (), flags)
    several = {"seed": "seeds"} if seeds else {}
    several |= dict.fromkeys(values, "sweep")
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(several, several)))  # which has no defaults
    for name, other in several.items():
        if getattr(given, name) is not several:
            text = args.seeds if other == "seeds" else " ".join(args.sweep)
            raise SettingError(other, text, f"is given beside {flags[name].split('/')[0]}; give one of them")
    if seeds:
        args.seed = seeds[0]
    args.lora, args.textual_inversion = args.lora or (), args.textual_inversion or ()
    if (args.prompts is None) == (args.prompt is None):
        given = "neither was given" if args.prompts is None else "both were given"
        raise Failure(f"argument --prompts/-p or --prompt: {given}; give one of them", status=2)
    base, loading = ({field.name: getattr(args, field.name) for field in fields(kind)} for kind in (Settings, Loading))
    texts = read_prompts(args.prompts) if args.prompt is None else [check_prompt(prompt) for prompt in args.prompt]
    pairs = [(text, seed) for text in texts for seed in seeds or [None]]
    count = len(pairs) * math.prod(map(len, values.values()))
    if values and count > MOST_RUNS and not args.yes:
        remedy = f"makes {count} samples, more than {MOST_RUNS}; give fewer values, or --yes"
        raise SettingError("sweep", " ".join(args.sweep), remedy)
    swept = combinations(values)
    settings, loading = [Settings(**base | each) for each in swept], Loading(**loading)
    if loading.compile:
        for each in settings:
            each.check_compiled()
    choice(*defaults.PARALLELS, optional=True)("parallel", args.parallel)
    texts, seeds = ([pair[part] for pair in pairs for _ in swept] for part in (0, 1))
    check_output_dir(args.output_dir)
    if args.resume and args.overwrite:
        raise SettingError("overwrite", True, "removes what --resume keeps; give one of them")
    if args.start_from is not None and Path(args.start_from).resolve() == Path(args.output_dir).resolve():
        raise SettingError("start_from", args.start_from, "is the output directory, which is written anew; give two")
    ground_truth, report = not args.no_ground_truth, not args.no_report
    metrics = read_metrics(args.metrics, loading, ground_truth)
    return Command(
        settings, swept, loading, texts, seeds if args.seeds else None, prompts=args.prompts, prompt=args.prompt,
        output_dir=args.output_dir, ground_truth=ground_truth, metrics=metrics,
        resume=args.resume, overwrite=args.overwrite, keep_trajectories=args.keep_trajectories,
        start_from=args.start_from, parallel=args.parallel, report=report, preview=args.preview, argv=[*argv],
    )  # fmt: skip


def check_output_dir(folder):
    """Raise SettingError unless the directory is there, or can be made, and can be written. Nothing is made yet."""
    path, problem = Path(folder), "" if folder else "is empty"
    while not problem:
        try:
            directory = stat.S_ISDIR(path.stat().st_mode)
            writable = os.access(path, os.R_OK | os.W_OK | os.X_OK)
            problem = "is not a directory" if not directory else "" if writable else "is not writable"
            break
        except FileNotFoundError:
            problem = "is a broken link" if path.is_symlink() else ""
            path = path.parent
        except OSError as error:
            problem = f"cannot be used ({error.strerror})"
    if problem:
        raise SettingError("output_dir", folder, f"{problem}; give a directory, existing or new")


def main(argv=None):
    """Run the command and return its exit status: 0; 1 for a run that failed, 2 for bad input, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a prompt may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    with contextlib.redirect_stdout(Lasting(sys.stdout)), contextlib.redirect_stderr(Lasting(sys.stderr)), terminable():
        return carry_out(argv)


def carry_out(argv):
    """Run the command, as `main` does."""
    parser, flags = make_parser()
    command = failure = processes = None
    first = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
            command = parse_arguments(parser, flags, argv)
    except SystemExit as shown:  # --help
        return shown.code
    except Failure as error:
        failure = error
    if failure and os.environ.get("WORLD_SIZE", "1") == "1":
        return end(one_line(failure, flags), failure.status)
    try:
        # torch, and all that imports it, waits until the arguments are known to be good.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or it tells of a lost store in hundreds of lines
        from study.quiet import quiet_libraries

        quiet_libraries()
        from study.processes import Processes
        from study.run import run

        metrics = None
        if command and command.metrics:
            from study.metrics import Metrics as metrics

        processes = Processes()
        with processes.quiet():
            if failure:
                raise failure
            run(command, processes, metrics)
    except Failure as error:
        return end(one_line(error, flags), error.status, processes)
    except KeyboardInterrupt:
        return end("interrupted; what was complete is kept", 130, processes)
    except Exception as error:
        if processes is None or processes.size == 1:
            raise
        traceback.print_exc()
        message = f"process {processes.rank} failed with a {type(error).__name__}; see its traceback"
        return end(message, 1, processes)
    return 0


def one_line(failure, flags):
    """What a failure says, with the flags of the argument that it is about."""
    if not isinstance(failure, SettingError):
        return str(failure)
    value = "" if failure.value is True else f"{failure.value!r} "
    return f"argument {flags[failure.setting]}: {value}{failure.remedy}"


def end(message, status, processes=None):
    """Print one line, on the first of several processes, and return the exit status."""
    message = f"main.py: error: {in_one_line(message, 10_000)}"
    if processes:
        return processes.end(message, status)
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
