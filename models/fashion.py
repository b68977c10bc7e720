"""Train the model of real pixels from nothing: an unconditional diffusion model of Fashion-MNIST, 28 x 28.

    python -m models.fashion /usr/share/datasets/fashion-mnist        # resumes after an interruption

The folder is that of Debian's package `dataset-fashion-mnist`; the same four files are at
https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul and Vollgraf, 2017; MIT licence). Writes models/fashion.
"""

import argparse
import copy
import functools
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from models.train import DEVICE, Trainer, noised

FASHION = Path(__file__).resolve().parent / "fashion"
SIZE = 28
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read(folder, part="train"):
    """The images of "train" or "t10k", float32 (count, 1, 28, 28) in [-1, 1], and their classes, int64 (count,)."""
    images, labels = (
        np.frombuffer(gzip.decompress((Path(folder) / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=header)
        for name, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = torch.from_numpy(images.reshape(-1, 1, SIZE, SIZE).copy()).float() / 127.5 - 1
    return images, torch.from_numpy(labels.astype(np.int64))


def new_unet(channels=(32, 64, 112)):
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def new_scheduler():
    """Zero terminal SNR, as in the demo model; no clipping, so that a sample solves the probability flow's ODE."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def loss(images, scheduler, modules, rng, count=64):
    """Mean squared error of v (Salimans and Ho, 2022) on `count` images at random timesteps."""
    x, t, v = noised(images[rng.integers(0, len(images), count)].to(DEVICE), scheduler, rng)
    return nnf.mse_loss(modules["unet"](x, t, return_dict=False)[0], v)


def save_fashion(modules, scheduler):
    """Write models/fashion with float16 weights. The modules passed in are left as they are."""
    DDPMPipeline(copy.deepcopy(modules["unet"]).half(), scheduler).save_pretrained(FASHION)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz are")
    parser.add_argument("--steps", type=int, default=5000, help="steps of 64 images (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(2)
    scheduler = new_scheduler()
    step = functools.partial(loss, read(args.folder)[0], scheduler)
    trainer = Trainer("fashion", {"unet": new_unet()}, args.steps, 1e-3, step)
    finish = functools.partial(save_fashion, trainer.average, scheduler)
    trainer.run(checkpoint=finish)
    finish()


if __name__ == "__main__":
    main()
