"""LoRA weights and textual inversion embeddings from files."""

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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters that fit the tiny model, and some that do not."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(2)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(16, 2)}
    other_block = {key.replace("down_blocks.0", "down_blocks.7"): value.clone() for key, value in lora.items()}
    (root / "folder").mkdir()
    named = lambda name: {key.replace(".weight", f".{name}.weight"): value for key, value in lora.items()}
    for name, tensors in {
        "lora": lora,
        "folder/pytorch_lora_weights": lora,
        "other": {key: 2 * value for key, value in lora.items()},
        "wide": {key: value.repeat(2, 2) for key, value in lora.items()},
        "elsewhere": {key.replace("attn1", "attn9"): value for key, value in lora.items()},
        "partly": {**lora, **other_block},
        "dit": {key.replace("unet", "transformer"): value for key, value in lora.items()},
        "none": {"weight": torch.zeros(3)},
        "default": named("default"),
        "default_0": named("default_0"),
        "dora": lora | {f"{layer}.dora_scale": torch.ones(16, 1)},
        **{name: {f"{layer}.{name}": torch.zeros(2, 2)} for name in ("lokr_w1", "hada_w1_a", "oft_blocks")},
        "half": {key: value for key, value in lora.items() if "lora_B" in key},
        "embedding": {"red": torch.randn(pipelines.WIDTH)},
        "long": {"red": torch.randn(pipelines.WIDTH + 1)},
        "red": {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 32)},
    }.items():
        safetensors.torch.save_file(tensors, root / f"{name}.safetensors")
    (root / "broken.safetensors").write_bytes(b"not weights")
    return root


@pytest.mark.parametrize(
    "setting, name, scale",
    [
        ("lora", "lora.safetensors", ":0.3"), ("lora", "folder", ":0.3"), ("lora", "lora.safetensors", ":0"),
        ("textual_inversion", "embedding.safetensors", ""),
    ],
)  # fmt: skip
def test_an_adapter_is_loaded_as_diffusers_loads_it(setting, name, scale, tiny, files):
    pipeline, path = StableDiffusionPipeline.from_pretrained(tiny), str(files / name)
    if setting == "lora":
        pipeline.load_lora_weights(path, adapter_name="x")
        pipeline.set_adapters(["x"], [float(scale[1:])])
    else:
        pipeline.load_textual_inversion(path)
    truth, ours = Sampler(pipeline, SMALL).sequential("a red sun").states[-1], sampled(tiny, **{setting: path + scale})
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-4)
    assert ((ours - sampled(tiny)).abs().mean() > 1e-4) == (scale != ":0")


def test_several_loras_add_up(tiny, files):
    """W + B A and W + (2 B)(2 A) together are W + 5 B A."""
    both = sampled(tiny, lora=[str(files / "lora.safetensors"), str(files / "other.safetensors")])
    one = sampled(tiny, lora=f"{files / 'lora.safetensors'}:5")
    torch.testing.assert_close(both, one, atol=1e-3, rtol=1e-3)


def test_an_embedding_for_two_encoders_is_named_by_its_file(files, tmp_path):
    FAMILIES["StableDiffusionXL"]().save_pretrained(tmp_path)
    plain = sampled(tmp_path)
    sampler = Sampler.from_pretrained(tmp_path, SMALL, device="cpu", textual_inversion=str(files / "red.safetensors"))
    for tokenizer in (sampler.pipeline.tokenizer, sampler.pipeline.tokenizer_2):
        assert "red" in tokenizer.get_vocab()
    assert (sampler.sequential("a red sun").states[-1] - plain).abs().mean() > 1e-4


UNFIT, NO_FILE, UNREADABLE = "does not fit the model", "is neither a file nor a folder", "does not fit|cannot be read"


@pytest.mark.parametrize(
    "setting, names, words",
    [
        ("lora", "elsewhere partly dit none half", UNFIT), ("lora", "wide", f"{UNFIT} .*size mismatch"),
        ("lora", "default default_0", f"{UNFIT}, which has room for 0 of its 2 tensors"), ("lora", "dora", "is DoRA, "),
        ("lora", "lokr_w1", "is LoKr, "), ("lora", "hada_w1_a", "is LoHa, "), ("lora", "oft_blocks", "is OFT, "),
        ("lora", "missing", NO_FILE), ("lora", "broken", UNREADABLE),
        ("textual_inversion", "long", UNFIT), ("textual_inversion", "red", "for 2 text encoders, but the model has 1"),
        ("textual_inversion", "missing", NO_FILE), ("textual_inversion", "broken", UNREADABLE),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_line(setting, names, words, tiny, files, capfd):
    for name in names.split():
        path = str(files / f"{name}.safetensors")
        with pytest.raises(SettingError, match=words) as raised:
            Sampler.from_pretrained(tiny, SMALL, device="cpu", **{setting: path})
        assert raised.value.setting == setting and "\n" not in str(raised.value) and path in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "family, setting, words",
    [
        ("PixArt-Sigma", "lora", "suit a .*Pipeline"), ("Unconditional", "lora", "suit a .*Pipeline"),
        ("StableDiffusion3", "textual_inversion", "suit a .*Pipeline"),
    ],
)  # fmt: skip
def test_a_family_that_takes_none_says_so_before_weights_are_loaded(family, setting, words, tmp_path, monkeypatch):
    FAMILIES[family]().save_pretrained(tmp_path)
    monkeypatch.setattr("models.loading._from_pretrained", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(SettingError, match=f"{setting}: .* {words}; leave it out"):
        Sampler.from_pretrained(tmp_path, SMALL, device="cpu", **{setting: "an/adapter"})
