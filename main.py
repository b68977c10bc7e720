"""Sample images by refining a whole diffusion trajectory at once (SRDS or collocation), and show how they converge.

    python main.py --prompts prompts.txt --output-dir output/my_experiment

The defaults are constants in `settings.py`; edit them for experiments.
"""

import argparse
import contextlib
import errno
import os
import shlex
import sys
from dataclasses import dataclass, fields
from importlib.metadata import version

import asked
import settings as table
from settings import ROWS, VERSION, Failure, SettingError, did_you_mean, flag_of, in_one_line, number, words_of
from study.console import prepare_terminal, quiet_libraries


@dataclass(frozen=True)
class Command:
    """A command line, parsed and checked.

    given: its values, by setting. texts: the prompts. seeds: those of --seeds, or None. call: the arguments of --call,
    by name. axes, variants: the sweep, see `asked`. notes: lines to print before sampling. argv: its words.
    """

    given: dict
    loading: table.Loading
    experiment: table.Experiment
    texts: list
    seeds: list | None
    call: dict
    axes: list
    variants: list
    notes: list
    argv: list


def refuse(message):
    raise Failure(message, status=2)


def make_parser():
    how = {"allow_abbrev": False, "usage": "main.py [options]", "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__.splitlines()[0], **how)
    parser.error = refuse
    versions = f"SRDS {VERSION}, torch {version('torch')}, diffusers {version('diffusers')}"
    parser.add_argument("--version", action="version", version=versions, help="show versions and exit")
    groups = {name: parser.add_argument_group(name) for name in table.GROUPS}
    for name, each in ROWS.items():
        about, kind = each.metadata, str(each.type)
        default = about["usual"] if each.default in (None, ()) else each.default
        words = about["meaning"] + (f" (default: {default})" if default not in (None, False, "", ()) else "")
        names = f"{{{','.join(getattr(about['check'], 'names', ()))}}}"
        how = {"action": "store_true"} if "bool" in kind else {"metavar": about["metavar"] or names}
        how |= {"action": "append"} if "tuple" in kind else {} if "str" in kind or "bool" in kind else {"type": number}
        flags = [flag_of(name), *filter(None, [about["short"]])]
        groups[about["group"]].add_argument(*flags, help=words.replace("%", "%%"), **how)
    return parser


def read_flags(argv):
    """Return the values in a command line, by setting; those of a repeated flag as a tuple. Raises Failure."""
    parsed, unknown = make_parser().parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        refuse(f"argument {word} is not known{did_you_mean(word, map(flag_of, ROWS))}; --help lists all")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parsed).items()}


def recorded_words(path, given):
    """Return the words of the command line in a `run.json`, without those about settings that are given now.

    given: the values given now, by setting. Raises SettingError.
    """
    from study.folder import read_json

    try:
        words = shlex.split(read_json(*os.path.split(path), "run")["reproduce"])[2:]
        read_flags(words)
    except (TypeError, ValueError, Failure):
        why = "is no run.json that this version reads" if os.path.exists(path) else "does not exist"
        raise SettingError("config", path, f"{why}; give the run.json of an output directory") from None
    replaced = {name for word in words_of(given) for name in subjects(word)}
    return [word for word in words if not subjects(word) & replaced]


def subjects(word):
    """Return the names of the settings or of the argument of the pipeline's call that a word such as --eta=1 sets."""
    flag, _, value = word.partition("=")
    one = (value.partition("=")[0] if flag == "--call" else flag[2:]).strip().replace("-", "_")
    names = asked.read_sweep([value])[0][0] if flag == "--sweep" else [one]
    return {{"seeds": "seed", "prompts": "prompt"}.get(name, name) for name in names}


