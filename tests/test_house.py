"""How the code is laid out: five rules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "models", "study", "benchmarks", "examples", "tests")
PATHS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))}  # fmt: skip
OF_THE_COMMAND = {
    "test_call",
    "test_command",
    "test_sequences",
    "test_folder",
    "test_sweep",
    "test_report",
    "test_processes",
}


def imported(room):
    """What a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(PATHS[room].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_no_import_leads_back_to_where_it_came_from():
    left = {room: imported(room) & PATHS.keys() for room in PATHS}
    while free := [room for room, needed in left.items() if not needed & left.keys()]:
        for room in free:
            del left[room]
    assert not left


def test_the_methods_import_nothing_but_torch_math_and_the_iterate():
    assert {name.partition(".")[0] for name in imported("srds")} == {"dataclasses", "typing", "torch"}
    assert imported("collocation") == {
        "math", "torch", "srds", "srds.Iterate", "diffusion", "diffusion.interpolation", "diffusion.on"
    }  # fmt: skip


def test_nothing_imports_main_but_tests_of_the_command():
    assert {room.removeprefix("tests.") for room in PATHS if "main" in imported(room)} <= OF_THE_COMMAND


def run(script):
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("words", ["--help", "-o out --prompt a -fs 0"])
def test_help_and_bad_arguments_need_no_torch(words):
    heavy = "{'torch', 'numpy', 'pandas', 'diffusers', 'matplotlib'} & sys.modules.keys()"
    process = run(f"import main, sys; status = main.main({words.split()}); sys.exit(10 * status + len({heavy}))")
    assert process.returncode == (0 if words == "--help" else 20), process.stderr


@pytest.mark.slow
def test_importing_the_rooms_changes_nothing_in_the_process():
    """Neither a library's verbosity, nor a warning filter, a signal handler or the environment."""
    rooms = [
        room
        for room in PATHS
        if not room.startswith(("benchmarks", "examples", "tests", "models.train", "models.fashion"))
    ]
    process = run(f"""
import accelerate, logging, matplotlib.figure, os, pandas, peft, signal, sys, torch, warnings
import diffusers, huggingface_hub, transformers
from diffusers import FluxPipeline, StableDiffusionXLPipeline
import diffusers.loaders.textual_inversion, skimage.metrics
def state():
    libraries = [library.utils.logging.get_verbosity() for library in (diffusers, transformers, huggingface_hub)]
    others = signal.getsignal(signal.SIGTERM), torch.is_grad_enabled(), sys.path[:]
    return dict(os.environ), warnings.filters[:], libraries, logging.root.level, logging.root.handlers[:], others
before = state()
import {", ".join(rooms)}
assert state() == before, [(a, b) for a, b in zip(before, state()) if a != b]
""")
    assert process.returncode == 0, process.stderr
