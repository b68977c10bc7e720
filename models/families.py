"""The model families: what each diffusers pipeline does its own way, and nothing that they share.

A family is made from a model's configs and is handed the loaded pipeline at each call. Each has

    encode(pipeline, prompt, negative_prompt, guidance_scale, size, device)
        The conditions of one prompt for images of `size`, (height, width) in pixels: a dict of tensors with one row, or
        with two where guidance is classifier-free and on (scale above 1), the negative prompt's first.
    predict(pipeline, x, t, **conditions)
        The network's outputs, (L, C, h, w), for states x of the same shape (latents, or pixels of -1 to 1) at times t,
        (L,), and conditions of L rows.
"""

import math

import numpy as np
import torch


class Family:
    """What most families have in common: latents of an autoencoder, prompts, classifier-free guidance."""

    pipelines = ()  # diffusers' names for it
    network = "transformer"  # the pipeline's component that is called at each step
    flow = False  # flow matching, x = (1 - sigma) x0 + sigma eps, or diffusion
    guidance = "classifier-free"  # or "embedded" in the network, or None
    guidance_scale = None  # the usual one
    dtype = torch.float16  # on a GPU
    prompted = True
    latent = True  # of an autoencoder, or pixels
    loading = {"use_safetensors": True}  # what its pipeline's from_pretrained is told
    sample_size = 128  # height and width of the latents, where the network's config does not say
    patch = 1  # sides of the latents are multiples of this
    largest = math.inf  # height and width, in pixels
    autoencoder_overflows = False  # in float16, where its config has `force_upcast`

    def __init__(self, network, autoencoder):
        """From the configs of the two; raises ValueError where the network is not one that this program can call."""
        if network.get("time_cond_proj_dim"):
            raise ValueError("has its guidance scale embedded in a UNet, which is not supported")
        levels = autoencoder.get("block_out_channels") or autoencoder.get("decoder_block_out_channels")
        self.factor = 2 ** (len(levels) - 1) if levels else 8  # pixels a latent
        self.channels = network.get("in_channels", 4)
        size = network.get("sample_size") or self.sample_size
        self.native_size = tuple(side * self.factor for side in ((size, size) if isinstance(size, int) else size))

    @property
    def solvers(self):
        """What samples it, the default first."""
        return ("euler", "dpmsolver++") if self.flow else ("ddim", "ddpm", "dpmsolver++")

    @property
    def multiple(self):
        """Of which heights and widths are multiples, in pixels."""
        return self.factor * self.patch

    def shape(self, height, width):
        """The shape of a state, (C, h, w), of images of a size in pixels."""
        return self.channels, height // self.factor, width // self.factor

    @property
    def default_size(self):
        """Height and width where the user gives none, in pixels."""
        return self.native_size

    def sigmas(self, steps):
        """The noise levels, before their shift, that the family's own pipeline asks of a flow's scheduler."""

    def tokenizer(self, pipeline):
        """The tokenizer that takes in most of a prompt, and how many tokens that is."""
        return pipeline.tokenizer, pipeline.tokenizer.model_max_length

    def decode(self, pipeline, latent):
        """The image of a latent, (1, C, h, w): floats of -1 to 1, (1, 3, height, width)."""
        vae, halves = pipeline.vae, []
        if self.autoencoder_overflows and vae.config.get("force_upcast"):
            halves = [module for module in vae.modules() if _own_dtypes(module) == {torch.float16}]
        for module in halves:
            module.to(torch.float32)
        try:
            latent = latent.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
            return vae.decode(latent, return_dict=False)[0]
        finally:
            for module in halves:
                module.to(torch.float16)


def _own_dtypes(module):
    """Those of a module's own parameters, not of its parts'."""
    return {value.dtype for value in module.parameters(recurse=False)}


def rows(negative, positive, guided):
    """One condition's rows."""
    return torch.cat([negative, positive]) if guided else positive


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    pipelines = ("StableDiffusionPipeline",)
    network = "unet"
    guidance_scale = 7.5
    # Without the parts that only look at finished images.
    loading = Family.loading | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    sample_size = 64

    @property
    def default_size(self):
        return tuple(min(512, side) for side in self.native_size)

    @torch.no_grad()
    def encode(self, pipeline, prompt, negative_prompt, guidance_scale, size, device):
        guided = guidance_scale > 1
        positive, negative = pipeline.encode_prompt(prompt, device, 1, guided, negative_prompt)
        return {"encoder_hidden_states": rows(negative, positive, guided)}

    def predict(self, pipeline, x, t, **conditions):
        return pipeline.unet(x, t, **conditions, return_dict=False)[0]


