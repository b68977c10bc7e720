"""How good the model of Fashion-MNIST is, by a classifier that is trained here on the real training images.

    python benchmarks/fashion_model.py /usr/share/datasets/fashion-mnist     # writes models/fashion.png and prints

The classifier is a small convolutional network. "confident" is the share of images that it gives one class with at
least 90 % probability, "classes" the share of each class among them. The Fréchet distance is between the Gaussians of
the features before its last layer (as FID has it, with other features), to the training images; held-out real images
show what is within reach.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image

import common
import diffusion
from models import fashion
from utils import mosaic


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Flatten(), torch.nn.Linear(64 * 7 * 7, 64), torch.nn.ReLU(),
        )  # fmt: skip
        self.last = torch.nn.Linear(64, len(fashion.CLASSES))

    def forward(self, images):
        return self.last(self.features(images))


def train(images, labels, epochs):
    torch.manual_seed(0)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128):
            loss = nnf.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def frechet(features, others):
    """Fréchet distance of the Gaussians fitted to two sets of features, (count, size) each."""
    (mean, cov), (mean2, cov2) = ((each.mean(0), np.cov(each, rowvar=False)) for each in (features, others))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov @ cov2).real, 0))
    return float(np.square(mean - mean2).sum() + np.trace(cov) + np.trace(cov2) - 2 * roots.sum())


@torch.no_grad()
def samples(sampler, count, batch=50):
    """Sequential samples, float32 (count, 1, 28, 28), clamped to [-1, 1]."""
    generator, found = torch.Generator().manual_seed(0), []
    denoise = sampler.loop("").denoise
    for start in range(0, count, batch):
        x = torch.randn(min(batch, count - start), *sampler.shape, generator=generator)
        together = lambda x, n: denoise(x, n.expand(len(x)))
        found.append(diffusion.sequential(x, together, sampler.solver.step, range(sampler.settings.fine_steps + 1)))
    return torch.cat(found).clamp(-1, 1)


@torch.no_grad()
def judged(network, images, reference):
    """What the classifier says of images, in one line."""
    features = torch.cat([network.features(part) for part in images.split(500)])
    best, classes = network.last(features).softmax(1).max(1)
    confident = best >= 0.9
    shares = torch.bincount(classes[confident], minlength=len(fashion.CLASSES)) / confident.sum()
    distance = frechet(features.numpy().astype(float), reference)
    named = ", ".join(f"{name} {share:.0%}" for name, share in zip(fashion.CLASSES, shares.tolist()))
    return f"confident {confident.float().mean():.1%}; Fréchet distance {distance:.2f}; classes: {named}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of the four files of Fashion-MNIST")
    parser.add_argument("--samples", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of the classifier (%(default)s)")
    args = parser.parse_args()
    images, labels = fashion.read(args.folder)
    held_out, theirs = fashion.read(args.folder, "t10k")
    network = train(images, labels, args.epochs)
    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in held_out.split(500)]) == theirs
        reference = torch.cat([network.features(part) for part in images.split(500)]).numpy().astype(float)
    print(f"classifier: {right.float().mean():.1%} of held-out images right", flush=True)
    print("held-out real images:", judged(network, held_out[: args.samples], reference), flush=True)
    made = samples(common.load("fashion", fine_steps=args.steps, coarse_steps=1), args.samples)
    print(f"{args.samples} samples:", judged(network, made, reference))
    shown = ((made[:64] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    picture = Image.fromarray(mosaic(list(shown)))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC).save(
        common.ROOT / "models/fashion.png"
    )
