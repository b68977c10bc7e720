"""Make one sample: its ground truth, its refinements, and what is measured and printed for each."""

import contextlib
from datetime import UTC, datetime

import torch
from tqdm import tqdm

import utils
from refinement import entry_of


class Shared:
    """What the samples of one prompt, a `sampler.Prompt`, and seed share: each ground truth, made once."""

    def __init__(self, prompt, seed):
        self.prompt, self.seed, self.truths = prompt, seed, {}

    def truth(self, sampler):
        """Return a sampler's `refinement.Sequential`."""
        name = sampler.truth_depends_on
        if name not in self.truths:
            N = sampler.boundaries[-1]
            with ticking("ground truth", N) as on_tick:  # every state, as samplers differ in their boundaries
                truth = sampler.sequential(self.prompt, self.seed, on_tick=on_tick, kept=range(N + 1))
            self.truths[name] = truth._replace(states=truth.states.cpu())
        return self.truths[name]._replace(states=self.truths[name].states[sampler.boundaries].to(sampler.device))


def sample(sampler, task, shared, say):
    """Make a sample and return its record, images by name, and a `refinement.Trajectory` if one is to be kept, or None.

    task: a `study.key.Task`. shared: the `Shared` of its prompt and seed. say: prints a line about a task.
    """
    settings, device, N = sampler.settings, sampler.device, sampler.boundaries[-1]
    images, entries, truth, errors = {}, [], None, None
    if task.made_by["ground_truth"]:
        truth, coarse, errors = shared.truth(sampler), sampler.sequential(shared.prompt, task.seed, coarse=True), []
        images |= {"srds_ddim_gt": truth.image, "srds_ddim_course": coarse.image}
    sampler.processes.broadcast(task.folder)  # tells those that share lanes which sample's ticks follow
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        ticking(settings.method, None if settings.schedule == "sweep" else N) as on_tick,
        contextlib.closing(sampler.refine(shared.prompt, task.seed, on_tick, task.start)) as refinements,
    ):
        for refinement in refinements:
            images[utils.image_name(refinement.k)] = images["srds_final"] = refinement.image
            peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
            entries.append({**entry_of(refinement, truth), "peak_memory_mib": peak})
            if truth:
                errors.append((refinement.states - truth.states)[1:].cpu().double().flatten(1).norm(dim=1).tolist())
            say(task, utils.line_of(entries[-1]))
    if not refinement.settled:
        say(task, f"  note: not settled within {N} serial evaluations; sequential sampling is better here")
    result = {
        "model": sampler.model.title,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "sampled": datetime.now(UTC).isoformat(timespec="seconds"), "stop_reason": refinement.stop_reason,
        "sequential_seconds": truth.seconds if truth else None, "refinements": entries, "errors": errors, "steps": N,
        "elements": refinement.states[0].numel(), "size": [*utils.sheet(refinement.image).shape[1::-1]],
    }  # fmt: skip
    kept = sampler.trajectory(refinement.states, task.seed) if task.made_by["keep_trajectories"] else None
    return {"made_by": task.made_by, "result": result}, images, kept


@contextlib.contextmanager
def ticking(name, most):
    """A context with a progress bar of at most `most` ticks (None: unknown); call its value at each tick."""
    with tqdm(desc=name, total=most, unit="tick", leave=False, disable=None) as bar:
        yield lambda lanes: bar.update()
