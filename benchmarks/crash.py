"""Whether runs lose work: killed at random moments and resumed; and whether memory grows with the prompts.

    python benchmarks/crash.py          # about 15 minutes; prints a table, and fails where something was lost

Demo model. A run of several prompts is killed (SIGKILL) at a random moment, resumed, killed again and so on, until it
ends; then every file must be what an uninterrupted run leaves, seconds aside. Every second run begins in the place of
an earlier study of another seed, which must then be found set aside, and whole. For memory, a run of many prompts
without ground truth: its resident memory after each, and the slope of a line through the second half.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import common

SETTINGS = ["--model", "demo", "--device", "cpu"]


def command(out, texts, *more):
    prompts = [word for text in texts for word in ("--prompt", text)]
    return [sys.executable, str(common.ROOT / "main.py"), "-o", str(out), *SETTINGS, *prompts, *more]


def start(*arguments):
    return subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder):
    """What a run leaves, by file; of results all but their seconds."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("earlier/"):
            continue
        found[name] = np.asarray(Image.open(path)).tobytes() if path.suffix == ".png" else path.read_text()
    results = json.loads(found.pop("run.json"))["prompts"]
    images = {
        name: content
        for name, content in found.items()
        if not name.endswith(("result.json", "results.csv", "report.html"))
    }
    return images, [without_seconds(result) for result in results]


def without_seconds(value):
    """A value as JSON has it, without what is called seconds."""
    if isinstance(value, dict):
        return {key: without_seconds(each) for key, each in value.items() if key != "seconds"}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


def seed_there(out):
    """The seed of the run that has begun in a directory; None where none has."""
    path = out / "run.json"
    return json.loads(path.read_text())["settings"]["seed"] if path.exists() else None


def crashes(texts, kills, seed):
    """Kill and resume a run; returns how often it was killed with how many prompts complete, and how it ended."""
    chance, kept, before = random.Random(seed), [], None
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "out"
        started = time.perf_counter()
        assert start(whole, texts).wait() == 0
        seconds = time.perf_counter() - started
        if seed % 2:
            assert start(out, texts, "--seed", "7").wait() == 0
            before = contents(out)
        while len(kept) < kills:
            run = start(out, texts, *["--resume"] * (seed_there(out) != 7))
            time.sleep(chance.uniform(0, seconds))
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)
                kept.append(sum('"complete": true' in path.read_text() for path in out.glob("*/result.json")))
            elif run.returncode:
                raise SystemExit(f"the resumed run ended with status {run.returncode}")
            run.wait()
            if sum('"complete": true' in path.read_text() for path in out.glob("*/result.json")) == len(texts):
                break
        assert start(out, texts, *["--resume"] * (seed_there(out) != 7)).wait() == 0
        aside = [contents(folder) for folder in out.glob("earlier/*")]
        return kept, contents(out) == contents(whole) and aside == ([before] if before else [])


def memory(texts):
    """Resident megabytes of a run when each prompt is complete."""
    with tempfile.TemporaryDirectory() as folder:
        run, sizes = start(Path(folder) / "out", texts, "--no-ground-truth", "-fs", "25", "-cs", "5"), []
        while run.poll() is None:
            count = sum(1 for _ in Path(folder).glob("out/*/srds_filmstrip.png"))
            if count > len(sizes):
                status = Path(f"/proc/{run.pid}/status").read_text()
                pages = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
                sizes += [int(pages[0]) / 1024] * (count - len(sizes)) if pages else []
            time.sleep(0.05)
        assert run.returncode == 0
    return sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="of the run whose memory is watched (%(default)s)")
    args = parser.parse_args()
    texts, _ = common.prompts(np.random.default_rng(3), args.prompts)

    killed, seed, lost = [], 0, 0
    while len(killed) < args.kills:
        kept, same = crashes(texts[:4], args.kills - len(killed), seed)
        killed, seed, lost = killed + kept, seed + 1, lost + (not same)
        print(f"killed with {kept} of 4 prompts complete, resumed: {'the same' if same else 'DIFFERENT'}", flush=True)
    print(f"{len(killed)} kills, {seed} runs, {lost} of them different from an uninterrupted one")

    sizes = memory(texts)
    half = sizes[len(sizes) // 2 :]
    slope = np.polyfit(range(len(half)), half, 1)[0]
    print(f"{len(sizes)} prompts: {sizes[len(sizes) // 10]:.0f} MB after a tenth, {sizes[-1]:.0f} at the end; "
          f"{1024 * slope:.1f} kB a prompt over the second half")  # fmt: skip
    sys.exit(bool(lost))
