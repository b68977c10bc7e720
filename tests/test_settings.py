"""What settings may be, and what is refused: the same for Python, the command and edited defaults."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies

import pipelines
import settings as table
from models.loading import known
from sampler import Sampler
from settings import Call, Experiment, Loading, SettingError, Settings, split_scale

ROOT = Path(__file__).resolve().parent.parent
NAN, INF = float("nan"), float("inf")
VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda values: (
        strategies.lists(values, max_size=3) | strategies.dictionaries(strategies.text(), values, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize(
    "setting, values, words",
    [
        ("method", ["picard"], "give one of srds, collocation"),
        ("coarse_steps", [0, -1, 2.5, "few", "auto", True, None], "give a whole number from 1 up to 1000000000"),
        ("fine_steps", [0, "ten", 1.5, None], "give a whole number from 1 up"),
        ("solver", ["foo", 3], "give one of ddim, euler, ddpm, dpmsolver++"),
        ("eta", [1.5, -1, NAN, "x", None], "give a number from 0 to 1"),
        ("tolerance", [-1, NAN, INF, 10**400, "x", None], "give a number from 0 to 1000000"),
        ("schedule", ["pipeline"], "give one of pipelined, sweep; did you mean pipelined?"),
        ("correction", ["none"], "give one of damped, paper"),
        ("stop_rule", ["never", None], "give one of final, trajectory"),
        ("max_iterations", [-1, "x"], "give a whole number from 0 up"),
        ("guidance_scale", [-2, INF, NAN, "x", 1e308], "give a number from 0 to 1000"),
        ("negative_prompt", [3, None, "caf\udce9", "\0"], "give some text, in UTF-8, without NUL"),
        ("height", [0, -8, 64.5, 10**30], "give a whole number from 1 up to 65536"),
        ("seed", [-1, 2**64, 1.5, None], f"give a whole number from 0 up to {2**64 - 1}"),
        ("nodes", [1, 2.5], "give a whole number from 2 up"),
        ("max_batch", [0, "x", 10**30], "give a whole number from 1 up to 1000000000"),
        ("fixed_batch", [1, None], "give True or False"), ("model", ["", True], "give a hub id, a folder"),
        ("device", [""], "give auto, cpu, cuda"), ("dtype", ["float8"], "give one of auto, float32"),
        ("variant", [""], "give some text"),
        ("lora", [None, ("",), ["a", None], 3], "give a file, a folder or a hub id"),
        ("lora", ["me/it:inf"], "give a finite number after the colon"), ("offload", ["yes"], "give True or False"),
        ("parallel", ["prompts"], "give one of lanes, samples"),
        ("batch", [0, 2.5, None], "give a whole number from 1 up"),
    ],
)  # fmt: skip
def test_what_no_model_could_be_sampled_with_is_refused(setting, values, words):
    kind = next(
        kind for kind in (Settings, Call, Loading, Experiment) if setting in {each.name for each in fields(kind)}
    )
    given = {"output_dir": "out"} if kind is Experiment else {}
    for value in values:
        with pytest.raises(SettingError) as raised:
            kind(**given, **{setting: value})
        error = raised.value
        assert error.setting == setting and words in error.remedy and error.status == 2
        assert str(error).startswith(f"{setting}: ") and isinstance(error, ValueError)


def test_settings_that_do_not_go_together_are_refused():
    for setting, value in {"nodes": 9, "window": 9, "schedule": "sweep", "correction": "damped"}.items():
        with pytest.raises(SettingError, match=f"{setting}: {value!r} is not for .*; leave it out"):
            Settings(method="srds" if value == 9 else "collocation", **{setting: value})
    with pytest.raises(SettingError, match="coarse_steps: 11 is more than the 10 fine steps"):
        Settings(coarse_steps=11, fine_steps=10)


def test_numbers_of_numpy_and_devices_of_torch_are_taken():
    settings = Settings(fine_steps=np.int64(50), tolerance=np.float32(0.5), seed=np.uint64(7), eta=1)
    assert (settings.fine_steps, settings.tolerance, settings.seed, settings.eta) == (50, 0.5, 7, 1.0)
    assert [type(value) for value in (settings.fine_steps, settings.tolerance, settings.eta)] == [int, float, float]
    loading = Loading(Path("models"), torch.device("cuda:1"), torch.float16, lora="me/it")
    assert (loading.model, loading.device, loading.dtype) == ("models", "cuda:1", "float16")
    assert loading.lora == ("me/it",)


def test_a_loras_scale_is_after_its_last_colon():
    given = ["me/it", "me/it:0.5", "it.safetensors:-2", "C:\\it.safetensors", "a:b:0"]
    expected = [("me/it", 1), ("me/it", 0.5), ("it.safetensors", -2), ("C:\\it.safetensors", 1), ("a:b", 0)]
    assert [split_scale(each) for each in given] == expected


@pytest.mark.parametrize(
    "family, settings, words",
    [
        ("stable_diffusion", {"solver": "euler"}, "solver: 'euler' cannot be used with"),
        ("stable_diffusion_3", {"solver": "ddim"}, "give euler or dpmsolver"),
        ("flux", {"eta": 0.5}, "eta: 0.5 is for ddim"),
        ("stable_diffusion", {"solver": "ddpm", "eta": 0.5}, "eta: 0.5 is for ddim"),
        ("stable_diffusion", {"fine_steps": 1001}, "fine_steps: 1001 exceeds the model's 1000 timesteps"),
        ("stable_diffusion_3", {"fine_steps": 100000}, "fine_steps: 100000 exceeds the model's 1000 timesteps"),
    ],
)
def test_what_a_model_cannot_do_is_refused(family, settings, words):
    with pytest.raises(SettingError, match=words):
        Settings(**settings).resolve(known(getattr(pipelines, family)()))


@pytest.mark.parametrize(
    "family, arguments, words",
    [
        ("pixels", {"guidance_scale": 3}, "guidance_scale: '3' cannot be given to DDPMPipeline, a DDPMPipeline; leave"),
        ("stable_diffusion", {"negatve_prompt": "a"}, "negatve_prompt: 'a' cannot .*; did you mean negative_prompt?"),
        ("stable_diffusion", {"output_type": "pt"}, "output_type: 'pt' cannot be given to"),
        ("flux", {"num_inference_steps": 5}, "num_inference_steps: '5' cannot be given to"),
    ],
)
def test_what_a_pipelines_call_does_not_have_is_refused(family, arguments, words):
    """However it is given."""
    pipeline = getattr(pipelines, family)()
    plain = Sampler(pipeline)
    for give in (lambda: Sampler(pipeline, None, arguments), lambda: plain.vary(**arguments),
                 lambda: plain("a", **arguments), lambda: next(plain.refine("a", **arguments)),
                 lambda: plain.sequential("a", **arguments)):  # fmt: skip
        with pytest.raises(SettingError, match=words):
            give()


def test_what_is_left_open_is_what_the_family_usually_takes():
    expected = {  # guidance, solver
        "stable_diffusion": (7.5, "ddim"), "stable_diffusion_xl": (5.0, "ddim"), "stable_diffusion_3": (7.0, "euler"),
        "flux": (3.5, "euler"), "pixart": (4.5, "ddim"), "pixels": (None, "ddim"),
    }  # fmt: skip
    for family, values in expected.items():
        asked = Settings()
        found = asked.resolve(known(getattr(pipelines, family)()))
        usual = known(getattr(pipelines, family)()).usual
        assert (usual.pop("guidance_scale", None), found.solver) == values and not usual
        assert (found.schedule, found.correction) == ("pipelined", "damped") and asked == Settings()
        other = Settings(method="collocation").resolve(known(getattr(pipelines, family)()))
        assert other.schedule is other.correction is other.nodes is other.window is None


OF_NO_ROW = {"DEMO_GUIDANCE_SCALE"}


def test_every_default_that_can_be_edited_is_that_of_its_row():
    constants = (ROOT / "settings.py").read_text().split("METHODS = ")[0].splitlines()
    names = {line.split(" = ")[0] for line in constants if " = " in line} - OF_NO_ROW
    assert len(names) > 15 and all(table.ROWS[name.lower()].default == getattr(table, name) for name in names)


def edited_source(name, value):
    """The text of settings.py with another default."""
    source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", (ROOT / "settings.py").read_text())
    assert count == 1
    return source


@pytest.mark.parametrize(
    "name, value",
    [("COARSE_STEPS", 2.5), ("SOLVER", "foo"), ("TOLERANCE", -1), ("SEED", None), ("DTYPE", "half"), ("MODEL", ""),
     ("PARALLEL", "both")],
)  # fmt: skip
def test_edited_defaults_are_checked_like_arguments(name, value):
    module = {"__name__": "edited", "__file__": str(ROOT / "settings.py")}
    exec(edited_source(name, value), module)
    kinds = (table.Loading, table.Settings, table.Call, Experiment)
    kind = next(kind for kind in kinds if name.lower() in {each.name for each in fields(kind)})
    given = {"output_dir": "out"} if kind is Experiment else {}
    with pytest.raises(module["SettingError"], match=f"{name.lower()}: {value!r} is not usable; give "):
        module[kind.__name__](**given)


@pytest.mark.slow
def test_edited_defaults_are_checked_against_the_model_and_give_way_to_arguments(tmp_path):
    """In a copy of the program, whose settings.py can be edited."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("study/*.*")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
    (tmp_path / "models").symlink_to(ROOT / "models")
    argv = "main.py --prompt a -o out --model demo -cs 2 -fs 4 --no-ground-truth".split()

    def run(name, value):
        (tmp_path / "settings.py").write_text(edited_source(name, value))
        return subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True)

    for name, value, words in (("SEED", -1, "-1 is not usable"), ("SOLVER", "euler", "cannot be used with")):
        process = run(name, value)
        assert process.returncode == 2 and process.stderr.count("\n") == 1 and words in process.stderr
        assert process.stdout == "" and not (tmp_path / "out").exists()
    process = run("COARSE_STEPS", 200)
    assert process.returncode == 0 and process.stderr == ""
    assert "--coarse-steps=2" in json.loads((tmp_path / "out" / "run.json").read_text())["reproduce"]
