"""What a run yields: refinements, what they changed and cost, and whether the run stops there."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch.nn.functional import one_hot

from settings import SettingError


class Refinement(NamedTuple):
    """The sample after k refinements, what it has cost so far, and what the stop rules watch.

    image: uint8, (height, width, 3). states: U_0 ... U_B, float32, (B + 1, C, H, W), on the model's device.
    serial_evaluations: network calls one after the other (ticks). total_evaluations: of one state each, a guided one
        counting once (lane-steps). widest_tick: the most in one call.
    exact: whether it is the sequential sample, up to the network's rounding, or of collocation up to what a
        threshold leaves unseen.
    damping: what was withheld of a correction, 127.5 times its norm over the state's, at the boundary with most.
    image_change: mean absolute difference to the last refinement's 8-bit image, 0 to 255; None for k = 0.
    trajectory_change: see `trajectory_change`; None for k = 0. predicted_change: the next refinement's image_change, if
        changes shrink at their last rate; None where there is no last rate.
    verdict: "converged", "growing" or "continuing", see `judge`. settled: whether all that k asks for was done;
        collocation can be cut short, and then is not.
    seconds: since the first tick, decoding included, and without what the caller did in between.
    """

    k: int
    image: np.ndarray
    states: torch.Tensor
    serial_evaluations: int
    total_evaluations: int
    widest_tick: int
    exact: bool
    damping: float
    image_change: float | None
    trajectory_change: float | None
    predicted_change: float | None
    verdict: str
    seconds: float
    settled: bool = True

    def __repr__(self):
        return f"Refinement(k={self.k}, serial_evaluations={self.serial_evaluations}, verdict={self.verdict!r}, ...)"

    @property
    def stop_reason(self):
        """Why a run that ends here does: "exact", "tolerance" or "max-iterations"."""
        return "exact" if self.exact else "tolerance" if self.verdict == "converged" else "max-iterations"


class Trajectory(NamedTuple):
    """What a later run can start from: the clean images that lead along a trajectory, as `Sampler.trajectory` finds.

    clean: float32 (B, C, H, W), x0 that, held over a block, leads from its first state to its last.
    boundaries: the grid points between which the blocks lie, 0 to N, a list of B + 1.
    model: the model's name. seed: of its noise; from other noise, a start costs more than it saves.
    """

    clean: torch.Tensor
    boundaries: list[int]
    model: str
    seed: int

    @classmethod
    def read(cls, path):
        """Of a file, as `packed` makes it. Raises ValueError where it is none."""
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError(f"there is no {path}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                clean, n = map(file.get_tensor, ("clean", "boundaries"))
                model, seed = file.metadata()["model"], int(file.metadata()["seed"])
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} holds no trajectory") from error
        rising = n.shape == (len(clean) + 1,) and n[0] == 0 and (n.diff() > 0).all()
        if clean.ndim != 4 or not rising or not clean.isfinite().all():
            raise ValueError(f"{path} holds no trajectory")
        return cls(clean, n.tolist(), model, seed)

    def packed(self):
        """The bytes of a safetensors file."""
        tensors = {"clean": self.clean.cpu().contiguous(), "boundaries": torch.tensor(self.boundaries)}
        return safetensors.torch.save(tensors, {"model": self.model, "seed": str(self.seed)})

    @property
    def digest(self):
        """Tells it from others, on all processes alike."""
        about = json.dumps([*self.clean.shape, self.boundaries, self.model, self.seed])
        return hashlib.sha256(self.clean.cpu().contiguous().numpy().tobytes() + about.encode()).hexdigest()[:32]

    def check(self, shape, model):
        """Raise SettingError unless it is of states of a shape, (C, H, W), and of a model."""
        own = tuple(self.clean.shape[1:])
        if Path(self.model).absolute().name != Path(model).absolute().name:  # wherever it lies
            raise SettingError("start_from", self.model, f"is another model than {model}; start from a run of the same")
        if own != tuple(shape):
            raise SettingError("start_from", own, f"is of other states than {tuple(shape)}; start from the same size")

    def weights(self, N):
        """W, float64 (N, B), by which each of N grid points has the x0 of the block that it lies in."""
        ends = torch.tensor(self.boundaries[1:]) * N
        block = torch.searchsorted(ends, torch.arange(N) * self.boundaries[-1], right=True)
        return one_hot(block, len(self.clean)).double()


class Sequential(NamedTuple):
    """The ground truth: states at the boundaries, float32, (B + 1, C, H, W); the last one's image; seconds."""

    states: torch.Tensor
    image: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Sample:
    """All refinements of a prompt; the first is the initialisation, k = 0.

    It holds the states of each. Where memory is short, take one refinement at a time from `Sampler.refine`.
    """

    prompt: str
    seed: int
    refinements: tuple[Refinement, ...]

    stop_reason = property(lambda self: self.refinements[-1].stop_reason)
    image = property(lambda self: self.refinements[-1].image)
    states = property(lambda self: self.refinements[-1].states)
    serial_evaluations = property(lambda self: self.refinements[-1].serial_evaluations)
    total_evaluations = property(lambda self: self.refinements[-1].total_evaluations)
    seconds = property(lambda self: self.refinements[-1].seconds)


def measured(iterate, image, widest_tick, earlier):
    """The `Refinement` that an iterate and its image are, after the one before it (None for k = 0).

    Verdict and seconds are left open.
    """
    change = moved = predicted = None
    if earlier:
        change, before = difference(image, earlier.image), earlier.image_change
        moved = trajectory_change(iterate.states, earlier.states)
        # Changes shrink superlinearly, so this is too high rather than too low.
        predicted = change * change / before if before else change if before == 0 else None
    counts = iterate.ticks, iterate.lane_steps, widest_tick, iterate.exact, 127.5 * float(iterate.damping)
    return Refinement(iterate.k, image, iterate.states, *counts, change, moved, predicted, "", 0.0, iterate.settled)


def difference(image, other):
    """Mean absolute difference of two 8-bit images, 0 to 255."""
    return float(abs(image.astype(float) - other).mean())


def trajectory_change(states, earlier):
    """The largest change of a boundary's state, (B + 1, C, H, W), on the images' scale.

    A boundary's change is the mean absolute change of its state, times 127.5 / standard deviation of the new state.
    """
    change = (states - earlier).abs().flatten(1).mean(1) * 127.5 / states.flatten(1).std(1, correction=0)
    return float(change[1:].max())


def judge(refinement, earlier, rule, tolerance):
    """Whether a refinement, after the one before it (None for k = 0), is "converged", "growing" or "continuing".

    Each change that the stop rule watches must be below the tolerance. A change that grew, and is not below it, is told
    apart, because parareal can diverge on its way to exactness; so is a refinement that did not settle.
    """
    if not refinement.settled:
        return "growing"
    both = ("image_change", "trajectory_change") if rule == "trajectory" else ("image_change",)
    watched = ("predicted_change",) if rule == "predicted" else both
    changes = [getattr(refinement, name) for name in watched]
    if all(change is not None and change < tolerance for change in changes):
        return "converged"
    pairs = [(getattr(refinement, name), getattr(earlier, name, None)) for name in both]
    grew = any(before is not None and change > before and change >= tolerance for change, before in pairs)
    return "growing" if grew else "continuing"