class StableDiffusionXL(Family):
    """Stable Diffusion XL: a second text encoder, and the image's size as a condition."""

    pipelines = ("StableDiffusionXLPipeline",)
    network = "unet"
    guidance_scale = 5.0
    autoencoder_overflows = True

    @torch.no_grad()
    def encode(self, pipeline, prompt, negative_prompt, guidance_scale, size, device):
        guided = guidance_scale > 1
        # None, not "": the model may have been trained with zeros in place of an empty prompt.
        settings = {"do_classifier_free_guidance": guided, "negative_prompt": negative_prompt or None}
        positive, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt, device=device, **settings)
        hidden, pooled = rows(negative, positive, guided), rows(negative_pooled, pooled, guided)
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=hidden.dtype, device=device)  # original, crop, target
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": sizes.expand(len(hidden), -1)}

    def predict(self, pipeline, x, t, encoder_hidden_states, **added):
        return pipeline.unet(x, t, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]

    def decode(self, pipeline, latent):
        mean, std = (pipeline.vae.config.get(name) for name in ("latents_mean", "latents_std"))
        if mean and std:
            mean, std = (latent.new_tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
            latent = latent * std + mean * pipeline.vae.config.scaling_factor
        return super().decode(pipeline, latent)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    pipelines = ("StableDiffusion3Pipeline",)
    flow = True
    guidance_scale = 7.0
    dtype = torch.bfloat16
    patch = 2

    def __init__(self, network, autoencoder):
        super().__init__(network, autoencoder)
        self.largest = network.get("pos_embed_max_size", 96) * self.patch * self.factor

    def tokenizer(self, pipeline):
        return super().tokenizer(pipeline) if pipeline.text_encoder_3 is None else (pipeline.tokenizer_3, 256)

    @torch.no_grad()
    def encode(self, pipeline, prompt, negative_prompt, guidance_scale, size, device):
        guided = guidance_scale > 1
        settings = {"do_classifier_free_guidance": guided, "negative_prompt": negative_prompt}
        found = pipeline.encode_prompt(prompt, None, None, device=device, **settings)
        positive, negative, pooled, negative_pooled = found
        return {
            "encoder_hidden_states": rows(negative, positive, guided),
            "pooled_projections": rows(negative_pooled, pooled, guided),
        }

    def predict(self, pipeline, x, t, **conditions):
        return pipeline.transformer(x, timestep=t, **conditions, return_dict=False)[0]


class Flux(Family):
    """FLUX.1: latents in patches of 2 x 2, the guidance scale embedded (dev) or none (schnell)."""

    pipelines = ("FluxPipeline",)
    flow = True
    dtype = torch.bfloat16
    patch = 2

    def __init__(self, network, autoencoder):
        super().__init__(network, autoencoder)
        self.channels = network.get("in_channels", 64) // 4
        self.guidance, self.guidance_scale = ("embedded", 3.5) if network.get("guidance_embeds") else (None, None)

    def sigmas(self, steps):
        return np.linspace(1, 1 / steps, steps)

    def tokenizer(self, pipeline):
        return pipeline.tokenizer_2, 512

    @torch.no_grad()
    def encode(self, pipeline, prompt, negative_prompt, guidance_scale, size, device):
        hidden, pooled, txt_ids = pipeline.encode_prompt(prompt, None, device)
        height, width = (side // self.multiple for side in size)
        img_ids = pipeline._prepare_latent_image_ids(1, height, width, device, hidden.dtype)
        ids = {"txt_ids": txt_ids[None], "img_ids": img_ids[None]}
        scale = {"guidance": torch.tensor([guidance_scale], device=device)} if self.guidance else {}
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled, **ids, **scale}

    def predict(self, pipeline, x, t, txt_ids, img_ids, **conditions):
        height, width = x.shape[-2:]
        packed, ids = pipeline._pack_latents(x, *x.shape), {"txt_ids": txt_ids[0], "img_ids": img_ids[0]}
        t = t.to(x.dtype) / 1000
        output = pipeline.transformer(packed, timestep=t, **conditions, **ids, return_dict=False)[0]
        return pipeline._unpack_latents(output, height * self.factor, width * self.factor, self.factor)


class PixArt(Family):
    """PixArt-Alpha and PixArt-Sigma: a mask over the prompt's tokens, and outputs that may bring their variance."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    guidance_scale = 4.5
    patch = 2
    autoencoder_overflows = True  # Sigma's is Stable Diffusion XL's

    def tokenizer(self, pipeline):
        return pipeline.tokenizer, 300 if "Sigma" in type(pipeline).__name__ else 120

    @torch.no_grad()
    def encode(self, pipeline, prompt, negative_prompt, guidance_scale, size, device):
        guided = guidance_scale > 1
        settings = {"do_classifier_free_guidance": guided, "negative_prompt": negative_prompt, "device": device}
        positive, mask, negative, negative_mask = pipeline.encode_prompt(prompt, **settings)
        hidden, mask = rows(negative, positive, guided), rows(negative_mask, mask, guided)
        sizes = {}
        if pipeline.transformer.use_additional_conditions:
            sizes = {"resolution": [*map(float, size)], "aspect_ratio": [size[0] / size[1]]}
            sizes = {name: hidden.new_tensor([value] * len(hidden)) for name, value in sizes.items()}
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, **sizes}

    def predict(self, pipeline, x, t, resolution=None, aspect_ratio=None, **conditions):
        sizes = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        output = pipeline.transformer(x, timestep=t, added_cond_kwargs=sizes, **conditions, return_dict=False)[0]
        return output[:, : self.channels]


class Unconditional(Family):
    """Models of pixels without prompts: a prompt only names its sample."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    network = "unet"
    guidance = None
    prompted = False
    latent = False
    loading = {}  # most of these models are older than safetensors; torch then unpickles weights, and nothing else

    def __init__(self, network, autoencoder):
        if network.get("num_class_embeds") or network.get("class_embed_type"):
            raise ValueError("is conditioned on classes, which is not supported")
        super().__init__(network, {"block_out_channels": [0]})
        # diffusers' own widths where a config has none
        widths = network.get("block_out_channels", (224, 448, 672, 896))
        self.patch = 2 ** (len(widths) - 1)

    @torch.no_grad()
    def encode(self, pipeline, prompt, negative_prompt, guidance_scale, size, device):
        return {}

    def predict(self, pipeline, x, t):
        return pipeline.unet(x, t, return_dict=False)[0][:, : self.channels]

    def decode(self, pipeline, latent):
        return latent.expand(-1, 3, -1, -1)  # grey ones too


FAMILIES = {
    name: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt, Unconditional)
    for name in family.pipelines
}
