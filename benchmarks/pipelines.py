"""Which of diffusers' pipelines can be sampled in parallel, each tried with tiny networks of random weights.

    python benchmarks/pipelines.py                # 5 minutes; writes results/pipelines.csv and tables in docs, README
    python benchmarks/pipelines.py Flux Wan       # those alone whose names have one of these words; writes nothing
    python benchmarks/pipelines.py --device cuda --dtype bfloat16      # writes results/pipelines-cuda-bfloat16.csv

Each is sampled in 8 steps: by the pipeline's own call with the scheduler that this program uses, step by step through
`models.loop`, and by both methods to their end. A difference is the largest of any number in the last state
and in the decoded image or video, over the standard deviation of the pipeline's own. A pipeline is verified if none
is above 0.005, or 0.01 by collocation, which stops at a threshold of its own. "batch": whether a network call takes
several states; False where the pipeline cannot make several copies of a sample, so that calls are made one by one.
"""

import argparse
import copy
import inspect
import os
import sys
import warnings

import diffusers
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils._pytree import tree_map_only

import common
import diffusion
from models.loading import known
from sampler import Sampler
from settings import Failure, Settings, in_one_line

sys.path.insert(0, str(common.ROOT / "tests"))
import pipelines as tiny

N, SEED = 8, 3
LIMITS = {"sequential": 5e-3, "srds": 5e-3, "collocation": 1e-2}  # collocation stops at its own threshold
ROUNDED = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 40}  # times LIMITS, as pipelines round each state
CASES = {}
INTRODUCTION = """
Made by `python benchmarks/pipelines.py` with diffusers {version}: tiny networks of random weights, 8 steps, on the CPU
in float32. A difference is the largest of any number in the last state and in the image or video, over the standard
deviation of what the pipeline's own call gives. In order: step by step, SRDS, collocation, each run to its end.
Verified: none above 0.005, by collocation 0.01. Failed: one is. "One by one": the pipeline cannot make equal copies of
a sample, so that a network call takes one state at a time; results are the same, but nothing runs in parallel.
"""
TEXT, IMAGE, CONTROL, VIDEO = "text to image", "image to image", "ControlNet", "video"
SIZE = {"height": 64, "width": 64}
CLIP = SIZE | {"num_frames": 5}
ROPE = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
QWEN = {"patch_size": 2, "in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 3,
        "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}  # fmt: skip
SANA = {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
        "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 32}  # fmt: skip
WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
       "out_channels": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1,
       "rope_max_seq_len": 32}  # fmt: skip


def case(kind, name=None):
    """A decorator: keep a function that returns a pipeline and the arguments of its call."""

    def keep(make):
        CASES[name or make.__name__] = kind, make
        return make

    return keep


def build(kind, components=None, scheduler=None, **parts):
    """A pipeline of a class, with those of the parts that it takes; weights that are all 0 become random."""
    kind = getattr(diffusers, kind)
    parts = (components or {}) | {"scheduler": scheduler or flow()} | parts
    parameters = dict(list(inspect.signature(kind.__init__).parameters.items())[1:])
    missing = {name: Silent() if name.startswith("text_encoder") else None for name, each in parameters.items()
               if each.default is inspect.Parameter.empty}  # fmt: skip
    pipeline = kind(**missing | {name: part for name, part in parts.items() if name in parameters})
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for weight in part.parameters():  # such as a ControlNet's last layers, which would have it do nothing
                if not weight.any():
                    weight.normal_(std=0.1)
    return pipeline


class Silent(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In place of text encoders, as texts are given as embeddings, and of a guardrail that is a package of its own."""

    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def net(kind, **config):
    return getattr(diffusers, kind)(**config)


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)


def embeds(width, *names, length=16, mask=None, mask_type=torch.long):
    """Random embeddings of a text and of a negative one, by the names of the arguments and of their masks."""
    names, found = names or ("prompt_embeds", "negative_prompt_embeds"), {}
    masks = {"attention": "prompt_attention_mask", "embeds": "prompt_embeds_mask"}
    for i, name in enumerate(names):
        found[name] = torch.randn(1, length, width, generator=torch.Generator().manual_seed(i))
        if mask:
            prefix = "negative_" if name.startswith("negative") else ""
            found[prefix + masks[mask]] = torch.ones(1, length, dtype=mask_type)
    return found


def pooled(width):
    return {"pooled_prompt_embeds": torch.randn(1, width, generator=torch.Generator().manual_seed(5))}


def picture(side=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def prompt(**more):
    return {"prompt": "a red sun", **SIZE, **more}


def kl(channels=4, **config):
    return tiny.autoencoder(channels, **{"shift_factor": 0.1} | config)


def wan_vae():
    return net("AutoencoderKLWan", base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1,
               temperal_downsample=[False, True, True])  # fmt: skip


def qwen_vae():
    return net("AutoencoderKLQwenImage", base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
               temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip


def dc_vae():
    blocks, widths = ("ResBlock", "EfficientViTBlock"), (8, 8)
    return net(
        "AutoencoderDC", in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks,
        decoder_block_types=blocks, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip


def video_vae(kind, prefix, **config):
    """An autoencoder of four levels whose blocks have a common name."""
    return net(
        kind, down_block_types=(prefix + "DownBlock3D",) * 4, up_block_types=(prefix + "UpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, temporal_compression_ratio=4, **config,
    )  # fmt: skip


# Those of the tests, and what else is made of their parts.

for family, make in tiny.FAMILIES.items():
    more = {} if family == "Unconditional" else prompt()
    more |= {"use_resolution_binning": False} if "PixArt" in family else {}
    CASES[f"{type(make()).__name__}, {family}"] = TEXT, lambda make=make, more=more: (make(), more)


def variant(kind, name, family, arguments, **parts):
    """Keep a case of another class with the parts of one of the families. parts: functions that make further ones."""

    def make():
        pipeline = tiny.FAMILIES[family]()
        made = {part: make() for part, make in parts.items()}
        more = {"scheduler": pipeline.scheduler, "requires_safety_checker": False}
        return build(name, pipeline.components, **more | made), {"prompt": "a red sun", **arguments}

    CASES[name] = kind, make


SD, XL, SD3, FLUX = "StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux-dev"
LEVELS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (16, 32)}
CONTROLNET = LEVELS | {"layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2,
                       "conditioning_embedding_out_channels": (8, 8, 8, 8)}  # fmt: skip
XL_PARTS = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32, "transformer_layers_per_block": 1}  # fmt: skip
FLUX_NET = ROPE | {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32}
SD3_NET = {"sample_size": 8, "in_channels": 16, "out_channels": 16, "num_layers": 1, "attention_head_dim": 8,
           "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 32,
           "pooled_projection_dim": 64, "pos_embed_max_size": 16}  # fmt: skip
STRONG = {"image": picture(), "strength": 0.6}
MASKED = STRONG | SIZE | {"mask_image": picture(seed=1).convert("L").point(lambda v: 255 * (v > 128))}
first_block = {"pag_applied_layers": lambda: "blocks.0"}
variant(TEXT, "StableDiffusionPAGPipeline", SD, SIZE)
variant(TEXT, "StableDiffusionXLPAGPipeline", XL, SIZE)
variant(TEXT, "StableDiffusion3PAGPipeline", SD3, SIZE, **first_block)
variant(TEXT, "PixArtSigmaPAGPipeline", "PixArt-Sigma", SIZE | {"use_resolution_binning": False}, **first_block)
variant(CONTROL, "StableDiffusionControlNetPipeline", SD, {"image": picture()},
        controlnet=lambda: net("ControlNetModel", **CONTROLNET, cross_attention_dim=32))  # fmt: skip
variant(CONTROL, "StableDiffusionXLControlNetPipeline", XL, {"image": picture()} | SIZE,
        controlnet=lambda: net("ControlNetModel", **CONTROLNET, **XL_PARTS, cross_attention_dim=64))  # fmt: skip
variant(CONTROL, "StableDiffusionControlNetPAGPipeline", SD, {"image": picture()},
        controlnet=lambda: net("ControlNetModel", **CONTROLNET, cross_attention_dim=32))  # fmt: skip
variant(CONTROL, "StableDiffusion3ControlNetPipeline", SD3, {"control_image": picture()} | SIZE,
        controlnet=lambda: net("SD3ControlNetModel", **SD3_NET))  # fmt: skip
variant(CONTROL, "FluxControlNetPipeline", FLUX, {"control_image": picture()} | SIZE,
        controlnet=lambda: net("FluxControlNetModel", **FLUX_NET, in_channels=16))  # fmt: skip
variant(CONTROL, "StableDiffusionAdapterPipeline", SD, {"image": picture()},
        adapter=lambda: net("T2IAdapter", channels=[16, 32], num_res_blocks=1, downscale_factor=8))  # fmt: skip
variant(CONTROL, "FluxControlPipeline", FLUX, {"control_image": picture()} | SIZE,
        transformer=lambda: net("FluxTransformer2DModel", **FLUX_NET, in_channels=32, out_channels=16,
                                guidance_embeds=True))  # fmt: skip
variant(IMAGE, "FluxFillPipeline", FLUX, {"image": picture(), "mask_image": MASKED["mask_image"]} | SIZE,
        transformer=lambda: net("FluxTransformer2DModel", **FLUX_NET, in_channels=4 * (4 + 4 + 64), out_channels=16,
                                guidance_embeds=True))  # fmt: skip
variant(IMAGE, "FluxKontextPipeline", FLUX, {"image": picture(), "_auto_resize": False} | SIZE)
variant(IMAGE, "StableDiffusionInstructPix2PixPipeline", SD, {"image": picture()},
        unet=lambda: net("UNet2DConditionModel", sample_size=8, in_channels=8, out_channels=4, **LEVELS,
                         up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=8,
                         attention_head_dim=2, cross_attention_dim=32))  # fmt: skip
variant(IMAGE, "StableDiffusionInpaintPipeline", SD, MASKED)
variant(IMAGE, "FluxInpaintPipeline", FLUX, MASKED)
for name, family in (("StableDiffusion", SD), ("StableDiffusionXL", XL), ("StableDiffusion3", SD3), ("Flux", FLUX)):
    variant(IMAGE, f"{name}Img2ImgPipeline", family, STRONG | (SIZE if name == "Flux" else {}))
variant(VIDEO, "AnimateDiffPipeline", SD, SIZE | {"num_frames": 4}, motion_adapter=lambda: net(
    "MotionAdapter", block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=2,
    motion_num_attention_heads=4))  # fmt: skip

# Text to image, from random embeddings.


@case(TEXT)
def Flux2Pipeline(kind="Flux2Pipeline", guided=True, **more):
    transformer = net(
        "Flux2Transformer2DModel", in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    )  # fmt: skip
    vae = net("AutoencoderKLFlux2", block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
              up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
              norm_num_groups=4)  # fmt: skip
    text = embeds(32, "prompt_embeds", *() if guided else ("negative_prompt_embeds",))
    return build(kind, transformer=transformer, vae=vae), text | SIZE | more


@case(TEXT)
def Flux2KleinPipeline(**more):
    return Flux2Pipeline("Flux2KleinPipeline", False, **more)


@case(IMAGE, "Flux2Pipeline, image")
def flux2_image():
    return Flux2Pipeline(image=[picture()])


@case(IMAGE, "Flux2KleinPipeline, image")
def klein_image():
    return Flux2KleinPipeline(image=[picture()])


@case(TEXT)
def QwenImagePipeline(kind="QwenImagePipeline", parts=(), **more):
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    transformer = net("QwenImageTransformer2DModel", **QWEN, out_channels=4)
    text = embeds(16, mask="embeds") | SIZE | {"true_cfg_scale": 4.0}
    return build(kind, transformer=transformer, vae=qwen_vae(), scheduler=scheduler, **dict(parts)), text | more


@case(CONTROL)
def QwenImageControlNetPipeline():
    parts = {"controlnet": net("QwenImageControlNetModel", **QWEN, out_channels=4)}
    return QwenImagePipeline("QwenImageControlNetPipeline", parts, control_image=picture())


@case(IMAGE)
def QwenImageImg2ImgPipeline():
    return QwenImagePipeline("QwenImageImg2ImgPipeline", **STRONG)


def z_image(kind, **more):
    transformer = net(
        "ZImageTransformer2DModel", all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=1,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    text = {name: [value[0]] for name, value in embeds(16).items()}
    return build(kind, transformer=transformer, vae=kl(16)), text | SIZE | more


@case(TEXT)
def ZImagePipeline():
    return z_image("ZImagePipeline")


@case(IMAGE)
def ZImageImg2ImgPipeline():
    return z_image("ZImageImg2ImgPipeline", **STRONG)


@case(TEXT)
def Krea2Pipeline():
    transformer = net(
        "Krea2Transformer2DModel", in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )  # fmt: skip
    text = embeds(48, mask="embeds", mask_type=torch.bool)
    text = {name: value.unflatten(2, (3, 16)) if value.ndim == 3 else value for name, value in text.items()}
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return build("Krea2Pipeline", transformer=transformer, vae=qwen_vae(), scheduler=scheduler), text | SIZE


def sana(kind, **parts):
    parts |= {"transformer": net("SanaTransformer2DModel", **SANA), "vae": dc_vae()}
    return build(kind, **parts), embeds(8, mask="attention") | SIZE | {"use_resolution_binning": False}


@case(TEXT)
def SanaPipeline():
    return sana("SanaPipeline")


@case(TEXT)
def SanaPAGPipeline():
    return sana("SanaPAGPipeline")


@case(CONTROL)
def SanaControlNetPipeline():
    pipeline, text = sana("SanaControlNetPipeline", controlnet=net("SanaControlNetModel", **SANA))
    return pipeline, text | {"control_image": picture()}


@case(TEXT)
def AuraFlowPipeline():
    transformer = net(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    return build("AuraFlowPipeline", transformer=transformer, vae=kl()), embeds(32, mask="attention") | SIZE


COGVIEW = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8,
           "num_attention_heads": 2, "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4}  # fmt: skip


@case(TEXT)
def CogView3PlusPipeline(scheduler=diffusers.DDIMScheduler):
    transformer = net("CogView3PlusTransformer2DModel", **COGVIEW, pos_embed_max_size=8, sample_size=8)
    parts = {"transformer": transformer, "vae": kl(), "scheduler": scheduler(prediction_type="v_prediction")}
    return build("CogView3PlusPipeline", **parts), embeds(32) | SIZE


@case(TEXT, "CogView3PlusPipeline, its own scheduler")
def cogview3():
    return CogView3PlusPipeline(diffusers.CogVideoXDDIMScheduler)


@case(TEXT)
def CogView4Pipeline():
    shift = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "time_shift_type": "linear"}
    transformer = net("CogView4Transformer2DModel", **COGVIEW)
    scheduler = flow(use_dynamic_shifting=True, **shift)
    return build("CogView4Pipeline", transformer=transformer, vae=kl(), scheduler=scheduler), embeds(32) | SIZE


LUMINA = {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
          "multiple_of": 16, "sample_size": 8}  # fmt: skip


@case(TEXT)
def LuminaPipeline():
    transformer = net("LuminaNextDiT2DModel", **LUMINA, hidden_size=16, learn_sigma=True, cross_attention_dim=8)
    return build("LuminaPipeline", transformer=transformer, vae=kl()), embeds(8, mask="attention") | SIZE


@case(TEXT)
def Lumina2Pipeline(**more):
    transformer = net("Lumina2Transformer2DModel", **LUMINA, hidden_size=16, axes_dim_rope=[4, 2, 2], cap_feat_dim=32)
    parts = dict(zip(("text_encoder", "tokenizer"), tiny.t5())) | {"transformer": transformer, "vae": kl()}
    return build("Lumina2Pipeline", **parts), prompt(**more)


@case(TEXT, "Lumina2Pipeline, guidance for a part of the steps")
def lumina2_truncated():
    return Lumina2Pipeline(cfg_trunc_ratio=0.5)


def chroma(kind, **more):
    transformer = net(
        "ChromaTransformer2DModel", in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, **ROPE,
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16,
    )  # fmt: skip
    text = embeds(32, mask="attention", mask_type=torch.bool)
    return build(kind, transformer=transformer, vae=kl()), text | SIZE | more


@case(TEXT)
def ChromaPipeline():
    return chroma("ChromaPipeline")


@case(IMAGE)
def ChromaImg2ImgPipeline():
    return chroma("ChromaImg2ImgPipeline", **STRONG)


@case(TEXT)
def BriaPipeline():
    transformer = net("BriaTransformer2DModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
                      joint_attention_dim=32, pooled_projection_dim=None, **ROPE)  # fmt: skip
    return build("BriaPipeline", transformer=transformer, vae=kl()), embeds(32) | SIZE


def hunyuan_dit(kind, **parts):
    transformer = net(
        "HunyuanDiT2DModel", sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    text = embeds(32, mask="attention", length=77)
    other = embeds(32, "prompt_embeds_2", "negative_prompt_embeds_2", length=256)
    masks = {name.replace("embeds", "attention_mask"): torch.ones(1, 256, dtype=torch.long) for name in other}
    parts |= {"transformer": transformer, "vae": kl(), "requires_safety_checker": False}
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_end=0.03, prediction_type="v_prediction")
    return build(kind, scheduler=scheduler, **parts), text | other | masks | SIZE | {"use_resolution_binning": False}


@case(TEXT)
def HunyuanDiTPipeline():
    return hunyuan_dit("HunyuanDiTPipeline")


@case(TEXT)
def HunyuanDiTPAGPipeline():
    return hunyuan_dit("HunyuanDiTPAGPipeline")


@case(TEXT)
def HunyuanImagePipeline(embedded=True):
    transformer = net(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=embedded,
        text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(4, 4),
    )  # fmt: skip
    vae = net("AutoencoderKLHunyuanImage", in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1,
              block_out_channels=(32, 64, 64, 64), spatial_compression_ratio=8, sample_size=64,
              scaling_factor=0.5)  # fmt: skip
    text = embeds(32, mask="embeds")
    names = "prompt_embeds_2", "negative_prompt_embeds_2"
    text |= embeds(32, *names) | {name.replace("embeds", "embeds_mask"): torch.ones(1, 16) for name in names}
    guiders = {}
    if not embedded:
        from diffusers.guiders import AdaptiveProjectedMixGuidance

        guiders = {"guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
                   "ocr_guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3)}  # fmt: skip
    return build("HunyuanImagePipeline", transformer=transformer, vae=vae, **guiders), text | SIZE


@case(TEXT, "HunyuanImagePipeline, guider")
def hunyuan_image_guided():
    return HunyuanImagePipeline(embedded=False)


@case(TEXT)
def KolorsPipeline():
    config = XL_PARTS | {"projection_class_embeddings_input_dim": 6 * 8 + 32}
    scheduler = diffusers.EulerDiscreteScheduler(**tiny.SD, timestep_spacing="leading", steps_offset=1)
    parts = {"unet": tiny.unet(cross_attention_dim=32, **config), "vae": kl(), "scheduler": scheduler}
    pooled_text = {"pooled_prompt_embeds": torch.randn(1, 32), "negative_pooled_prompt_embeds": torch.randn(1, 32)}
    return build("KolorsPipeline", **parts), embeds(32) | pooled_text | SIZE


@case(TEXT)
def PRXPipeline():
    transformer = net("PRXTransformer2DModel", patch_size=1, in_channels=4, context_in_dim=8, hidden_size=8,
                      mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2])  # fmt: skip
    text = embeds(8, mask="attention", mask_type=torch.bool)
    return build("PRXPipeline", transformer=transformer, vae=kl()), text | SIZE | {"use_resolution_binning": False}


@case(TEXT)
def OvisImagePipeline():
    transformer = net("OvisImageTransformer2DModel", in_channels=16, out_channels=16, num_layers=1,
                      num_single_layers=1, joint_attention_dim=32, **ROPE)  # fmt: skip
    return build("OvisImagePipeline", transformer=transformer, vae=kl()), embeds(32) | SIZE


@case(TEXT)
def HiDreamImagePipeline():
    transformer = net(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32),
        llama_layers=(0, 1),
    )  # fmt: skip
    text = embeds(32, "prompt_embeds_t5", "negative_prompt_embeds_t5") | {}
    llama = embeds(16, "prompt_embeds_llama3", "negative_prompt_embeds_llama3")
    text |= {name: torch.stack([value, -value]) for name, value in llama.items()}
    text |= {"pooled_prompt_embeds": torch.randn(1, 64), "negative_pooled_prompt_embeds": torch.randn(1, 64)}
    return build("HiDreamImagePipeline", transformer=transformer, vae=kl()), text | SIZE


@case(TEXT)
def NucleusMoEImagePipeline():
    config = {name: value for name, value in QWEN.items() if name != "num_attention_heads"}
    transformer = net("NucleusMoEImageTransformer2DModel", **config, num_attention_heads=4, out_channels=4,
                      moe_enabled=False, capacity_factors=[8.0])  # fmt: skip
    return build("NucleusMoEImagePipeline", transformer=transformer, vae=qwen_vae()), embeds(16, mask="embeds") | SIZE


@case(TEXT)
def DiTPipeline():
    transformer = net(
        "DiTTransformer2DModel", sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, in_channels=4, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    return build("DiTPipeline", transformer=transformer, vae=kl(), scheduler=scheduler), {"class_labels": [1]}


@case(TEXT)
def DDIMPipeline():
    return diffusers.DDIMPipeline(tiny.pixels().unet, diffusers.DDIMScheduler()), {}


def movq():
    return net(
        "VQModel", block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, layers_per_block=1,
        norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip


def linear():
    return diffusers.DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                                   set_alpha_to_one=False, steps_offset=1)  # fmt: skip


@case(TEXT)
def KandinskyV22Pipeline():
    unet = net(
        "UNet2DConditionModel", in_channels=4, out_channels=8, addition_embed_type="image", layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), block_out_channels=(32, 64),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim=32,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim_type="image_proj", cross_attention_dim=32,
        attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    text = {name: torch.randn(1, 32) for name in ("image_embeds", "negative_image_embeds")}
    return build("KandinskyV22Pipeline", unet=unet, movq=movq(), scheduler=linear()), text | SIZE


@case(TEXT)
def Kandinsky3Pipeline():
    unet = net("Kandinsky3UNet", in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4,
               layers_per_block=3, block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=32)  # fmt: skip
    text = embeds(32, length=128) | {name: torch.ones(1, 128) for name in ("attention_mask", "negative_attention_mask")}
    return build("Kandinsky3Pipeline", unet=unet, movq=movq(), scheduler=linear()), text | SIZE


def kandinsky5(kind, vae, **more):
    transformer = net(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16,
        out_visual_dim=4, patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=(1, 1, 2), visual_cond=False, attention_type="regular",
    )  # fmt: skip
    text = embeds(32, "prompt_embeds_qwen", "negative_prompt_embeds_qwen")
    text |= {name: torch.randn(1, 16) for name in ("prompt_embeds_clip", "negative_prompt_embeds_clip")}
    text |= {name: torch.tensor([0, 16], dtype=torch.int32) for name in
             ("prompt_cu_seqlens", "negative_prompt_cu_seqlens")}  # fmt: skip
    return build(kind, transformer=transformer, vae=vae), text | SIZE | more


@case(TEXT)
def Kandinsky5T2IPipeline():
    return kandinsky5("Kandinsky5T2IPipeline", kl())


@case(TEXT)
def IFPipeline():
    return build("IFPipeline", unet=tiny.pixels().unet, requires_safety_checker=False,
                 scheduler=diffusers.DDPMScheduler(thresholding=True)), prompt()  # fmt: skip


# Video.


@case(VIDEO)
def WanPipeline(experts=1, **more):
    networks = [net("WanTransformer3DModel", **WAN) for _ in range(experts)]
    parts = dict(zip(("transformer", "transformer_2"), networks)) | {"boundary_ratio": 0.6 if experts > 1 else None}
    shipped = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**shipped)
    return build("WanPipeline", scheduler=scheduler, vae=wan_vae(), **parts), embeds(32) | CLIP | more


@case(VIDEO, "WanPipeline, two experts")
def wan_22():
    return WanPipeline(experts=2)


@case(VIDEO)
def WanImageToVideoPipeline():
    transformer = net("WanTransformer3DModel", **WAN | {"in_channels": 36})
    parts = {"transformer": transformer, "vae": wan_vae()}
    return build("WanImageToVideoPipeline", **parts), embeds(32) | CLIP | {"image": picture()}


@case(VIDEO)
def WanVACEPipeline():
    transformer = net("WanVACETransformer3DModel", **WAN | {"num_layers": 2}, vace_layers=[0], vace_in_channels=96)
    more = {"video": [picture(seed=i) for i in range(5)], "mask": [picture(seed=9).convert("L")] * 5}
    return build("WanVACEPipeline", transformer=transformer, vae=wan_vae()), embeds(32) | CLIP | more


@case(VIDEO)
def SkyReelsV2Pipeline():
    transformer = net("SkyReelsV2Transformer3DModel", **WAN)
    return build("SkyReelsV2Pipeline", transformer=transformer, vae=wan_vae()), embeds(32) | CLIP


@case(VIDEO)
def SanaVideoPipeline():
    transformer = net(
        "SanaVideoTransformer3DModel", in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12,
        num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=8, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    text = embeds(8, mask="attention") | SIZE | {"frames": 5, "use_resolution_binning": False}
    return build("SanaVideoPipeline", transformer=transformer, vae=wan_vae()), text


@case(VIDEO)
def MotifVideoPipeline():
    from diffusers.guiders import ClassifierFreeGuidance

    transformer = net(
        "MotifVideoTransformer3DModel", in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=12,
        num_layers=1, num_single_layers=1, patch_size=1, patch_size_t=1, qk_norm="rms_norm", text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    parts = {"transformer": transformer, "vae": wan_vae(), "guider": ClassifierFreeGuidance()}
    return build("MotifVideoPipeline", **parts), embeds(32, mask="attention") | CLIP


def ltx(kind, **more):
    return build(kind, tiny.ltx().components), prompt(num_frames=9, **more)


@case(VIDEO)
def LTXPipeline():
    return ltx("LTXPipeline")


@case(VIDEO)
def LTXImageToVideoPipeline():
    return ltx("LTXImageToVideoPipeline", image=picture())


def hunyuan_video_vae():
    return video_vae("AutoencoderKLHunyuanVideo", "HunyuanVideo", norm_num_groups=4, spatial_compression_ratio=8)


@case(VIDEO)
def HunyuanVideoPipeline():
    transformer = net(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    text = embeds(16, "prompt_embeds", mask="attention") | pooled(8) | CLIP
    return build("HunyuanVideoPipeline", transformer=transformer, vae=hunyuan_video_vae()), text


@case(VIDEO)
def Kandinsky5T2VPipeline():
    return kandinsky5("Kandinsky5T2VPipeline", hunyuan_video_vae(), num_frames=5)


@case(VIDEO)
def CogVideoXPipeline(kind="CogVideoXPipeline", channels=4, scheduler=diffusers.DDIMScheduler, **more):
    transformer = net(
        "CogVideoXTransformer3DModel", num_attention_heads=4, attention_head_dim=8, in_channels=channels,
        out_channels=4, time_embed_dim=2, text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    vae = video_vae("AutoencoderKLCogVideoX", "CogVideoX", norm_num_groups=2)
    text = embeds(32) | SIZE | {"num_frames": 9, "max_sequence_length": 16}
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler(prediction_type="v_prediction")}
    return build(kind, **parts), text | more


@case(VIDEO, "CogVideoXPipeline, its own scheduler")
def cogvideox():
    return CogVideoXPipeline(scheduler=diffusers.CogVideoXDDIMScheduler)


@case(VIDEO, "CogVideoXPipeline, dynamic guidance")
def cogvideox_dynamic():
    return CogVideoXPipeline(use_dynamic_cfg=True)


@case(VIDEO)
def CogVideoXImageToVideoPipeline():
    return CogVideoXPipeline("CogVideoXImageToVideoPipeline", 8, image=picture())


@case(VIDEO)
def MochiPipeline():
    transformer = net(
        "MochiTransformer3DModel", patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        pooled_projection_dim=16, in_channels=12, qk_norm="rms_norm", text_embed_dim=32, time_embed_dim=4,
        activation_fn="swiglu", max_sequence_length=16,
    )  # fmt: skip
    vae = net("AutoencoderKLMochi", latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4,
              decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)  # fmt: skip
    parts = dict(zip(("text_encoder", "tokenizer"), tiny.t5())) | {"transformer": transformer, "vae": vae}
    text = prompt(num_frames=7, max_sequence_length=16)
    return build("MochiPipeline", **parts, scheduler=flow(shift=1.0)), text


@case(VIDEO)
def LattePipeline():
    transformer = net(
        "LatteTransformer3DModel", sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
        num_attention_heads=3, caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
    )  # fmt: skip
    parts = {"transformer": transformer, "vae": kl(), "scheduler": diffusers.DDIMScheduler()}
    return build("LattePipeline", **parts), embeds(32) | SIZE | {"video_length": 2}


@case(VIDEO)
def AllegroPipeline():
    transformer = net(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        num_layers=1, cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=24,
    )  # fmt: skip
    vae = video_vae("AutoencoderKLAllegro", "Allegro", norm_num_groups=2)
    vae.enable_tiling()
    parts = {"transformer": transformer, "vae": vae, "scheduler": diffusers.DDIMScheduler()}
    return build("AllegroPipeline", **parts), embeds(24, mask="attention") | SIZE | {"num_frames": 8}


@case(VIDEO)
def EasyAnimatePipeline():
    transformer = net(
        "EasyAnimateTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=16, num_layers=1, sample_width=16, sample_height=16, patch_size=2,
    )  # fmt: skip
    block = "Spatial{0}Block3D", "SpatialTemporal{0}Block3D", "SpatialTemporal{0}Block3D", "SpatialTemporal{0}Block3D"
    vae = net(
        "AutoencoderKLMagvit", down_block_types=[each.format("Down") for each in block], latent_channels=4,
        up_block_types=[each.format("Up") for each in block], block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=2, spatial_group_norm=False,
    )  # fmt: skip
    return build("EasyAnimatePipeline", transformer=transformer, vae=vae), embeds(16, mask="attention") | CLIP


@case(VIDEO)
def CosmosTextToWorldPipeline():
    transformer = net(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=1, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), extra_pos_embed_type="learnable",
    )  # fmt: skip
    vae = net("AutoencoderKLCosmos", latent_channels=4, encoder_block_out_channels=(8,) * 4, resolution=64,
              decode_block_out_channels=(8,) * 4, attention_resolutions=(8,), num_layers=1,
              scaling_factor=1.0)  # fmt: skip
    parts = {"transformer": transformer, "vae": vae, "safety_checker": Silent()}
    return build("CosmosTextToWorldPipeline", **parts, scheduler=diffusers.EDMEulerScheduler()), embeds(32) | CLIP


# What is done with each.


def own(pipeline, arguments):
    """The pipeline's own result, with the scheduler that is used here: the last state and the image or video."""
    twin, scheduler, states = copy.copy(pipeline), copy.copy(known(pipeline).scheduler), []
    step = scheduler.step

    def kept(*args, **kwargs):
        answer = step(*args, **kwargs)
        states.append(answer[0] if isinstance(answer, tuple) else answer.prev_sample)
        return answer

    scheduler.step = kept
    vars(twin)["scheduler"] = scheduler
    twin.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    images = twin(**arguments, num_inference_steps=N, generator=generator, output_type="np", return_dict=False)[0]
    return states[-1].float().cpu().numpy(), np.asarray(images)


def compare(pipeline, arguments, measure=np.max):
    """The largest differences to the pipeline's own result: step by step, by srds and by collocation."""
    settings = Settings(fine_steps=N, coarse_steps=3, tolerance=0, seed=SEED)
    samplers = {method: Sampler(pipeline, settings).vary(method=method) for method in ("srds", "collocation")}
    known_names, texts = samplers["srds"].model.parameters, any("embeds" in name for name in arguments)
    arguments = ({"negative_prompt": None} if texts and "negative_prompt" in known_names else {}) | arguments
    truth, differences = own(pipeline, arguments), {}
    prompt = samplers["srds"].encode(arguments.pop("prompt", None) or "", **arguments)
    if samplers["srds"].model.prompted and not prompt.text:
        prompt.arguments["prompt"] = None
    for way, sampler in {"sequential": samplers["srds"], **samplers}.items():
        loop = sampler.loop(prompt)
        if way == "sequential":
            step = sampler._steps(loop)[1].step
            state = diffusion.sequential(loop.x, loop.denoise, step, range(loop.N + 1), [loop.N])[-1:]
        else:
            sampler = sampler if way == "srds" else sampler.vary(method=way, nodes=loop.N)
            *_, last = sampler.iterates(prompt)
            assert last.exact or last.all_nodes, "the last iterate is not exact"
            state = last.states[-1:]
        found = state.cpu().numpy(), np.asarray(loop.decode(state))
        differences[way] = max(float(measure(np.abs(a - b)) / b.std()) for a, b in zip(found, truth))
        loop.close()
        differences["batch"] = bool(loop.copies)
    return differences


def moved(pipeline, arguments, device, dtype):
    """A pipeline and the arguments of its call on a device, their floating-point numbers in a dtype, as if loaded."""
    pipeline.to(device, dtype)
    for part in pipeline.components.values():
        kept = getattr(part, "_keep_in_fp32_modules", None) or ()
        for name, weight in part.named_parameters() if kept else ():
            weight.data = weight.data.float() if {*kept} & {*name.split(".")} else weight.data
    at = lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None)  # noqa: E731
    return pipeline, tree_map_only(torch.Tensor, at, arguments)


def attempt(name, device="cpu", dtype=torch.float32):
    """A row of the table for one case."""
    kind, make = CASES[name]
    row = {"pipeline": name, "kind": kind, "verdict": "verified"}
    torch.manual_seed(0)
    try:
        row |= compare(*moved(*make(), device, dtype), np.max if dtype == torch.float32 else np.mean)
        if not all(row[way] < limit * ROUNDED[dtype] for way, limit in LIMITS.items()):
            row["verdict"] = "failed"
    except Failure as error:
        row |= {"verdict": "refused", "reason": in_one_line(error)}
    except Exception as error:
        if os.environ.get("TRACE"):
            raise
        row |= {"verdict": "failed", "reason": f"{type(error).__name__}: {in_one_line(error)}"}
    return row


def page(table):
    """The table as a page in Markdown, with the names of those that were not tried."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table.verdict.value_counts().items())
    lines = ["# Which pipelines can be sampled", "", f"Of {len(table)} pipelines and modes that were tried: {counts}."]
    lines.append(INTRODUCTION.format(version=diffusers.__version__))
    for kind, rows in table.groupby("kind", sort=False):
        lines += [f"## {kind[0].upper()}{kind[1:]}", ""]
        lines += ["| pipeline | verdict | largest differences, or the reason |", "|---|---|---|"]
        for row in rows.itertuples():
            numbers = ", ".join(f"{value:.0e}" for value in (row.sequential, row.srds, row.collocation))
            found = row.reason if isinstance(row.reason, str) else numbers
            found = found.replace(f"the {row.pipeline.partition(',')[0]} ", "")
            lines.append(f"| `{row.pipeline}` | {row.verdict}{', one by one' * (row.batch is False)} | {found} |")
        lines.append("")
    tried = {name.partition(",")[0] for name in table.pipeline}
    others = [name for name in dir(diffusers) if name.endswith("Pipeline") and name not in tried and steps(name)]
    lines += [f"## Not tried: {len(others)}", "", ", ".join(f"`{name}`" for name in others)]
    return "\n".join(lines) + "\n"


def counted(table):
    """README's table: how many pipelines of each kind have each verdict."""
    counts = pd.crosstab(table.kind, table.verdict).reindex(table.kind.unique())[["verified", "refused", "failed"]]
    lines = ["|kind|" + "|".join(counts) + "|", "|" + "---|" * (1 + counts.shape[1])]
    return "\n".join(lines + [f"|{kind}|{'|'.join(map(str, row))}|" for kind, row in zip(counts.index, counts.values)])


def steps(name):
    """Whether a class of diffusers is a pipeline that samples in steps."""
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.__call__).parameters
    return issubclass(kind, diffusers.DiffusionPipeline) and "num_inference_steps" in parameters


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="try only pipelines whose names have one of these words")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    args = parser.parse_args()
    words, usual = args.words, (args.device, args.dtype) == ("cpu", "float32")
    torch.backends.cudnn.allow_tf32 = False  # as otherwise float32 on CUDA has the precision of float16
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    chosen = [name for name in CASES if not words or any(word in name for word in words)]
    rows = []
    for name in chosen:
        rows.append(attempt(name, args.device, getattr(torch, args.dtype)))
        print(*(f"{value:.1e}" if isinstance(value, float) else value for value in rows[-1].values()), flush=True)
    table = pd.DataFrame(rows)
    print(table.verdict.value_counts().to_string())
    if not words:
        common.save(table, "pipelines" if usual else f"pipelines-{args.device}-{args.dtype}")
    if not words and usual:
        (common.ROOT / "docs" / "pipelines.md").write_text(page(table), encoding="utf-8")
        readme = common.ROOT / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition("|kind|")
        after = rest[rest.index("\n\n") :]
        readme.write_text(before + counted(table) + after, encoding="utf-8")
