"""Make one sample: its ground truth, its refinements, and what is measured and printed for each."""

import contextlib
import sys
from datetime import UTC, datetime

import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

import utils
from refinement import difference
from settings import in_one_line, out_of_memory


class Shared:
    """What the samples of one prompt and seed share across several samplers; each part is made once.

    text: the prompt. seed: that of the noise. prompts: the encoded prompts so far, by what they are encoded for.
    """

    def __init__(self, text, seed, samplers, prompts=None):
        self.text, self.seed, self.samplers = text, seed, samplers
        self.prompts, self.truths, self.coarse = {} if prompts is None else prompts, {}, {}

    def prompt(self, sampler):
        """Return the `sampler.Prompt` for a sampler."""
        if sampler.encoded_for not in self.prompts:
            self.prompts[sampler.encoded_for] = sampler.encode(self.text)
        return self.prompts[sampler.encoded_for]

    def truth(self, sampler):
        """Return a sampler's `refinement.Sequential`. If it failed once, it fails again without another try."""
        name = sampler.truth_depends_on
        alike = [other for other in self.samplers if other.truth_depends_on == name]
        kept = sorted({point for other in alike for point in other.boundaries})
        if name not in self.truths:
            try:
                with ticking("ground truth", sampler.N) as on_tick:
                    truth = sampler.sequential(self.prompt(sampler), self.seed, on_tick=on_tick, kept=kept)
            except Exception as error:
                truth = error
            self.truths[name] = truth
        if isinstance(self.truths[name], Exception):
            raise self.truths[name]
        truth = self.truths[name]
        return truth._replace(states=truth.states[[kept.index(point) for point in sampler.boundaries]])

    def coarse_image(self, sampler):
        """Return the image of a sampler's coarse steps alone."""
        name = *sampler.truth_depends_on, *sampler.boundaries
        if name not in self.coarse:
            self.coarse[name] = sampler.sequential(self.prompt(sampler), self.seed, coarse=True).image
        return self.coarse[name]


def sample(sampler, task, shared, begin=lambda: None, metrics=None):
    """Make a sample and return its record, images by name, and a `refinement.Trajectory` if one is to be kept, or None.

    task: a `study.key.Task`. shared: the `Shared` of its prompt and seed. begin: called before the first tick.
    metrics: a `study.metrics.Metrics`, or None.
    """
    settings, seed, prompt, truth = sampler.settings, task.seed, shared.prompt(sampler), None
    warn_if_cut(task.text, prompt.ignored)
    if task.start and task.start.seed != seed:
        tqdm.write(f"  note: the start has seed {task.start.seed}, not {seed}; other noise costs more than it saves")
    images, entries, errors = {}, [], None
    if task.made_by["ground_truth"]:
        truth, errors = shared.truth(sampler), []
        images |= {"srds_ddim_gt": truth.image, "srds_ddim_course": shared.coarse_image(sampler)}
    begin()
    if sampler.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sampler.device)
    with contextlib.ExitStack() as stack:
        on_tick = stack.enter_context(ticking(settings.method, None if settings.schedule == "sweep" else sampler.N))
        refinements = sampler.refine(prompt, seed, on_tick, task.start)
        for refinement in stack.enter_context(contextlib.closing(refinements)):
            name = f"srds_iteration_{refinement.k}" if refinement.k else "srds_initialized"
            images[name] = images["srds_final"] = refinement.image
            entries.append(entry_of(refinement, truth, task.text, metrics))
            if truth:
                errors.append((refinement.states - truth.states)[1:].cpu().double().flatten(1).norm(dim=1).tolist())
            tqdm.write(utils.line_of(entries[-1]))
    if not refinement.settled:
        tqdm.write(f"  note: not settled within {sampler.N} serial evaluations; sequential sampling is better here")
    result = {
        "model": sampler.model.title, "device": device_name(sampler.device),
        "sampled": datetime.now(UTC).isoformat(timespec="seconds"), "ignored": prompt.ignored,
        "stop_reason": refinement.stop_reason, "sequential_seconds": truth.seconds if truth else None,
        "refinements": entries, "errors": errors,
    }  # fmt: skip
    kept = sampler.trajectory(refinement.states, seed) if task.made_by["keep_trajectories"] else None
    return {"made_by": task.made_by, "result": result}, images, kept


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def entry_of(refinement, truth, text, metrics=None):
    """Return a refinement as in `result.json`. PSNR (None for an equal image) and SSIM are to the ground truth."""
    device = refinement.states.device
    names = ("k", "verdict", "settled", "serial_evaluations", "total_evaluations", "network_calls", "widest_tick",
             "seconds", "image_change", "trajectory_change", "predicted_change", "damping")  # fmt: skip
    compared = compare(refinement.image, truth.image) if truth else dict.fromkeys(("difference", "psnr", "ssim"))
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    measures = metrics.measure(refinement.image, truth and truth.image, text) if metrics else {}
    about = {name: getattr(refinement, name) for name in names}
    return {**about, "peak_memory_mib": memory, **compared, "metrics": measures}


def compare(image, truth):
    """Return difference, PSNR (dB; None for equal images) and SSIM of two uint8 images (height, width, 3)."""
    smallest = min(image.shape[:2])
    window = min(7, smallest - 1 + smallest % 2)  # the library's default, or less if it does not fit
    return {
        "difference": difference(image, truth),
        "psnr": None if (image == truth).all() else float(peak_signal_noise_ratio(truth, image)),
        "ssim": float(structural_similarity(truth, image, channel_axis=2, win_size=window)),
    }


def warn_if_cut(text, ignored):
    """Print the part of a text beyond the tokenizer's limit, if there is one."""
    if ignored:
        cut = in_one_line(ignored) + "..." * (len(ignored) > 200)
        tqdm.write(f"warning: {text[:20]!r}... is longer than the model reads; ignored: {cut!r}", file=sys.stderr)


@contextlib.contextmanager
def ticking(name, most):
    """A context with a progress bar of at most `most` ticks (None: unknown); call its value at each tick."""
    with tqdm(desc=name, total=most, unit="tick", leave=False, disable=None) as bar:
        yield lambda lanes: bar.update()


def explain(settings, loading, error):
    """Return what went wrong in the network or on the device, and a remedy, in one line; None for a bug."""
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
