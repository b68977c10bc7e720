"""How good the two models are, by sequential samples.

    python benchmarks/quality.py       # the demo: writes models/samples.png and prints
    python benchmarks/quality.py --fashion /usr/share/datasets/fashion-mnist    # its model: models/fashion.png

The demo: whether `models/scenes.py` reads back from an image what its prompt states. Fashion-MNIST: a classifier, a
small convolutional network that is trained here on the real training images. "confident" is the share of images that
it gives one class with at least 90 % probability, "classes" the share of each class among them. The Fréchet distance
is between the Gaussians of the features before its last layer (as FID has it, with other features), to the training
images; held-out real images show what is within reach.
"""

import argparse

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as nnf
from PIL import Image
from tqdm import trange

import common
from models import fashion, scenes, train
from utils import mosaic


def show(images, path):
    """Write 64 images, enlarged, as one."""
    picture = Image.fromarray(mosaic(np.stack(images[:64])))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC).save(common.ROOT / path)


def demo(count):
    sampler, asked = common.load(), common.prompts(2026, count)
    images = [sampler.sequential(text, seed).image for text, seed in zip(asked, trange(count))]
    read = [scenes.read(image) for image in images]
    right = pd.DataFrame([{name: want[name] == got[name] for name in want} for want, got in zip(asked.values(), read)])
    shares = {**right.mean(), "all": right.all(axis=1).mean()}
    print(f"autoencoder error: {train.autoencoder_error(sampler.pipeline.vae):.2f} grey levels")
    print(f"as asked, of {count} prompts:", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    show(images, "models/samples.png")


def classifier(images, labels, epochs=3):
    """Return a trained network's features, and the layer that follows."""
    torch.manual_seed(0)
    features = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(64 * 7 * 7, 64), torch.nn.ReLU(),
    )  # fmt: skip
    last = torch.nn.Linear(64, len(fashion.CLASSES))
    optimizer = torch.optim.AdamW([*features.parameters(), *last.parameters()], 1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128):
            loss = nnf.cross_entropy(last(features(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return features, last


def frechet(features, others):
    """The Fréchet distance of the Gaussians fitted to two sets of features, (count, size) each."""
    (mean, cov), (mean2, cov2) = ((each.mean(0), np.cov(each, rowvar=False)) for each in (features, others))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov @ cov2).real, 0))
    return float(np.square(mean - mean2).sum() + np.trace(cov) + np.trace(cov2) - 2 * roots.sum())


def fashion_mnist(count, folder, steps=50):
    images, labels = fashion.read(folder)
    held_out, theirs = fashion.read(folder, "t10k")
    features, last = classifier(images, labels)
    with torch.no_grad():
        seen = lambda images: torch.cat([features(part) for part in images.split(500)])
        reference = seen(images).numpy().astype(float)
        right = (last(seen(held_out)).argmax(1) == theirs).float().mean()
        print(f"classifier: {right:.1%} of held-out images right", flush=True)
        sampler = common.load("fashion", fine_steps=steps, coarse_steps=1)
        made = [sampler.sequential(str(seed), seed).image for seed in trange(count)]
        samples = torch.from_numpy(np.stack(made)[:, None, :, :, 0]).float() / 127.5 - 1
        for name, some in (("held-out images", held_out[:count]), (f"samples of {steps} steps", samples)):
            found = seen(some)
            best, classes = last(found).softmax(1).max(1)
            shares = torch.bincount(classes[best >= 0.9], minlength=len(fashion.CLASSES)) / (best >= 0.9).sum()
            named = ", ".join(f"{kind} {share:.0%}" for kind, share in zip(fashion.CLASSES, shares.tolist()))
            distance = frechet(found.numpy().astype(float), reference)
            confident = (best >= 0.9).float().mean()
            print(f"{name}: confident {confident:.1%}; Fréchet distance {distance:.2f}; classes: {named}")
    show(made, "models/fashion.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion", metavar="FOLDER", help="of the four files of Fashion-MNIST")
    args = parser.parse_args()
    fashion_mnist(1000, args.fashion) if args.fashion else demo(400)
