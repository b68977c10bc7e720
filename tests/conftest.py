"""Problems with known solutions, a tiny Stable Diffusion pipeline on disk, and runs of the command on it."""

import json
import os
from pathlib import Path

from study.console import quiet_libraries

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests run side by side, one a core; for what they start as well
quiet_libraries()

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

import diffusion
from pipelines import SD, stable_diffusion

hypothesis.settings.register_profile("srds", deadline=None)  # a machine may be busy
hypothesis.settings.load_profile("srds")
PROMPTS = ["a red sun", "a moon", "snow at night", "the sea"]


class Gaussian:
    """Data N(mean, scale^2) in every coordinate: the optimal denoiser and the ODE's solution are closed forms."""

    mean, scale = 0.7, 0.4

    def __init__(self, steps, prediction_type="epsilon", solver="ddim", zero_snr=False, **settings):
        if prediction_type == "flow":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            scheduler.set_timesteps(steps)
            self.grid = diffusion.flow_grid(scheduler)
        else:
            config = {**SD, "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
            scheduler = DDIMScheduler(**config, clip_sample=False)
            self.grid = diffusion.diffusion_grid(scheduler, steps, solver)
        self.solver = diffusion.Solver(self.grid, solver, **settings)
        self.step, self.points = self.solver.step, range(steps + 1)

    def x0(self, x, a, b):
        return self.mean + a * self.scale**2 / (a**2 * self.scale**2 + b**2) * (x - a * self.mean)

    def denoise(self, x, n):
        a, b = (values[n].reshape(-1, 1, 1, 1) for values in (self.grid.signal, self.grid.noise))
        x0 = self.x0(x.double(), a, b)
        eps = (x - a * x0) / b
        output = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow": eps - x0}
        return output[self.grid.prediction_type].float()

    def solution(self, x, n=-1):
        """The probability-flow ODE's solution at a grid point, the end unless another is given, from x at the first."""
        start, end = ([float(values[point]) for values in self.grid[1:3]] for point in (0, n))
        spread = [(a**2 * self.scale**2 + b**2) ** 0.5 for a, b in (start, end)]
        return end[0] * self.mean + spread[1] / spread[0] * (x.double() - start[0] * self.mean)

    def sequential(self, x, keep=None):
        return diffusion.sequential(x, self.denoise, self.step, self.points, keep)


class Mixture(Gaussian):
    """Data at -1 and 1, each with a little spread: the denoiser is far from linear."""

    def x0(self, x, a, b):
        variance = a**2 * 0.05**2 + b**2
        pull = torch.tanh(a * x / variance)
        return pull + a * 0.05**2 / variance * (x - a * pull)


class Stiff(Gaussian):
    """A denoiser that turns changes round, as strong guidance does."""

    def x0(self, x, a, b):
        return -3 * x / a


def arguments(out, model, *more, prompts=PROMPTS):
    """A command line, without the page, which takes time; of an argument that is given twice, the last counts."""
    texts = [word for text in prompts for word in ("--prompt", text)]
    fixed = ["--device", "cpu", "-cs", "3", "-fs", "9", "--no-report"]
    return ["-o", str(out), "--model", str(model), *fixed, *texts, *more]


def run_record(folder):
    """The run.json of an output directory."""
    return json.loads((folder / "run.json").read_text())


def sample_folders(folder):
    """The folders of the last command's samples, in its order."""
    return [folder / "samples" / said["folder"] for said in run_record(folder)["samples"]]


def sample_records(folder):
    """The result.json of each of the last command's samples, in its order."""
    return [json.loads((place / "result.json").read_text()) for place in sample_folders(folder)]


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def contents(folder):
    """Everything that a directory holds but times and bytes that depend on them: pixels, tables and records by file."""
    readers = {".png": lambda path: pixels(path).tobytes(), ".html": lambda path: None}
    # Texts such as "NA" stay texts.
    readers[".csv"] = lambda path: pd.read_csv(path, keep_default_na=False).filter(regex="^((?!seconds).)*$").to_csv()
    readers[".webp"] = readers[".png"]  # the first of its images
    readers[".json"] = lambda path: without_times(json.loads(path.read_text()))
    return {name: readers[Path(name).suffix](folder / name) for name in files(folder)}


def without_times(value):
    """A value as JSON has it, without what differs between two runs that make the same."""
    if isinstance(value, dict):
        own = {"begun", "sampled", "seconds", "sequential_seconds", "command", "reproduce", "output_dir", "files"}
        return {name: without_times(each) for name, each in value.items() if name not in own}
    return [without_times(each) for each in value] if isinstance(value, list) else value


@pytest.fixture
def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny pipeline as Stable Diffusion 1 ships: epsilon prediction, alpha of step 0 at the end."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    stable_diffusion().save_pretrained(folder)
    return folder
