"""LoRA weights and textual inversion embeddings from files."""

import os

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

import pipelines
from pipelines import FAMILIES
from sampler import Sampler
from settings import SettingError, Settings

SMALL = Settings(fine_steps=6, coarse_steps=2)


def sampled(folder, **adapters):
    return Sampler.from_pretrained(folder, SMALL, device="cpu", **adapters).sequential("a red sun").states[-1]


def by_diffusers(folder, change):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    change(pipeline)
    return Sampler(pipeline, SMALL).sequential("a red sun").states[-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters that fit the tiny model, and some that do not."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(2)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(16, 2)}
    save = safetensors.torch.save_file
    save(lora, root / "lora.safetensors")
    save({key: 2 * value for key, value in lora.items()}, root / "other.safetensors")
    save({key: value.repeat(2, 2) for key, value in lora.items()}, root / "wide.safetensors")
    save({key.replace("attn1", "attn9"): value for key, value in lora.items()}, root / "elsewhere.safetensors")
    partly = {key.replace("down_blocks.0", "down_blocks.7"): value.clone() for key, value in lora.items()}
    save({**lora, **partly}, root / "partly.safetensors")
    save({key.replace("unet", "transformer"): value for key, value in lora.items()}, root / "dit.safetensors")
    save({"weight": torch.zeros(3)}, root / "none.safetensors")
    save({key: value for key, value in lora.items() if "lora_B" in key}, root / "half.safetensors")
    os.mkfifo(root / "pipe.safetensors")
    (root / "piped").mkdir()
    os.mkfifo(root / "piped" / "pytorch_lora_weights.safetensors")
    (root / "broken.safetensors").write_bytes(b"not weights")
    (root / "folder").mkdir()
    save(lora, root / "folder" / "pytorch_lora_weights.safetensors")
    save({"red": torch.randn(pipelines.WIDTH)}, root / "embedding.safetensors")
    save({"red": torch.randn(pipelines.WIDTH + 1)}, root / "long.safetensors")
    save({"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 32)}, root / "red.safetensors")
    return root


def test_a_lora_is_loaded_as_diffusers_loads_it_at_its_scale(tiny, files):
    path = files / "lora.safetensors"

    def change(pipeline):
        pipeline.load_lora_weights(str(path), adapter_name="x")
        pipeline.set_adapters(["x"], [0.3])

    truth, plain = by_diffusers(tiny, change), sampled(tiny)
    torch.testing.assert_close(sampled(tiny, lora=f"{path}:0.3"), truth, atol=1e-4, rtol=1e-4)
    assert (truth - plain).abs().mean() > 1e-3
    torch.testing.assert_close(sampled(tiny, lora=f"{path}:0"), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sampled(tiny, lora=f"{files / 'folder'}:0.3"), truth, atol=1e-4, rtol=1e-4)


def test_several_loras_add_up(tiny, files):
    """W + B A and W + (2 B)(2 A) together are W + 5 B A."""
    both = sampled(tiny, lora=[str(files / "lora.safetensors"), str(files / "other.safetensors")])
    one = sampled(tiny, lora=f"{files / 'lora.safetensors'}:5")
    torch.testing.assert_close(both, one, atol=1e-3, rtol=1e-3)


def test_an_embedding_is_loaded_as_diffusers_loads_it(tiny, files):
    path = str(files / "embedding.safetensors")
    truth = by_diffusers(tiny, lambda pipeline: pipeline.load_textual_inversion(path))
    torch.testing.assert_close(sampled(tiny, textual_inversion=path), truth, atol=1e-4, rtol=1e-4)
    assert (truth - sampled(tiny)).abs().mean() > 1e-4


def test_an_embedding_for_two_encoders_is_named_by_its_file(files, tmp_path):
    FAMILIES["StableDiffusionXL"]().save_pretrained(tmp_path)
    plain = sampled(tmp_path)
    sampler = Sampler.from_pretrained(tmp_path, SMALL, device="cpu", textual_inversion=str(files / "red.safetensors"))
    for tokenizer in (sampler.pipeline.tokenizer, sampler.pipeline.tokenizer_2):
        assert "red" in tokenizer.get_vocab()
    assert (sampler.sequential("a red sun").states[-1] - plain).abs().mean() > 1e-4


@pytest.mark.parametrize(
    "setting, name, words",
    [
        ("lora", "wide", "does not fit the model .*size mismatch"), ("lora", "elsewhere", "does not fit the model"),
        ("lora", "partly", "does not fit the model"), ("lora", "dit", "does not fit the model"),
        ("lora", "none", "does not fit the model"), ("lora", "half", "does not fit the model"),
        ("lora", "pipe", "is neither a file nor a folder"),
        ("lora", "piped", "is neither a file nor a folder|cannot be read"),
        ("lora", "broken", "(does not fit|cannot be read)"),
        ("lora", "missing", "is neither a file nor a folder here"),
        ("textual_inversion", "long", "does not fit the model"),
        ("textual_inversion", "red", "it is for 2 text encoders, but the model has 1"),
        ("textual_inversion", "broken", "(does not fit|cannot be read)"),
        ("textual_inversion", "pipe", "is neither a file nor a folder"),
        ("textual_inversion", "missing", "is neither a file nor a folder here"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_line(setting, name, words, tiny, files, capfd):
    path = str(files / name if name == "piped" else files / f"{name}.safetensors")
    capfd.readouterr()
    with pytest.raises(SettingError, match=words) as raised:
        Sampler.from_pretrained(tiny, SMALL, device="cpu", **{setting: path})
    assert raised.value.setting == setting and "\n" not in str(raised.value) and path in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "family, setting", [("PixArt-Sigma", "lora"), ("Unconditional", "lora"), ("StableDiffusion3", "textual_inversion")]
)
def test_a_family_that_takes_none_says_so_before_weights_are_loaded(family, setting, files, tmp_path, monkeypatch):
    FAMILIES[family]().save_pretrained(tmp_path)
    monkeypatch.setattr("models.loading._from_pretrained", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(SettingError, match=f"{setting}: .* does not suit a .*Pipeline; leave it out"):
        Sampler.from_pretrained(tmp_path, SMALL, device="cpu", **{setting: str(files / "lora.safetensors")})
