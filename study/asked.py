"""Read what a command line asks for: prompts, seeds, the values of a sweep, metrics."""

import itertools
import math
import re
import stat
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from settings import COARSE_STEPS, SettingError, Settings, choice, did_you_mean, flag_of, number, text

MEASURES = ("lpips", "clip", "scene")
MOST_SEEDS = 10_000
MOST_SAMPLES = 10**6
UNASKED = 1000  # most samples that are made without --yes
MOST_CHARACTERS = 10_000  # of a prompt
MOST_BYTES = 64 * 2**20  # of a prompt file


class Variant(NamedTuple):
    """One combination of settings. auto: whether the blocks are still to be planned; until then there is one block."""

    settings: Settings
    auto: bool


def make_variant(values, notes):
    """Return the `Variant` for settings by name; "sqrt" blocks are replaced by their number.

    notes: a dict whose keys are lines to print; one is added if the default number of blocks is reduced.
    """
    rows = {each.name: each for each in fields(Settings)}
    blocks = values.get("coarse_steps", COARSE_STEPS)
    steps = rows["fine_steps"].metadata["check"]("fine_steps", values.get("fine_steps", rows["fine_steps"].default))
    root = max(1, round(math.sqrt(steps)))
    if blocks == "sqrt":
        blocks = root
    elif "coarse_steps" not in values and isinstance(blocks, int) and blocks > steps:
        notes[f"note: {root} blocks instead of the default {blocks}, as there are {steps} fine steps"] = True
        blocks = root
    auto = blocks == "auto"
    settings = Settings(**values | {"coarse_steps": 1 if auto else blocks})
    if auto and settings.method != "srds":
        raise SettingError("coarse_steps", "auto", f"is for srds, not {settings.method}; give a number")
    if auto and settings.fixed_batch:
        remedy = "measures calls of many sizes, but with a fixed batch there is one; give a number"
        raise SettingError("coarse_steps", "auto", remedy)
    return Variant(settings, auto)


def read_sweep(sweeps):
    """Read the axes of a sweep from texts such as "coarse-steps=5,10" or "fine-steps:coarse-steps=25:5,100:10".

    Returns a list with, for each text, the list of its combinations, each a dict of values by setting. The values are
    for `Settings` to check. Raises SettingError.
    """
    rows = {each.name: each for each in fields(Settings) if each.name != "seed"}
    names = rows | {each.metadata["short"].lstrip("-"): each for each in rows.values() if each.metadata["short"]}
    axes, swept = [], set()
    for sweep in sweeps:
        given, equals, values = sweep.partition("=")
        words = [word.strip().lstrip("-").replace("-", "_") for word in given.split(":")]
        unknown = [word for word in words if word not in names]
        if unknown or not equals:
            known = ", ".join(map(flag_of, rows.values())).replace("--", "")
            near = did_you_mean(unknown[0], names) if unknown else ""
            remedy = f"is not usable; give a setting and its values, as in coarse-steps=5,10{near}; settings: {known}"
            raise SettingError("sweep", sweep, remedy)
        axis = []
        for value in values.split(","):
            parts = value.split(":") if len(words) > 1 else [value]
            if len(parts) != len(words):
                raise SettingError("sweep", sweep, f"has {value!r} for {len(words)} settings; join values by colons")
            axis.append({names[word].name: read_value(names[word], part.strip()) for word, part in zip(words, parts)})
        if twice := swept & axis[0].keys():
            raise SettingError("sweep", sweep, f"repeats {twice.pop()}; give all its values in one --sweep")
        if len(axis[0]) < len(words) or any(axis.count(each) > 1 for each in axis):
            raise SettingError("sweep", sweep, "repeats a setting or value; give each once")
        swept |= axis[0].keys()
        axes.append(axis)
    return axes


def read_value(row, word):
    """Return a setting's value for a word, as its flag would read it."""
    kind = str(row.type)
    if "bool" in kind:
        return {"true": True, "false": False}.get(word.lower(), word)
    return word if "str" in kind else number(word)


def combinations(axes):
    """Return all combinations of a sweep's axes: a list of dicts, [{}] if there is no sweep."""
    return [dict(itertools.chain(*(part.items() for part in parts))) for parts in itertools.product(*axes)]


def check_count(count, yes):
    """Raise SettingError for more samples than one command makes, or than it makes without --yes."""
    if count > MOST_SAMPLES:
        raise SettingError("yes", True, f"allows {MOST_SAMPLES} samples at most, but {count} are asked for; give fewer")
    if count > UNASKED and not yes:
        raise SettingError("yes", False, f"is needed for {count} samples, as they are more than {UNASKED}; add it")


def read_seeds(words):
    """Return the seeds in words such as "7", "42-61" or "1,5,9". Raises SettingError."""
    seeds = []
    for part in words.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,20})(?:-([0-9]{1,20}))?\s*", part)
        if not found:
            raise SettingError("seeds", words, "is not usable; give numbers, such as 1,5,9, or a range, such as 42-61")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < min(first + MOST_SEEDS, 2**64):
            remedy = f"has a range that falls, ends above 2^64 - 1, or has more than {MOST_SEEDS} seeds"
            raise SettingError("seeds", words, f"{remedy}; give another range")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise SettingError("seeds", words, "repeats a seed; give each once")
    return seeds


def read_metrics(words, loading, ground_truth):
    """Return the metrics in words such as "lpips,clip". Raises SettingError for unknown or unusable ones."""
    names = [word.strip() for word in words.split(",")] if words is not None else []
    for name in names:
        choice(*MEASURES)("metrics", name)
    if "lpips" in names and not ground_truth:
        raise SettingError("metrics", "lpips", "is a distance to the ground truth; leave out --no-ground-truth")
    if "scene" in names and loading.model != "demo":
        raise SettingError("metrics", "scene", "reads what the demo draws; leave it out for other models")
    return list(dict.fromkeys(names))


def check_prompt(prompt):
    """Return a prompt without surrounding white space. Raises SettingError if it is empty or too long."""
    if not prompt.strip():
        raise SettingError("prompt", prompt, "is blank; give some text")
    if len(prompt) > MOST_CHARACTERS:
        remedy = f"... has {len(prompt)} characters; give at most {MOST_CHARACTERS}"
        raise SettingError("prompt", prompt[:20], remedy)
    return text()("prompt", prompt.strip())


def read_prompts(path):
    r"""Return a file's prompts, one a line. Blank lines and lines that begin with # are skipped; \# stands for a #.

    Raises SettingError.
    """
    wanted = "give a text file in UTF-8, one prompt a line"
    try:
        facts = Path(path).stat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_BYTES:
            raise SettingError("prompts", path, f"is not a file of at most {MOST_BYTES >> 20} MiB; {wanted}")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise SettingError("prompts", path, f"cannot be read ({error.strerror}); {wanted}") from None
    except UnicodeDecodeError:
        raise SettingError("prompts", path, f"is not UTF-8; {wanted}") from None
    prompts = [re.sub(r"^\\#", "#", line) for line in lines if line and not line.startswith("#")]
    long = [i for i, line in enumerate(lines, 1) if len(line) > MOST_CHARACTERS]
    problem = f"has more than {MOST_CHARACTERS} characters in line {long[0]}" if long else ""
    problem = "holds NUL bytes" if any("\0" in line for line in lines) else problem
    if problem or not prompts:
        raise SettingError("prompts", path, f"{problem or 'holds no prompt'}; {wanted}")
    return prompts
