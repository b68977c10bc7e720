"""Pipelines of every family with random weights, small enough to build in a test; letters are their tokens."""

import string
import warnings

import diffusers
import torch
import transformers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH = 32


def clip(kind=transformers.CLIPTextModel):
    """A text encoder and its tokenizer."""
    letters = string.ascii_lowercase
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=24)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, projection_dim=WIDTH,
        num_attention_heads=2, max_position_embeddings=24, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return kind(config).eval(), tokenizer


def t5(width=WIDTH):
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    vocabulary = [(piece, -2.0) for piece in pieces]
    tokenizer = transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5EncoderModel(config).eval(), tokenizer


def autoencoder(channels=4, **config):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=4, layers_per_block=1,
        **config,
    )  # fmt: skip


def unet(**config):
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **config,
    )  # fmt: skip


def stable_diffusion(scheduler=None):
    """As Stable Diffusion 1 ships, but for the scheduler given: epsilon prediction, alpha of step 0 at the end."""
    torch.manual_seed(0)
    settings = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    text_encoder, tokenizer = clip()
    parts = autoencoder(), text_encoder, tokenizer, unet(cross_attention_dim=WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of scheduler configs that some tests make old on purpose
        scheduler = scheduler or diffusers.DDIMScheduler(**SD, **settings)
        return diffusers.StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False)


def stable_diffusion_xl():
    torch.manual_seed(0)
    (one, tokenizer), (two, other) = clip(), clip(transformers.CLIPTextModelWithProjection)
    network = unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH, transformer_layers_per_block=1,
    )  # fmt: skip
    moments = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.1, 0.9, 1.2, 1.0]}
    vae = autoencoder(scaling_factor=0.13025, **moments)
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    return diffusers.StableDiffusionXLPipeline(vae, one, two, tokenizer, other, network, scheduler)


def stable_diffusion_3():
    torch.manual_seed(0)
    (one, tokenizer), (two, other) = (clip(transformers.CLIPTextModelWithProjection) for _ in range(2))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )  # fmt: skip
    vae = autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, one, tokenizer, two, other, *t5(2 * WIDTH))


def flux(guidance_embeds=True, **scheduler):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    vae = autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shift | scheduler)
    return diffusers.FluxPipeline(scheduler, vae, *clip(), *t5(), transformer)


def schnell():
    return flux(guidance_embeds=False, use_dynamic_shifting=False, shift=1.0)


def pixart(kind=diffusers.PixArtSigmaPipeline, sample_size=8):
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=6, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=24, caption_channels=WIDTH, sample_size=sample_size,
    )  # fmt: skip
    text_encoder, tokenizer = t5()
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return kind(tokenizer, text_encoder, autoencoder(), transformer, scheduler)


def pixart_alpha():
    """Of 1024 pixels, as those alone have the image's size as a condition."""
    return pixart(diffusers.PixArtAlphaPipeline, sample_size=128)


def pixels():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())


def ltx():
    """A pipeline of videos."""
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    no, yes = (False,) * 4, (True, True, False, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=yes,
        decoder_spatio_temporal_scaling=yes, decoder_inject_noise=(*no, False), upsample_residual=no,
        upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXPipeline(scheduler, vae, *t5(), transformer)


FAMILIES = {
    "StableDiffusion": stable_diffusion,
    "StableDiffusionXL": stable_diffusion_xl,
    "StableDiffusion3": stable_diffusion_3,
    "Flux-dev": flux,
    "Flux-schnell": schnell,
    "PixArt-Alpha": pixart_alpha,
    "PixArt-Sigma": pixart,
    "Unconditional": pixels,
}
LATENT = [name for name in FAMILIES if name != "Unconditional"]
