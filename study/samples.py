"""Which samples a command asks for: its prompts, with each of several seeds, at each of several settings."""

import itertools
import re
from dataclasses import fields
from pathlib import Path

from settings import MEASURES, SettingError, Settings, choice, in_one_line, number, text

MOST_SEEDS = 10_000
MOST_RUNS = 1000  # of a sweep that begins without being asked again


def read_seeds(words):
    """The seeds in words such as "42-61" or "1,5,9". Raises SettingError."""
    seeds = []
    for part in words.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,20})(?:-([0-9]{1,20}))?\s*", part)
        if not found:
            raise SettingError("seeds", words, "is not usable; give numbers, such as 1,5,9, or a range, such as 42-61")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < first + MOST_SEEDS:
            raise SettingError("seeds", words, f"has a range that does not rise, or of more than {MOST_SEEDS} seeds")
        seeds += [Settings.domains["seed"]("seeds", seed) for seed in range(first, last + 1)]
    if len(set(seeds)) < len(seeds):
        raise SettingError("seeds", words, "has a seed twice; give each once")
    return seeds


def read_sweep(sweeps, flags):
    """The values in texts such as "coarse_steps=5,10,auto", a list by setting.

    flags: of each setting by its name, of which a text may have any. The values are for `Settings` to check. Raises
    SettingError.
    """
    names = {flag.lstrip("-").replace("-", "_"): name for name in _sweepable() for flag in flags[name].split("/")}
    swept = {}
    for sweep in sweeps:
        given, equals, values = sweep.partition("=")
        name = names.get(given.strip().lstrip("-").replace("-", "_"))
        if not name or not equals:
            known = ", ".join(_sweepable())
            remedy = f"is not usable; give a setting and its values, as in coarse_steps=5,10, of {known}"
            raise SettingError("sweep", sweep, remedy)
        if name in swept:
            raise SettingError("sweep", sweep, f"is of {name}, as another is; give all its values in one")
        swept[name] = [_value(name, word.strip()) for word in values.split(",")]
        if len(set(swept[name])) < len(swept[name]):
            raise SettingError("sweep", sweep, "has a value twice; give each once")
    return swept


def combinations(swept):
    """All combinations of a sweep's values: a list of dicts, [{}] of no sweep."""
    return [dict(zip(swept, values)) for values in itertools.product(*swept.values())]


def _sweepable():
    return [field.name for field in fields(Settings) if field.name != "seed"]


def _value(name, word):
    """A setting's value from a word, as its flag would read it."""
    if name == "fixed_batch":
        return {"true": True, "false": False}.get(word.lower(), word)
    return word if Settings.__annotations__[name] is str else number(word)


def read_metrics(words, loading, ground_truth):
    """The metrics in words such as "lpips,clip". Raises SettingError for what is none, or cannot be measured."""
    names = [word.strip() for word in words.split(",")] if words is not None else []
    for name in names:
        choice(*MEASURES)("metrics", name)
    if "lpips" in names and not ground_truth:
        raise SettingError("metrics", "lpips", "is a distance to the ground truth; leave out --no-ground-truth")
    if "scene" in names and loading.model != "demo":
        raise SettingError("metrics", "scene", "reads what the demo draws; leave it out for other models")
    return list(dict.fromkeys(names))


def label(variation):
    """A combination of a sweep, as a person reads it."""
    return ", ".join(f"{name}={in_one_line(value)}" for name, value in variation.items())


def check_prompt(prompt):
    """A prompt without white space around it. Raises SettingError where nothing is left."""
    if not prompt.strip():
        raise SettingError("prompt", prompt, "is blank; give some text")
    return text()("prompt", prompt.strip())


def read_prompts(path):
    """The prompts in a file, without white space around them and without blank lines. Raises SettingError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
        problem = "holds NUL bytes" if any("\0" in line for line in lines) else "" if any(lines) else "holds no prompt"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        problem = "is not UTF-8"
    if problem:
        raise SettingError("prompts", path, f"{problem}; give a UTF-8 text file, a prompt a line")
    return [line for line in lines if line]
