"""What sampling yields: refinements, their changes and costs, and whether sampling stops there."""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn.functional import one_hot

from settings import SettingError

# The columns of `results.csv` before those of the settings.
MEASURED = ("prompt seed folder k final verdict serial_evaluations total_evaluations network_calls widest_tick seconds "
            "sequential_seconds peak_memory_mib difference psnr ssim image_change trajectory_change damping "
            "error").split()  # fmt: skip


class Refinement(NamedTuple):
    """The sample after k refinements, its cost so far, and what the stop rules watch.

    image: uint8, (height, width, 3), or (frames, height, width, 3) for a video.
    states: U_0 ... U_B, float32, (B + 1, ...), on the model's device.
    serial_evaluations: batched model evaluations, one after the other (ticks). total_evaluations: evaluations of single
        states; a guided one counts once (lane-steps). network_calls: calls of the network by this process, some of them
        shared with others of a batch; with `max_batch`, a tick may take several. widest_tick: most states in a tick.
    exact: whether it is the sequential sample up to the network's rounding. all_nodes: for collocation, whether every
        grid point is a node; then it is the sequential sample up to what the threshold leaves unseen.
    damping: what was withheld from a correction, 127.5 times its norm over the state's, at the boundary with most.
    image_change: mean absolute difference to the last refinement's 8-bit image, 0 to 255; None for k = 0.
    trajectory_change: see the function; None for k = 0.
    verdict: "converged", "growing" or "continuing", see `judge`. settled: whether refinement k was completed;
        collocation can be cut short.
    seconds: since the first tick, with decoding, without the time that the caller took in between; in a batch, with the
        work for its other samples.
    """

    k: int
    image: np.ndarray
    states: torch.Tensor
    serial_evaluations: int
    total_evaluations: int
    network_calls: int
    widest_tick: int
    exact: bool
    all_nodes: bool
    damping: float
    image_change: float | None
    trajectory_change: float | None
    verdict: str
    seconds: float
    settled: bool = True

    def __repr__(self):
        return f"Refinement(k={self.k}, serial_evaluations={self.serial_evaluations}, verdict={self.verdict!r}, ...)"

    @property
    def stop_reason(self):
        """Why sampling stops if it stops here: "exact", "all nodes", "tolerance" or "max-iterations"."""
        complete = "exact" if self.exact else "all nodes" if self.all_nodes else None
        return complete or ("tolerance" if self.verdict == "converged" else "max-iterations")


class Trajectory(NamedTuple):
    """What a later run can start from: the clean images that lead along a trajectory; see `Sampler.trajectory`.

    clean: float32 (B, ...), for each block the x0 that, held over it, leads from its first state to its last.
    boundaries: the grid points between the blocks, 0 to N, a list of B + 1.
    """

    clean: torch.Tensor
    boundaries: list[int]

    @classmethod
    def unpack(cls, data):
        """Return the trajectory in the bytes of a file made by `packed`. Raises ValueError if they hold none."""
        try:
            tensors = safetensors.torch.load(data)
            clean, n = tensors["clean"], tensors["boundaries"]
            rising = n.shape == (len(clean) + 1,) and n[0] == 0 and (n.diff() > 0).all() and n[-1] <= 2**20
            usable = len(clean) and rising and clean.ndim > 1 and clean.isfinite().all()
            if (clean.dtype, n.dtype) != (torch.float32, torch.int64) or not usable:
                raise ValueError("other tensors")
            return cls(clean, n.tolist())
        except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"it holds no trajectory: {error}") from error

    def packed(self):
        """Return the trajectory as the bytes of a safetensors file."""
        n = torch.tensor(self.boundaries, device="cpu")
        return safetensors.torch.save({"clean": self.clean.cpu().contiguous(), "boundaries": n})

    @property
    def digest(self):
        """A hash of its content, the same on all processes."""
        return hashlib.sha256(self.packed()).hexdigest()[:32]

    def check(self, shape):
        """Raise SettingError unless its states have this shape."""
        own = tuple(self.clean.shape[1:])
        if own != tuple(shape):
            raise SettingError("start_from", own, f"is not the states' shape {tuple(shape)}; start from the same size")

    def weights(self, N):
        """Return W, float64 (N, B), which gives each of N grid points the x0 of its block."""
        ends = torch.tensor(self.boundaries[1:], device="cpu") * N
        block = torch.searchsorted(ends, torch.arange(N, device="cpu") * self.boundaries[-1], right=True)
        return one_hot(block, len(self.clean)).double()


