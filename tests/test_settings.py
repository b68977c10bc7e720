"""What settings may be, and what is refused: the same for Python, the command and edited defaults."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies

import pipelines
from models.loading import inspect
from settings import Failure, Loading, SettingError, Settings, in_one_line, split_scale

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
        ("coarse_steps", [0, -1, 2.5, "few", True, None], "give a whole number from 1 up to 1000000000, or auto"),
        ("fine_steps", [0, "ten", 1.5, None], "give a whole number from 1 up"),
        ("solver", ["foo", 3], "give one of ddim, euler, ddpm, dpmsolver++"),
        ("eta", [1.5, -1, NAN, "x", None], "give a number from 0 to 1"),
        ("tolerance", [-1, NAN, INF, 10**400, "x", None], "give a finite number that is not negative"),
        ("schedule", ["fast"], "give one of pipelined, sweep"),
        ("correction", ["none"], "give one of damped, paper"),
        ("stop_rule", ["never", None], "give one of final, trajectory, predicted"),
        ("max_iterations", [0, "x"], "give a whole number from 1 up"),
        ("guidance_scale", [-2, INF, NAN, "x", 1e308], "give a number from 0 to 1000"),
        ("negative_prompt", [3, None], "give some text"),
        ("negative_prompt", ["caf\udce9", "\0"], "give some text, in UTF-8, without NUL"),
        ("height", [0, -8, 64.5, 10**30], "give a whole number from 1 up to 65536"),
        ("width", [0, -8, "wide"], "give a whole number from 1 up"),
        ("seed", [-1, 2**64, 1.5, None], f"give a whole number from 0 up to {2**64 - 1}"),
        ("max_batch", [0, "x", 10**30], "give a whole number from 1 up to 1000000000"),
        ("fixed_batch", [1, None], "give True or False"),
    ],
)
def test_what_no_model_could_be_sampled_with_is_refused(setting, values, words):
    for value in values:
        with pytest.raises(SettingError) as raised:
            Settings(**{setting: value})
        error = raised.value
        assert error.setting == setting and (error.value is value or error.value == value) and words in error.remedy
        assert str(error).startswith(f"{setting}: {value!r} ") and isinstance(error, ValueError)


@pytest.mark.parametrize(
    "setting, value, words",
    [
        ("model", "", "give a hub id, a folder or demo"),
        ("device", 3.5, "give auto, cpu, cuda"),
        ("model", True, "give a hub id, a folder or demo"),
        ("lora", None, "give a file, a folder or a hub id"),
        ("lora", ["a", None], "give a file, a folder or a hub id"),
        ("dtype", "float8", "give one of auto, float32"),
        ("variant", "", "give some text"),
        ("lora", ("",), "give a file, a folder or a hub id"),
        ("lora", "me/it:inf", "give a finite number after the colon"),
        ("offload", "yes", "give True or False"),
    ],
)
def test_what_no_model_could_be_loaded_with_is_refused(setting, value, words):
    with pytest.raises(SettingError, match=words):
        Loading(**{setting: value})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "picard"}, "method: 'picard' is not usable; give one of srds, collocation"),
        ({"nodes": 9}, "nodes: 9 is of collocation, not srds; leave it out"),
        ({"window": 9}, "window: 9 is of collocation, not srds"),
        ({"method": "collocation", "nodes": 1}, "nodes: 1 is not usable; give a whole number from 2 up"),
        ({"method": "collocation", "window": 2.5}, "window: 2.5 is not usable"),
        ({"method": "collocation", "schedule": "sweep"}, "schedule: 'sweep' is of srds, not collocation"),
        ({"method": "collocation", "correction": "damped"}, "correction: 'damped' is of srds, not collocation"),
        ({"method": "collocation", "coarse_steps": "auto"}, "coarse_steps: 'auto' is of srds, not collocation"),
    ],
)
def test_settings_of_the_other_method_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        Settings(**settings)


def test_settings_that_do_not_go_together_are_refused():
    for settings in ({"coarse_steps": 11, "fine_steps": 10}, {"coarse_steps": "auto", "fixed_batch": True}):
        with pytest.raises(SettingError, match="coarse_steps: "):
            Settings(**settings)
    with pytest.raises(SettingError, match="coarse_steps: 'auto' measures calls of many sizes"):
        Settings(coarse_steps="auto").check_compiled()


def test_numbers_of_numpy_and_devices_of_torch_are_taken():
    import numpy as np

    settings = Settings(fine_steps=np.int64(50), tolerance=np.float32(0.5), seed=np.uint64(7), eta=1)
    assert (settings.fine_steps, settings.tolerance, settings.seed, settings.eta) == (50, 0.5, 7, 1.0)
    assert [type(value) for value in (settings.fine_steps, settings.tolerance, settings.eta)] == [int, float, float]
    loading = Loading(Path("models"), torch.device("cuda:1"), torch.float16, lora="me/it")
    assert (loading.model, loading.device, loading.dtype) == ("models", "cuda:1", "float16")
    assert loading.lora == ("me/it",)


def test_settings_stand_still():
    with pytest.raises(AttributeError):
        Settings().fine_steps = 3
    with pytest.raises(AttributeError):
        Loading().model = "demo"


@pytest.mark.parametrize(
    "lora, expected",
    [
        ("me/it", ("me/it", 1.0)),
        ("me/it:0.5", ("me/it", 0.5)),
        ("it.safetensors:-2", ("it.safetensors", -2.0)),
        ("C:\\it.safetensors", ("C:\\it.safetensors", 1.0)),
        ("a:b:0", ("a:b", 0.0)),
    ],
)
def test_a_loras_scale_is_after_its_last_colon(lora, expected):
    assert split_scale(lora) == expected


@pytest.mark.parametrize(
    "family, settings, words",
    [
        ("stable_diffusion", {"solver": "euler"}, "solver: 'euler' cannot be used with"),
        ("stable_diffusion_3", {"solver": "ddim"}, "give euler or dpmsolver"),
        ("flux", {"solver": "ddpm"}, "give euler or dpmsolver"),
        ("flux", {"eta": 0.5}, "eta: 0.5 is for ddim"),
        ("stable_diffusion", {"solver": "ddpm", "eta": 0.5}, "eta: 0.5 is for ddim"),
        ("stable_diffusion", {"fine_steps": 1001}, "fine_steps: 1001 exceeds the model's 1000 training timesteps"),
        ("stable_diffusion_3", {"fine_steps": 100000}, "fine_steps: 100000 exceeds what a flow's tables have room for"),
        ("schnell", {"guidance_scale": 3}, "guidance_scale: 3.0 .*no guidance"),
        ("pixels", {"guidance_scale": 3}, "guidance_scale: 3.0 .*no guidance"),
        ("flux", {"negative_prompt": "rain"}, "negative_prompt: 'rain' is of no use"),
        ("stable_diffusion", {"height": 63}, "height: 63 is not a multiple of 8; give 64"),
        ("stable_diffusion_3", {"height": 72}, "height: 72 is not a multiple of 16"),
        ("stable_diffusion_3", {"width": 512}, "width: 512 is more than"),
        ("pixels", {"height": 15}, "height: 15 is not a multiple of 2"),
    ],
)
def test_what_a_model_cannot_do_is_refused(family, settings, words):
    with pytest.raises(SettingError, match=words):
        Settings(**settings).resolve(inspect(getattr(pipelines, family)()))


def test_what_is_left_open_is_what_the_family_usually_takes():
    expected = {  # height and width, guidance, solver
        "stable_diffusion": (64, 64, 7.5, "ddim"), "stable_diffusion_xl": (64, 64, 5.0, "ddim"),
        "stable_diffusion_3": (64, 64, 7.0, "euler"), "flux": (1024, 1024, 3.5, "euler"),
        "schnell": (1024, 1024, None, "euler"), "pixart_alpha": (1024, 1024, 4.5, "ddim"),
        "pixart": (64, 64, 4.5, "ddim"), "pixels": (16, 16, None, "ddim"),
    }  # fmt: skip
    for family, values in expected.items():
        asked = Settings()
        found = asked.resolve(inspect(getattr(pipelines, family)()))
        assert (found.height, found.width, found.guidance_scale, found.solver) == values
        assert found.schedule == "pipelined" and asked == Settings()


@pytest.fixture(scope="module")
def copy_of_the_house(tmp_path_factory):
    """The program with its settings in a file of its own, to be edited."""
    root = tmp_path_factory.mktemp("house")
    for path in ROOT.glob("*.py"):
        (root / path.name).write_text(path.read_text())
    for folder in ("models", "study"):
        (root / folder).symlink_to(ROOT / folder)
    return root


@pytest.mark.parametrize(
    "edit, words",
    [
        ("COARSE_STEPS = 200", "argument --coarse-steps/-cs: 200 is more than the 100 fine steps"),
        ('SOLVER = "foo"', "argument --solver: 'foo' is not usable; give one of ddim"),
        ("TOLERANCE = -1", "argument --tolerance/-tol: -1 is not usable"),
        ("SEED = None", "argument --seed/-s: None is not usable"),
        ('DTYPE = "half"', "argument --dtype: 'half' is not usable"),
        ('PARALLEL = "both"', "argument --parallel: 'both' is not usable"),
        ('MODEL = ""', "argument --model: '' is not usable; give a hub id"),
    ],
)
def test_edited_defaults_are_checked_like_arguments(edit, words, copy_of_the_house, tmp_path):
    process = run_edited(copy_of_the_house, edit, tmp_path, [])
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and words in process.stderr
    assert process.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_edited_defaults_are_checked_against_the_model(copy_of_the_house, tmp_path):
    process = run_edited(copy_of_the_house, "HEIGHT = 60", tmp_path, ["--model", "demo"])
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "argument --height: 60 is not a multiple of 8; give 64" in process.stderr


@pytest.mark.slow
def test_an_edited_default_does_not_matter_where_an_argument_is_given(copy_of_the_house, tmp_path):
    more = ["--model", "demo", "-cs", "2", "-fs", "4", "--no-ground-truth"]
    process = run_edited(copy_of_the_house, "COARSE_STEPS = 200", tmp_path, more)
    assert process.returncode == 0 and process.stderr == ""


def run_edited(house, edit, tmp_path, more):
    name, lines = edit.split(" = ")[0], (ROOT / "settings.py").read_text().splitlines()
    assert sum(line.startswith(f"{name} = ") for line in lines) == 1
    edited = [edit if line.startswith(f"{name} = ") else line for line in lines]
    (house / "settings.py").write_text("\n".join(edited))
    command = [sys.executable, "main.py", "--prompt", "a", "-o", str(tmp_path / "out"), *more]
    return subprocess.run(command, cwd=house, capture_output=True, text=True)


def test_every_failure_that_is_one_line_has_an_exit_status():
    assert Failure("x").status == 1 and SettingError("seed", 1, "y").status == 2


@given(strategies.sampled_from(sorted(Settings.domains) + sorted(Loading.domains)), VALUES)
def test_no_value_ends_in_anything_but_settings_or_one_line(name, value):
    kind = Settings if name in Settings.domains else Loading
    try:
        kind(**{"model": "demo"} | {name: value} if kind is Loading else {name: value})
    except SettingError as error:
        assert error.setting in (name, "coarse_steps", "tolerance") and "\n" not in in_one_line(error)
