"""Train the demo model from nothing: an autoencoder, then a text-conditional latent diffusion model.

    python -m models.train            # writes models/demo; run it again after an interruption and it resumes

Everything it makes up on the way (checkpoints, the latents) is kept in models/.train, which git ignores.
"""

import argparse
import copy
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models import scenes

HERE = Path(__file__).resolve().parent
WORK, DEMO = HERE / ".train", HERE / "demo"
TOKENS = 48  # longest prompt, in tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


def save(value, path):
    """Write a checkpoint, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def batch_of_scenes(rng, count):
    """`count` random scenes: float32 (count, 3, 64, 64) in [-1, 1], and their attributes."""
    drawn = [scenes.sample(rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, [attributes for _, attributes in drawn]


class Trainer:
    """A training loop with warm-up, cosine decay, averaged weights, and a checkpoint that it resumes from."""

    def __init__(self, name, modules, steps, rate, loss, decay=0.999):
        self.path, self.modules, self.steps, self.rate, self.loss, self.decay = (
            WORK / f"{name}.pt",
            torch.nn.ModuleDict(modules).to(DEVICE),
            steps,
            rate,
            loss,
            decay,
        )
        self.modules.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.modules).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, map_location=DEVICE, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self):
        parts = {name: getattr(self, name).state_dict() for name in ("modules", "average", "optimizer")}
        save({**parts, "step": self.step, "seconds": self.seconds}, self.path)

    def run(self, every=500, checkpoint=lambda: None):
        started, total = time.time(), []
        while self.step < self.steps:
            warm = min(1.0, (self.step + 1) / 200)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            torch.manual_seed(self.step)
            loss = self.loss(self.modules, np.random.default_rng(self.step))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            decay = min(self.decay, (self.step + 1) / (self.step + 10))
            for mean, value in zip(self.average.parameters(), self.modules.parameters()):
                mean.lerp_(value.detach(), 1 - decay)
            self.step += 1
            total.append(loss.item())
            if self.step % every == 0 or self.step == self.steps:
                self.seconds += time.time() - started
                started = time.time()
                self.save()
                progress = f"{self.path.stem} {self.step}/{self.steps} loss {np.mean(total):.4f}"
                print(f"{progress} {self.seconds:.0f} s", flush=True)
                total = []
                checkpoint()
        return self.average


# The autoencoder: 64 x 64 pixels to 8 x 8 x 4 latents of about unit scale.


def new_autoencoder():
    channels = (32, 32, 32, 32)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 2, 3, 4),
        num_decoder_blocks=(4, 3, 2, 1),
    )


def autoencoder_loss(modules, rng, count=16):
    images, _ = batch_of_scenes(rng, count)
    images = images.to(DEVICE, memory_format=torch.channels_last)
    with autocast():
        latents = modules["vae"].encode(images).latents
        # A decoder that has seen noise is smooth, so a small error of the sampler stays small in the image.
        decoded = modules["vae"].decode(latents + 0.03 * torch.randn_like(latents)).sample
    latents, error = latents.float(), decoded.float() - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    unit = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
    return error.abs().mean() + edges + 0.01 * unit


@torch.no_grad()
def autoencoder_error(vae, count=256):
    """Mean absolute reconstruction error in grey levels (0 to 255) on scenes it was not trained on."""
    images, _ = batch_of_scenes(np.random.default_rng(10**9), count)
    decoded = torch.cat([vae(part.to(DEVICE)).sample.clamp(-1, 1).cpu() for part in images.split(32)])
    return (decoded - images).abs().mean().item() * 127.5


# The text side: a byte-pair vocabulary of the captions' words, so that any other text still has tokens.


def new_tokenizer():
    rng = np.random.default_rng(0)
    captions = [
        scenes.caption(rng, **{name: str(rng.choice(values)) for name, values in scenes.ATTRIBUTES.items()})
        for _ in range(4000)
    ]
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = Whitespace()
    learner.train_from_iterator(captions, BpeTrainer(end_of_word_suffix="</w>"))
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        {token: index for index, token in enumerate(vocabulary)},
        merges,
        pad_token="<|endoftext|>",
        model_max_length=TOKENS,
    )


def new_text_encoder(tokenizer, width=128):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# The network: v-prediction on latents.


def new_unet(channels=(96, 160), width=128):
    unet = UNet2DConditionModel(
        sample_size=scenes.SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=width,
        attention_head_dim=4,
    )
    unet.set_attn_processor(AttnProcessor())  # twice as fast to train as the fused one on a CPU, at this size
    return unet


def new_scheduler():
    """Zero terminal SNR: the first state is pure noise, so an image's overall brightness is the model's to choose."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def latents_of_scenes(vae, count=40_000):
    """Latents of the training scenes at unit scale, (count, 4, 8, 8), and the scenes' attributes."""
    path = WORK / "latents.pt"
    if not path.exists():
        rng, parts, attributes = np.random.default_rng(10**6), [], []
        for _ in range(count // 100):
            images, drawn = batch_of_scenes(rng, 100)
            parts.append((vae.encode(images.to(DEVICE)).latents * vae.config.scaling_factor).cpu())
            attributes += drawn
        save((torch.cat(parts), attributes), path)
    return torch.load(path, weights_only=True)


def noised(x0, scheduler, rng):
    """Clean samples x0, (count, ...), at random timesteps: noisy samples, timesteps (count,), and their velocities."""
    count, steps = len(x0), scheduler.config.num_train_timesteps
    # One timestep from each of `count` equal parts of the chain: less noise in the loss than independent draws.
    t = (np.arange(count) + rng.uniform(size=count)) * steps / count
    t = torch.from_numpy(t).long().to(DEVICE)
    noise = torch.randn(x0.shape).to(DEVICE)
    x = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    return x, t, scheduler.get_velocity(x0, noise, t)


class DiffusionLoss:
    """Mean squared error of v (Salimans and Ho, 2022) at a random timestep, under a random way to caption the scene."""

    def __init__(self, latents, attributes, tokenizer, scheduler, count=64):
        self.latents, self.attributes, self.scheduler, self.count = latents, attributes, scheduler, count
        self.tokens = functools.cache(
            lambda text: tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
        )

    def caption(self, rng, attributes):
        if rng.uniform() < 0.12:
            return ""  # what guidance contrasts with
        return scenes.caption(rng, **{name: value for name, value in attributes.items() if rng.uniform() < 0.9})

    def __call__(self, modules, rng):
        chosen = rng.integers(0, len(self.latents), self.count)
        x0 = self.latents[chosen].to(DEVICE)
        tokens = torch.stack([self.tokens(self.caption(rng, self.attributes[i])) for i in chosen]).to(DEVICE)
        x, t, v = noised(x0, self.scheduler, rng)
        with autocast():
            text = modules["text_encoder"](tokens)[0]
            predicted = modules["unet"](x, t, text, return_dict=False)[0]
        return nnf.mse_loss(predicted.float(), v)


def save_demo(modules, vae, tokenizer, scheduler):
    """Write models/demo with float16 weights. The modules passed in are left as they are."""
    parts = {"vae": vae, "text_encoder": modules["text_encoder"], "unet": modules["unet"]}
    StableDiffusionPipeline(
        **{name: copy.deepcopy(module).half() for name, module in parts.items()},
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(DEMO)
    # Loaded without a dtype, diffusers makes float32 of its modules and transformers takes what the config says;
    # and AutoencoderTiny writes a key into its config that it then warns of.
    for part, changes in {"text_encoder": {"dtype": "float32"}, "vae": {"block_out_channels": None}}.items():
        path = DEMO / part / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--autoencoder-steps", type=int, default=9000, help="steps of 16 images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="steps of 64 latents (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    autoencoder = Trainer("autoencoder", {"vae": new_autoencoder()}, args.autoencoder_steps, 2e-3, autoencoder_loss)
    if autoencoder.step < autoencoder.steps:
        (WORK / "latents.pt").unlink(missing_ok=True)  # of an earlier autoencoder
    vae = autoencoder.run()["vae"]
    print(f"autoencoder: {autoencoder_error(vae):.2f} grey levels")

    images, _ = batch_of_scenes(np.random.default_rng(10**7), 256)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=round(1 / vae.encode(images.to(DEVICE)).latents.std().item(), 4))
    latents, attributes = latents_of_scenes(vae)

    torch.manual_seed(1)
    tokenizer, scheduler = new_tokenizer(), new_scheduler()
    loss = DiffusionLoss(latents, attributes, tokenizer, scheduler)
    modules = {"text_encoder": new_text_encoder(tokenizer), "unet": new_unet()}
    diffusion = Trainer("diffusion", modules, args.steps, 6e-4, loss)
    finish = functools.partial(save_demo, diffusion.average, vae, tokenizer, scheduler)
    diffusion.run(checkpoint=finish)
    finish()


if __name__ == "__main__":
    main()