class Sequential(NamedTuple):
    """The ground truth: states at the boundaries, float32 (B + 1, ...), the image of the last one, seconds."""

    states: torch.Tensor
    image: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Sample:
    """All refinements of a prompt; the first is the initialisation, k = 0.

    It holds the states of each. If memory is short, take one refinement at a time from `Sampler.refine`.

    trajectory: that of the last refinement, from which others can start.
    """

    prompt: str
    seed: int
    refinements: tuple[Refinement, ...]
    trajectory: Trajectory = field(repr=False)

    stop_reason = property(lambda self: self.refinements[-1].stop_reason)
    image = property(lambda self: self.refinements[-1].image)
    states = property(lambda self: self.refinements[-1].states)
    serial_evaluations = property(lambda self: self.refinements[-1].serial_evaluations)
    total_evaluations = property(lambda self: self.refinements[-1].total_evaluations)
    seconds = property(lambda self: self.refinements[-1].seconds)

    def table(self, truth=None):
        """Return a row for each refinement, with the columns of `results.csv` that a sample knows: a pandas DataFrame.

        truth: a `Sequential`, for the columns that compare with it, which are otherwise empty.
        """
        known = {"prompt": self.prompt, "seed": self.seed, "sequential_seconds": truth and truth.seconds}
        rows = [{**known, "final": each is self.refinements[-1], **entry_of(each, truth)} for each in self.refinements]
        return pd.DataFrame(rows, columns=[name for name in MEASURED if name in rows[0]])


def measured(iterate, image, network_calls, widest_tick, earlier):
    """Return the `Refinement` of an iterate and its image; `earlier` is the one before it, None for k = 0.

    Verdict and seconds are still to be filled in.
    """
    change = difference(image, earlier.image) if earlier else None
    moved = trajectory_change(iterate.states, earlier.states) if earlier else None
    counts = iterate.ticks, iterate.lane_steps, network_calls, widest_tick
    how = iterate.exact, iterate.all_nodes, 127.5 * float(iterate.damping)
    return Refinement(iterate.k, image, iterate.states, *counts, *how, change, moved, "", 0.0, iterate.settled)


def entry_of(refinement, truth=None):
    """Return a refinement as in `result.json`; its difference, PSNR (dB) and SSIM are to the ground truth, if given.

    For a video, SSIM is the mean over its frames.
    """
    image, unstored = refinement.image, ("image", "states", "exact", "all_nodes")
    entry = {name: value for name, value in refinement._asdict().items() if name not in unstored}
    entry["difference"] = difference(image, truth.image) if truth else None
    # The PSNR of equal images is infinite.
    entry["psnr"] = float(peak_signal_noise_ratio(truth.image, image)) if entry["difference"] else None
    wide = min(image.shape[-3:-1]) >= 7  # the width of its window
    pairs = zip(*(each.reshape(-1, *image.shape[-3:]) for each in (truth.image, image))) if truth and wide else ()
    similarities = [structural_similarity(*pair, channel_axis=2) for pair in pairs]
    entry["ssim"] = float(np.mean(similarities)) if similarities else None
    return entry


def difference(image, other):
    """Return the mean absolute difference of two 8-bit images, or videos, 0 to 255."""
    return float(abs(image.astype(float) - other).mean())


def trajectory_change(states, earlier):
    """Return the largest change of the states, (B + 1, ...), over the boundaries, on the images' scale.

    A boundary's change is the mean absolute change of its state, times 127.5 / standard deviation of the new state.
    """
    change = (states - earlier).abs().flatten(1).mean(1) * 127.5 / states.flatten(1).std(1, correction=0)
    return float(change[1:].max())


def judge(refinement, earlier, rule, tolerance):
    """Return "converged", "growing" or "continuing" for a refinement and the one before it (None for k = 0).

    It has converged if each change that the stop rule watches is below the tolerance. It is growing if a change grew
    and is not below it, as parareal can diverge on its way to exactness, or if it did not settle.
    """
    if not refinement.settled:
        return "growing"
    watched = ("image_change", "trajectory_change") if rule == "trajectory" else ("image_change",)
    pairs = [(getattr(refinement, name), getattr(earlier, name, None)) for name in watched]
    if all(change is not None and change < tolerance for change, _ in pairs):
        return "converged"
    grew = any(before is not None and change > before and change >= tolerance for change, before in pairs)
    return "growing" if grew else "continuing"
