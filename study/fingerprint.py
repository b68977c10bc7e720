"""What a result depends on, so that a later run can tell whether it would be the same."""

import hashlib
import itertools
import json
from pathlib import Path

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
# The code that images come from.
CODE = ["srds.py", "collocation.py", "diffusion.py", "refinement.py", "sampler.py", "models/families.py"]
CODE += ["models/checks.py", "models/loading.py", "models/adapters.py"]
READ = {".json", ".txt", ".model", ".safetensors", ".bin"}  # what a model consists of
# Settings that may differ in a run that resumes another: results depend on them by rounding at most. Of a model, what
# is in it counts, not where it lies.
NOT_COMPARED = {"output_dir", "prompts", "prompt", "seeds", "sweep", "parallel", "device", "offload", "model"}
SAMPLE, SAMPLES = 2**16, 64  # bytes and number of what is read of a large file


def made_by(settings, model, adapters, texts, seeds, starts):
    """For each sample, what its result depends on, as JSON reads it back.

    settings: those that the samples take in turn, as `run.json` has them, resolved. model: a `models.loading.Model`.
    adapters: paths or hub ids. texts, seeds, starts: of the samples; a start is a `refinement.Trajectory`, or None.
    """
    compared = []
    for each in settings:
        free = NOT_COMPARED if each["fixed_batch"] else NOT_COMPARED | {"max_batch", "compile"}
        compared.append({key: value for key, value in each.items() if key not in free})
    others = {
        "model's files": model.commit or digest(model.folder),
        "adapters' files": [digest(Path(path)) for path in adapters if Path(path).exists()],
        "version of torch": torch.__version__,
        "version of diffusers": diffusers.__version__,
        "version of transformers": transformers.__version__,
        "version of this program": digest(*(ROOT / name for name in CODE)),
    }
    distinct = {id(start): start for start in starts if start}  # one may be all prompts'
    digests = {key: start.digest for key, start in distinct.items()}
    return [
        {**common, "text": text, "seed": seed, **others, "earlier trajectory": digests.get(id(start))}
        for common, text, seed, start in zip(itertools.cycle(compared), texts, seeds, starts)
    ]


def digest(*paths):
    """Of files, or of all that a model consists of in folders: their names, sizes and contents, in samples if large."""
    found = hashlib.sha256()
    for path in paths:
        for file in _parts(path) if path.is_dir() else [path]:
            size = file.stat().st_size
            found.update(f"{file.relative_to(path) if path.is_dir() else file.name} {size}\n".encode())
            with file.open("rb") as content:
                if size <= 2 * SAMPLE * SAMPLES:
                    found.update(content.read())
                    continue
                for i in range(SAMPLES):  # the first is the header of safetensors, the last the end
                    content.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                    found.update(content.read(SAMPLE))
    return found.hexdigest()[:32]


def _parts(folder):
    """The files in a folder, and in those folders of it that its index names, that a model consists of."""
    index = folder / "model_index.json"
    named = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    places = [folder, *(folder / name for name in sorted(named) if (folder / name).is_dir())]
    return [file for place in places for file in sorted(place.iterdir()) if file.suffix in READ and file.is_file()]
