"""How the code is laid out: which file may import which, and what an import may not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import settings
import srds

ROOT = Path(__file__).resolve().parent.parent
LOADING = {"settings", "models.families", "models.adapters", "models.checks"}
SAMPLER = {"settings", "refinement", "srds", "collocation", "diffusion", "models.loading", "study.planning"}
PREPARATION = {
    "settings", "refinement", "sampler", "models.loading", "study.comparison", "study.description", "study.directory",
    "study.earlier", "study.fingerprint", "study.preview", "study.processes", "study.record", "study.samples",
    "study.sampling",
}  # fmt: skip
STUDY = {
    "settings", "models.loading", "study.directory", "study.earlier", "study.forecast", "study.preparation",
    "study.processes", "study.results", "study.samples", "study.sampling",
}  # fmt: skip
RECORD = {"utils", "study.comparison", "study.directory", "study.earlier", "study.report", "study.results"}
EAGER = {"settings", "study.samples", "study.terminal"}  # main's, which need no torch
MAY_IMPORT = {
    "settings": set(), "srds": set(), "collocation": {"srds"}, "diffusion": set(), "utils": {"settings"},
    "refinement": {"settings"}, "models.families": set(),
    "models.adapters": {"settings"}, "models.checks": {"settings"}, "models.loading": LOADING, "study.quiet": set(),
    "study.planning": {"settings", "srds", "diffusion"}, "sampler": SAMPLER, "study.processes": {"settings"},
    "study.directory": {"settings"}, "study.earlier": {"settings", "study.directory"}, "study.fingerprint": set(),
    "study.results": {"utils"}, "study.plots": {"utils", "study.samples"},
    "study.report": {"settings", "utils", "study.directory", "study.plots", "study.results", "study.samples"},
    "study.comparison": {"settings", "study.directory", "study.earlier"}, "study.record": RECORD,
    "study.preview": {"settings", "utils", "study.directory", "study.earlier"},
    "study.description": {"models.loading", "study.planning", "study.samples", "study.sampling"},
    "study.forecast": set(),
    "study.samples": {"settings"}, "study.metrics": {"settings", "models.scenes"},
    "study.sampling": {"settings", "utils", "refinement"}, "study.run": STUDY, "study.preparation": PREPARATION,
    "study.terminal": set(), "models.scenes": set(),
    "main": EAGER | {"study.quiet", "study.metrics", "study.processes", "study.run"},
}  # fmt: skip


def tree(room):
    return ast.parse((ROOT / f"{room.replace('.', '/')}.py").read_text())


def imported(node):
    if isinstance(node, ast.Import):
        return {name.name for name in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        return {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return set()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_run_one_way(room):
    found = set().union(*map(imported, ast.walk(tree(room))))
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[room]


def test_nothing_imports_main_but_the_tests_of_the_command():
    allowed = {"test_command.py", "test_resume.py", "test_processes.py", "test_families.py", "test_house.py"}
    allowed |= {"test_sweep.py"}
    rooms = [path for folder in ("", "models", "study", "benchmarks", "tests") for path in (ROOT / folder).glob("*.py")]
    for path in rooms:
        if path.name not in allowed:
            assert "main" not in set().union(*map(imported, ast.walk(ast.parse(path.read_text())))), path


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_are_at_the_top_but_for_the_commands_late_ones(room):
    late = [
        node
        for function in ast.walk(tree(room))
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for node in ast.walk(function)
        if imported(node)
    ]
    found = set().union(*map(imported, late))
    late_ones = MAY_IMPORT["main"] - EAGER if room == "main" else set()
    assert found & MAY_IMPORT.keys() == late_ones
    assert room == "main" or not found


def test_schedules_are_the_engines():
    assert settings.SCHEDULES == srds.SCHEDULES


@pytest.mark.slow
def test_importing_the_rooms_changes_nothing_in_the_process():
    """Neither a library's verbosity, nor a warning filter, a signal handler or the environment."""
    script = f"""
import accelerate, logging, matplotlib.figure, os, pandas, peft, signal, sys, torch, warnings
import diffusers, huggingface_hub, transformers
from diffusers import FluxPipeline, StableDiffusionXLPipeline
import diffusers.loaders.textual_inversion
def state():
    libraries = [library.utils.logging.get_verbosity() for library in (diffusers, transformers, huggingface_hub)]
    others = signal.getsignal(signal.SIGTERM), torch.is_grad_enabled(), sys.path[:]
    return dict(os.environ), warnings.filters[:], libraries, logging.root.level, logging.root.handlers[:], others
before = state()
import {", ".join(MAY_IMPORT)}
assert state() == before, [(a, b) for a, b in zip(before, state()) if a != b]
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
