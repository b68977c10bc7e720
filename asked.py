"""Read what a command line asks for: prompts, seeds, arguments of the pipeline's call, the values of a sweep."""

import ast
import itertools
import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

from PIL import Image, ImageOps

from settings import COARSE_STEPS, ROWS, SETTINGS, Call, SettingError, Settings, number, text

MOST_SEEDS = 10_000  # in a range
SAMPLED = SETTINGS | {each.name for each in fields(Call)}  # settings, and arguments that have flags


class Arguments(dict):
    """Arguments of a pipeline's call, by name: images, and what JSON can hold."""

    def __hash__(self):
        return hash(frozenset(self))


def make_variant(values, notes):
    """Return the `Settings` and the `Arguments` for values by name; "sqrt" blocks are replaced by their number.

    notes: a dict whose keys are lines to print; one is added if the default number of blocks is reduced.
    """
    settings = Settings(**{name: value for name, value in values.items() if name in SETTINGS} | {"coarse_steps": 1})
    call = Call(**{name: value for name, value in values.items() if name in SAMPLED - SETTINGS})
    arguments = {name: value for name, value in asdict(call).items() if value not in (None, "") and name != "call"}
    arguments |= {name: value for name, value in values.items() if name not in SAMPLED}
    blocks, steps = values.get("coarse_steps", COARSE_STEPS), settings.fine_steps
    root = round(math.sqrt(steps))
    if "coarse_steps" not in values and isinstance(blocks, int) and blocks > steps:
        notes[f"note: {root} blocks instead of the default {blocks}, as there are {steps} fine steps"] = True
        blocks = root
    return replace(settings, coarse_steps=root if blocks == "sqrt" else blocks), Arguments(arguments)


def read_call(words):
    """Return the arguments in texts such as "strength=0.6", by name. Raises SettingError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier() or name in (SETTINGS | {"call"}) or name in found:
            remedy = "is not a new argument of the pipeline's call with a value; give each once, as in strength=0.6"
            raise SettingError("call", word, remedy)
        found[name] = read_value(name, value)
    return found


def read_value(name, word):
    """Return the value of a setting or argument; for an argument, an image, a JSON or Python value, or text.

    Image files named in a list are opened, too. Raises SettingError.
    """
    if name in SAMPLED:
        return word if "str" in str(ROWS[name].type) else number(word)
    if picture := open_image(name, word):
        return picture
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(word)
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return [open_image(name, each) or each for each in value] if isinstance(value, list) else value
    return text(empty=True)(name, word)


def open_image(name, word):
    """Return the image in a file, as RGB, or None if the word names no image. Raises SettingError if it is unusable."""
    if not isinstance(word, str) or Path(word).suffix.lower() not in Image.registered_extensions():
        return None
    try:
        if not Path(word).is_file():  # opening a pipe would block
            raise OSError("there is no such file")
        with Image.open(word) as image:
            if image.mode[0] in "IF" or getattr(image, "n_frames", 1) > 1:
                raise OSError(f"frames: {getattr(image, 'n_frames', 1)}, pixel mode: {image.mode}")
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SettingError(name, word, f"cannot be read ({error}); give one image of 8 bits a channel") from None
    picture.filename = Path(word).name
    return picture


def read_sweep(sweeps):
    """Read the axes of a sweep from texts such as "coarse-steps=5,10" or "fine-steps:coarse-steps=25:5,100:10".

    Returns a list with, for each text, the list of its combinations, each a dict of values by setting, or by argument
    of the pipeline's call. Checking them is left to `Settings`, `Call` and the pipeline. Raises SettingError.
    """
    others = ROWS.keys() - SAMPLED | {"seed", "fixed_batch", "call"}
    short = {ROWS[name].metadata["short"].lstrip("-"): name for name in SAMPLED if ROWS[name].metadata["short"]}
    axes, swept = [], set()
    for sweep in sweeps:
        given, _, values = sweep.partition("=")
        names = [word.strip().lstrip("-").replace("-", "_") for word in given.split(":")]
        names = [short.get(name, name) for name in names]
        unknown = [name for name in names if name in others | swept or not name.isidentifier()]
        points = [value.split(":", len(names) - 1) for value in values.split(",")]
        if unknown or not values or any(len(point) < len(names) for point in points):
            remedy = "give a setting and its values, each once, as coarse-steps=5,10 or, for several, fs:cs=25:5,100:10"
            raise SettingError("sweep", sweep, f"is not usable; {remedy}")
        swept |= {*names}
        axes.append([{name: read_value(name, word.strip()) for name, word in zip(names, point)} for point in points])
    return axes


def combinations(axes):
    """Return all combinations of a sweep's axes: a list of dicts, [{}] if there is no sweep."""
    return [dict(itertools.chain(*(part.items() for part in parts))) for parts in itertools.product(*axes)]


def read_seeds(words):
    """Return the seeds in words such as "7", "42-61" or "1,5,9", each once. Raises SettingError."""
    parts = [re.fullmatch(r"\s*([0-9]{1,20})(?:-([0-9]{1,20}))?\s*", part) for part in words.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part]
    usable = [0 < each.stop - each.start <= MOST_SEEDS and each.stop <= 2**64 for each in ranges]
    if not all(parts + usable):
        remedy = f"give numbers, such as 1,5,9, or ranges of at most {MOST_SEEDS}, such as 42-61"
        raise SettingError("seeds", words, f"is not usable; {remedy}")
    return [*dict.fromkeys(itertools.chain(*ranges))]


def syntax_notes(texts):
    """Return notes, a dict whose keys are lines to print, for web UIs' syntax of weights and LoRAs in prompts."""
    known = [re.search(r"\([^()]+:[0-9.]+\)|<lora:[^<>]*>", text) for text in texts]
    return {f"note: {found[0]} in a prompt is read as plain text": True for found in known if found}


def read_prompts(path):
    r"""Return a file's prompts, one a line. Blank lines and lines that begin with # are skipped; \# stands for a #.

    Raises SettingError.
    """
    refuse = lambda why: SettingError("prompts", path, f"{why}; give a text file in UTF-8, one prompt a line")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(f"cannot be read ({getattr(error, 'strerror', 'it is not UTF-8')})") from None
    prompts = [re.sub(r"^\\#", "#", line) for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise refuse("holds no prompt")
    return [text()("prompts", prompt) for prompt in prompts]
