"""One run of the command: the prompts that are left, each prompt's files, the closing table."""

import contextlib
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

import utils
from models.loading import ModelError
from refinement import difference
from settings import Failure, SettingError, in_one_line, out_of_memory
from study.directory import WriteError
from study.earlier import is_locked_by
from study.preparation import prepare, seed_of
from study.processes import ProcessError, wait_until


def run(command, processes):
    """Load, sample and write what a `main.Command` asks for. What can fail without being a bug ends in a Failure."""
    try:
        processes.check_alike(without_places(command))
        with contextlib.ExitStack() as stack:
            sampler, record, left, starts, pending = prepare(command, processes, stack)
            if left:
                try_out(command, sampler)
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


def try_out(command, sampler):
    """Warm up. What fails there, where all that is put in is the model's own, is told as the model's failure."""
    try:
        sampler.warm_up()
    except Exception as error:
        if isinstance(error, Failure) or explain(command, error):
            raise
        why = in_one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"{sampler.model.name}: it cannot be run with what its configs say: {why}") from error


def without_places(command):
    """What all processes of a launch must have been given alike; folders may have other names on other machines."""
    asked = command.ground_truth, command.resume, command.overwrite, command.keep_trajectories, command.parallel
    settings = asdict(command.settings), asdict(command.loading), bool(command.start_from)
    return [*settings, command.texts, command.seeds, *asked]


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

    starts: of each prompt, see `preparation.prepare`.
    """
    texts, processes = command.texts, sampler.processes
    if len(left) < len(texts):
        print(f"{len(texts) - len(left)} of {len(texts)} prompts are complete")
    try:
        if processes.parallel == "lanes" and not processes.first:
            return follow(sampler, starts)
        if not sampler.model.family.prompted and len(texts) > 1 and not command.seeds:
            name, seed = in_one_line(sampler.model.name), sampler.settings.seed
            print(f"{name} reads no prompts: seeds rise from {seed}, one a line")
        if command.settings.negative_prompt:
            warn_if_cut(command.settings.negative_prompt, sampler.ignored(command.settings.negative_prompt))
        with tqdm(desc="prompts", total=len(left), unit="prompt", disable=None) as bar:
            for i in processes.take(left):
                seed = seed_of(i, command, sampler.model)
                named = f"{in_one_line(texts[i])}, seed {seed}" if command.seeds else in_one_line(texts[i])
                tqdm.write(f"prompt {i + 1} of {len(texts)}: {named}")
                try:
                    result, refinement, *files = sample(sampler, texts[i], seed, command.ground_truth, starts[i], i)
                    trajectory = sampler.trajectory(refinement.states, seed) if command.keep_trajectories else None
                    said = record.add(i, result, *files, trajectory)
                    processes.tell("begun", True)
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
    """A refinement as `result.json` has it; PSNR and SSIM are to the ground truth, PSNR null where it is that image."""
    entry = {
        "iteration": refinement.k - 1,
        "serial_evaluations": refinement.serial_evaluations,
        "total_evaluations": refinement.total_evaluations,
        "image_change": refinement.image_change,
        "trajectory_change": refinement.trajectory_change,
        "predicted_change": refinement.predicted_change,
        "damping": refinement.damping,
        "image_error": difference(refinement.image, truth.image) if truth else None,
        "seconds": refinement.seconds,
        "verdict": refinement.verdict,
    }
    return entry | (utils.similarity(refinement.image, truth.image) if truth else {"psnr": None, "ssim": None})


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

    if processes.size > 1:
        wait_until(lambda: record.begun or not processes.told("begun"))
    if not gather() and processes.size > 1:
        wait_until(gather)  # what others have written shows up here
    results = record.finish()
    print(utils.summary(results, command.settings.fine_steps, record.about.get("keeps_bits", True)))
    failures = [result["error"] for result in results if "error" in result]
    if failures:
        raise Failure(f"{len(failures)} of {len(command.texts)} prompts failed; the first: {failures[0]}")
