"""One sample of a run: its ground truth, its refinements as they come, and what is told of them."""

import contextlib
import functools
import sys

import torch
from tqdm import tqdm

import utils
from refinement import difference
from settings import in_one_line, out_of_memory


class Shared:
    """What the samples of one prompt and seed share, at the settings of several samplers: each is made once.

    text: the prompt. seed: of the noise. prompts: what is encoded of that text already, by what it is encoded for.
    """

    def __init__(self, text, seed, samplers, prompts=None):
        self.text, self.seed, self.samplers = text, seed, samplers
        self.prompts, self.truths, self.coarse = {} if prompts is None else prompts, {}, {}

    def prompt(self, sampler):
        """The `Prompt` as a sampler reads it."""
        if sampler.encoded_for not in self.prompts:
            self.prompts[sampler.encoded_for] = sampler.encode(self.text)
        return self.prompts[sampler.encoded_for]

    def truth(self, sampler):
        """A sampler's `Sequential`. What fails does so again, without being tried again."""
        key = sampler.truth_depends_on
        if key not in self.truths:
            self.truths[key] = self._truth(sampler)
        kept, truth = self.truths[key]
        if isinstance(truth, Exception):
            raise truth
        return truth._replace(states=truth.states[[kept.index(point) for point in sampler.boundaries]])

    def _truth(self, sampler):
        alike = [other for other in self.samplers if other.truth_depends_on == sampler.truth_depends_on]
        kept = sorted({point for other in alike for point in other.boundaries})
        try:
            with ticking("ground truth", sampler.settings.fine_steps) as on_tick:
                return kept, sampler.sequential(self.prompt(sampler), self.seed, on_tick=on_tick, kept=kept)
        except Exception as error:
            return kept, error

    def coarse_image(self, sampler):
        """The image of a sampler's coarse steps alone."""
        key = *sampler.truth_depends_on, *sampler.boundaries
        if key not in self.coarse:
            self.coarse[key] = sampler.sequential(self.prompt(sampler), self.seed, coarse=True).image
        return self.coarse[key]


def sample(sampler, shared, i, *, ground_truth, start=None, metrics=None, show=None):
    """One sample's entry in `run.json`, last refinement, images by file name, trajectory errors (None without truth).

    shared: the `Shared` of its prompt and seed. i: the sample's number. ground_truth: whether to make one. start:
    a `refinement.Trajectory`, or None. metrics: `study.metrics.Metrics`, or None. show: called with each refinement's
    image and line, as it is known; or None.
    """
    settings, processes, seed = sampler.settings, sampler.processes, shared.seed
    prompt, images, truth, errors = shared.prompt(sampler), {}, None, None
    warn_if_cut(shared.text, prompt.ignored)
    if start and start.seed != seed:
        tqdm.write(
            f"  note: what it starts from has seed {start.seed}, not {seed}; other noise costs more than it saves"
        )
    if ground_truth:
        truth, errors = shared.truth(sampler), []
        images |= {"srds_ddim_gt": truth.image, "srds_ddim_course": shared.coarse_image(sampler)}
    measure = functools.partial(entry_of, truth=truth, text=shared.text, metrics=metrics)
    if processes.parallel == "lanes":
        processes.call([shared.text, seed, i])  # they encode the prompt first: that is not the sampler's time
    if sampler.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sampler.device)

    iterations = []
    most = None if settings.schedule == "sweep" else settings.fine_steps
    with contextlib.ExitStack() as stack:
        on_tick = stack.enter_context(ticking(settings.method, most))
        for refinement in stack.enter_context(contextlib.closing(sampler.refine(prompt, seed, on_tick, start))):
            images["srds_initialized" if refinement.k == 0 else f"srds_iteration_{refinement.k - 1}"] = refinement.image
            iterations.append(measure(refinement))
            if truth:
                errors.append((refinement.states - truth.states)[1:].cpu().double().flatten(1).norm(dim=1).tolist())
            line = utils.report(iterations[-1], refinement.verdict)
            tqdm.write(line)
            if show:
                show(refinement.image, line.strip())
    images["srds_final"] = refinement.image

    note(refinement, settings)
    of = {"prompt": shared.text, "ignored": prompt.ignored or None, "seed": seed}
    return of | result_of(refinement, iterations, truth), refinement, images, errors


def result_of(refinement, iterations, truth):
    """What `result.json` says of how a sample has ended: its last refinement, and all as `entry_of` has them."""
    last = iterations[-1]
    return {
        "converged": refinement.stop_reason != "max-iterations",
        "stop_reason": refinement.stop_reason,
        **{key: last[key] for key in ("serial_evaluations", "total_evaluations", "image_error", "trajectory_change")},
        "damping": max(entry["damping"] for entry in iterations),
        "seconds": {"srds": refinement.seconds, "ground_truth": truth.seconds if truth else None},
        "iterations": iterations,
    }


def note(refinement, settings):
    """Say what a person should know of how a sample has ended."""
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


def entry_of(refinement, truth, text, metrics=None):
    """A refinement as `result.json` has it; PSNR and SSIM are to the ground truth, PSNR null where it is that image."""
    on_gpu = refinement.states.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(refinement.states.device) / 2**20 if on_gpu else None
    entry = {
        "iteration": refinement.k - 1,
        "serial_evaluations": refinement.serial_evaluations,
        "total_evaluations": refinement.total_evaluations,
        "widest_tick": refinement.widest_tick,
        "image_change": refinement.image_change,
        "trajectory_change": refinement.trajectory_change,
        "predicted_change": refinement.predicted_change,
        "damping": refinement.damping,
        "image_error": difference(refinement.image, truth.image) if truth else None,
        "seconds": refinement.seconds,
        "peak_memory_mib": peak,
        "verdict": refinement.verdict,
        "settled": refinement.settled,
    }
    entry |= utils.similarity(refinement.image, truth.image) if truth else {"psnr": None, "ssim": None}
    return entry | (metrics.measure(refinement.image, truth and truth.image, text) if metrics else {})


def warn_if_cut(text, ignored):
    """Say what the model's limit in tokens cuts from a text, if it does."""
    if ignored:
        cut = in_one_line(ignored) + "..." * (len(ignored) > 200)
        tqdm.write(f"warning: {text[:20]!r}... is longer than the model reads; ignored: {cut!r}", file=sys.stderr)


@contextlib.contextmanager
def ticking(name, most):
    """A progress bar of network calls, at `most` so many; to be called at each."""
    with tqdm(desc=name, total=most, unit="tick", leave=False, disable=None) as bar:
        yield lambda lanes: bar.update()


def explain(settings, loading, error):
    """What went wrong in the network or on the device, and the remedy, in one line; None for a bug."""
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
