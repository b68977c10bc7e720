"""A sample's key: everything that its result depends on, in one dictionary, and the name of its folder."""

import functools
import hashlib
import json
import os
import re
import unicodedata
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from asked import Arguments
from refinement import Trajectory
from settings import Failure, Settings, in_one_line

ROOT = Path(__file__).resolve().parent.parent
# The code that makes results. The effect of `settings.py` shows in the resolved settings.
CODE = ["srds.py", "collocation.py", "diffusion.py", "refinement.py", "sampler.py", "study/sampling.py"]
CODE += ["study/processes.py", *(f"models/{name}.py" for name in ("adapters", "loading", "loop"))]
VERSIONS = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "numpy", "scikit-image")}
MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}


class Task(NamedTuple):
    """A sample that a command asks for.

    settings: resolved for the model. arguments: those of the pipeline's call. start: a `refinement.Trajectory` to start
    from, or None. made_by: everything that the result depends on, as `made_by` returns it.
    """

    text: str
    seed: int
    settings: Settings
    arguments: Arguments
    start: Trajectory | None
    made_by: dict

    @property
    def folder(self):
        """The name of the sample's folder in `samples/`."""
        return folder_name(self.made_by)


def made_by(bench, text, seed, settings, arguments, start):
    """Return everything that a sample's result depends on: one dictionary that JSON can hold.

    bench: a `study.bench.Bench`; the others are as in a `Task`.
    """
    experiment, loading = bench.command.experiment, bench.command.loading
    return {
        "prompt": text, **asdict(settings), "seed": seed, "arguments": recorded(arguments),
        "pipeline": bench.model.kind.__name__, **bench.weights, "variant": loading.variant,
        "compile": loading.compile, "device": bench.device.type, "dtype": bench.dtype, "start": start and start.digest,
        "sharing": bench.processes.sharing if settings.fixed_batch else 1,  # it sets the size of a call
        "ground_truth": not experiment.no_ground_truth,
        "keep_trajectories": experiment.keep_trajectories, **VERSIONS, "code": code_digest(),
    }  # fmt: skip


def recorded(arguments):
    """Return the record of arguments, by name: for an image, its file's name and a digest; for a list or dict, JSON."""

    def named(image):
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
        return f"{image.filename} {digest}"

    nested = lambda value: json.dumps(value, default=named) if isinstance(value, (list, tuple, dict)) else value
    plain = lambda value: named(value) if isinstance(value, Image.Image) else nested(value)
    return {name: plain(value) for name, value in sorted(arguments.items())}


def key(made_by):
    """Return the key of a sample: the first 8 hexadecimal digits of a hash."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]


def folder_name(made_by):
    """Return the name of a sample's folder: the prompt's first words, seed and key; at most 100 ASCII characters."""
    return f"{stem(made_by['prompt'], made_by['seed'])}-{key(made_by)}"


def stem(text, seed):
    """Return the first part of the folder names of a prompt and seed."""
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    words = "-".join(re.findall(r"[a-z0-9]+", plain))[:60].strip("-")
    return f"{words or 'sample'}-{seed}"


def first_difference(now, before):
    """Return the first difference in what made two samples, for people: its name and both values."""
    now, before = ({**made, **made["arguments"], "arguments": None} for made in (now, before))
    name = next(name for name in {**now, **before} if before.get(name, "") != now.get(name, ""))
    before, now = (in_one_line(repr(made.get(name)), 60) for made in (before, now))
    return f"{name} {before}, not {now}"


@functools.cache
def code_digest():
    """Return a digest of the code that makes results."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in CODE)).hexdigest()[:16]


def weights(model, adapters):
    """Return digests of a `models.loading.Model` and its adapters, as they are on disk now. Raises Failure.

    adapters: `models.adapters.Adapter` by setting, as `models.adapters.find_adapters` returns them.
    """
    on_hub = not os.path.isdir(model.name)  # where a folder's name is the commit
    found = {"model": model.folder.name if on_hub else digest_of(model.folder)}
    return found | {setting: [[digest_of(each.path), each.how] for each in some] for setting, some in adapters.items()}


def digest_of(path):
    """Return a digest of a file's content, or of all files of a model's folder with their names. Raises Failure."""
    found, files = hashlib.sha256(), [path]
    if path.is_dir():
        index = path / "model_index.json"
        named = sorted(json.loads(index.read_text(encoding="utf-8"))) if index.is_file() else []
        files = [file for name in ["", *named] for file in sorted((path / name).glob("*")) if file.is_file()]
    try:
        for file in (file for file in files if file.suffix in MODEL_FILES or file is path):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found.update(f"{file.relative_to(path)} {digest}\n".encode())
    except OSError as error:
        raise Failure(f"{error.filename} cannot be read: {error.strerror}") from error
    return found.hexdigest()[:16]