def parse(argv):
    """Return the `Command` of a command line, checked as far as possible without the model. Raises Failure."""
    given = read_flags(argv)
    if "output_dir" not in given:
        refuse("argument --output-dir/-o is required; give a directory, existing or new")
    if "config" in given:
        unset = {name: None for name, each in ROWS.items() if "None" in str(each.type)}  # whatever the defaults are
        given = unset | read_flags(recorded_words(given["config"], given) + argv)
    own = lambda kind: {each.name: given[each.name] for each in fields(kind) if each.name in given}
    experiment, loading = table.Experiment(**own(table.Experiment)), table.Loading(**own(table.Loading))
    axes, call = asked.read_sweep(experiment.sweep), asked.read_call(given.get("call", ()))
    seeds = None if experiment.seeds is None else asked.read_seeds(experiment.seeds)
    several = ({"seed": "seeds"} if seeds else {}) | dict.fromkeys(call.keys() & given.keys(), "call")
    for name, other in (several | {name: "sweep" for axis in axes for name in axis[0]}).items():
        if (value := (call | given).get(name)) is not None:
            raise SettingError(name, value, f"cannot be given together with --{other}; give one of them")
    texts = [table.text()("prompt", text.strip()) for text in experiment.prompt or ()]
    texts += asked.read_prompts(experiment.prompts) if experiment.prompts is not None else []
    notes = asked.syntax_notes(texts)
    combined = [own(table.Settings) | own(table.Call) | call | values for values in asked.combinations(axes)]
    variants = [*dict.fromkeys(asked.make_variant(values, notes) for values in combined)]
    return Command(given, loading, experiment, texts, seeds, call, axes, variants, [*notes], argv)


def run(command, processes):
    """Run a command: arguments -> tasks -> those left -> model, if any -> for each: sample, write -> overview."""
    from models.loop import side_by_side
    from study.bench import Bench
    from study.folder import Folder
    from study.overview import Overview, files_of

    bench, folder = Bench(command, processes), Folder(command.experiment.output_dir)
    with processes.in_turn():
        folder.open(command.experiment.dry_run)
    tasks = bench.tasks()
    overview = Overview(command, bench, folder, tasks)
    left = overview.begin()
    if left is None:
        return

    def make(group):
        for task in group:
            overview.say(task)
            try:
                made = bench.sample(task, overview.say)
                folder.add(task.folder, files_of(*made), command.experiment.again)
            except Exception as error:
                overview.failed(task, bench.explain(error))

    try:
        if processes.sharing > 1 and not processes.first:
            bench.follow(tasks)
        else:
            list(side_by_side(make, processes.deal(left), command.experiment.batch))
            processes.broadcast(None)  # tells the processes that follow that there are no more samples
        processes.wait()
    except BaseException:
        with contextlib.suppress(Failure):  # the error that ended the run is the one to report
            overview.end()
        raise
    overview.end()


def main(argv=None):
    """Run the command and return its exit status: 0; 1 if the run failed, 2 for bad input, 130 after Ctrl-C."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    try:
        command = parse(argv)
        quiet_libraries()
        # torch, and everything that imports it, is imported only once the arguments have been checked.
        from study.processes import Processes

        processes = Processes()
        with processes.quiet():
            run(command, processes)
        processes.close()
    except SystemExit as shown:  # --help
        return shown.code
    except Failure as failure:
        return end(one_line(failure), failure.status)
    except KeyboardInterrupt:
        # If one process has ended, and has printed why, torchrun interrupts the others.
        others = os.environ.get("RANK", "0") != "0"
        what = "interrupted; what was finished is kept, and the same command goes on from there"
        return end("" if others else what, 130)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "onnection" not in str(error):
            raise
        return end("", 1)  # the process that has ended prints why
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        sys.stdout = open(os.devnull, "w")  # the reader, such as `head`, has ended, or the disk is full
        return end("the output cannot be written; what was finished is kept, and the same command goes on", 1)
    return 0


def one_line(failure):
    """Return a failure's message, preceded by the flags of the argument that it is about."""
    if not isinstance(failure, SettingError):
        return str(failure)
    name, value = failure.setting, "" if isinstance(failure.value, bool) else f"{failure.value!r} "
    flags = [flag_of(name), ROWS[name].metadata["short"]] if name in ROWS else [name]
    return f"argument {'/'.join(filter(None, flags))}: {value}{failure.remedy}"


def end(message, status):
    """Print one line and return the exit status; one of several processes exits at once, and torchrun ends the rest."""
    if message:
        print(f"main.py: error: {in_one_line(message, 10_000)}", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stderr.flush()
        os._exit(status)  # at once: the others may be waiting for this process
    return status


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
