"""Problems with known solutions, and Stable Diffusion pipelines small enough to build in a test."""

import warnings

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import diffusion


class Gaussian:
    """Data N(mean, scale^2) in every coordinate: the optimal denoiser and the ODE's solution are closed forms."""

    mean, scale = 0.7, 0.4

    def __init__(self, steps, prediction_type="epsilon"):
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
        )
        self.times = diffusion.timesteps(steps, 1000)
        self.step = diffusion.ddim_step(self.scheduler, self.times)
        self.points = range(steps + 1)

    def denoise(self, x, n):
        a = self.scheduler.alphas_cumprod[self.times[n]].double().reshape(-1, 1, 1, 1)
        x, variance = x.double(), a * self.scale**2 + 1 - a
        x0 = self.mean + a.sqrt() * self.scale**2 / variance * (x - a.sqrt() * self.mean)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        output = {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}
        return output[self.scheduler.config.prediction_type].float()

    def solution(self, x):
        """The probability-flow ODE's end for the start x at the first timestep."""
        a = self.scheduler.alphas_cumprod[self.times[0]].double()
        deviation = (x.double() - a.sqrt() * self.mean) / (a * self.scale**2 + 1 - a).sqrt()
        return self.mean + self.scale * deviation

    def sequential(self, x, keep=None):
        return diffusion.sequential(x, self.denoise, self.step, self.points, keep)


class Mixture(Gaussian):
    """Data at -1 and 1, each with a little spread: the denoiser is far from linear."""

    def denoise(self, x, n):
        a = self.scheduler.alphas_cumprod[self.times[n]].reshape(-1, 1, 1, 1)
        variance = a * 0.05**2 + 1 - a
        pull = torch.tanh(a.sqrt() * x / variance)
        x0 = pull + a.sqrt() * 0.05**2 / variance * (x - a.sqrt() * pull)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()


class Stiff(Gaussian):
    """A denoiser that turns changes round, as strong guidance does: x0 = -3 x / sqrt(alpha)."""

    def denoise(self, x, n):
        a = self.scheduler.alphas_cumprod[self.times[n]].reshape(-1, 1, 1, 1)
        return 4 * x / (1 - a).sqrt()


def boundaries(N, B):
    return [i * N // B for i in range(B + 1)]


@pytest.fixture
def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def tiny_pipeline(scheduler=None):
    """A Stable Diffusion pipeline with random weights: 64 x 64 pixels, 8 x 8 latents, letters for tokens."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=24)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=52, eos_token_id=53, pad_token_id=53)  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    if scheduler is None:
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                  clip_sample=False, set_alpha_to_one=False)  # fmt: skip
    parts = vae, CLIPTextModel(text), tokenizer, unet, scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of scheduler configs that some tests make old on purpose
        return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny pipeline as Stable Diffusion 1 ships: epsilon prediction, alpha of step 0 at the end."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder
