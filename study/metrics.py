"""Further measures of images: LPIPS and the CLIP score by torchmetrics, and the content of the demo's scenes.

A score comes with its difference to the score of the ground truth, as scores vary more between prompts.
"""

import warnings

import torch
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from models import scenes
from settings import SettingError, in_one_line

CLIP = "openai/clip-vit-large-patch14"  # torchmetrics' default
WANTED = {
    "lpips": "torchvision, in the version for the installed torch, and AlexNet's weights, which it downloads",
    "clip": f"the weights of {CLIP}, from the hub or its cache",
}


class Metrics:
    """Measures by name: "lpips" (Zhang et al., 2018, AlexNet), "clip" (Hessel et al., 2021), "scene".

    Their networks stay on the CPU, so that the reported memory of the sampler's device is the sampler's alone. Raises
    SettingError for weights that cannot be loaded.
    """

    def __init__(self, names):
        self.names, self.networks = names, {}
        for name in set(names) & WANTED.keys():
            try:
                self.networks[name] = {"lpips": lpips, "clip": clip}[name]()
            except (ImportError, OSError, RuntimeError) as error:
                why = in_one_line(error).split(". ")[0]
                raise SettingError("metrics", name, f"needs {WANTED[name]} ({why}); leave it out") from error

    def measure(self, image, truth, text):
        """Return an image's measures by column; None for one that does not apply.

        image: uint8 (height, width, 3). truth: the ground truth's image, or None. text: the prompt.
        """
        found = {}
        for name in self.names:
            if name == "lpips":
                found[name] = self._lpips(image, truth)
                continue
            score = {"clip": self._clip, "scene": scene}[name]
            found[name] = score(image, text)
            known = truth is not None and found[name] is not None
            found[f"{name}_difference"] = found[name] - score(truth, text) if known else None
        return found

    def _lpips(self, image, truth):
        with torch.no_grad():
            return float(self.networks["lpips"](_tensor(image)[None] / 255, _tensor(truth)[None] / 255))

    def _clip(self, image, text):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the part of a long prompt that CLIP cannot read
            return float(self.networks["clip"](_tensor(image), text))


def _tensor(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def lpips():
    return LearnedPerceptualImagePatchSimilarity("alex", normalize=True)


def clip():
    return CLIPScore(lambda: (Features(CLIPModel.from_pretrained(CLIP)), CLIPProcessor.from_pretrained(CLIP)))


class Features(torch.nn.Module):
    """A CLIP model whose features are tensors, which torchmetrics expects and transformers no longer returns."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model.eval(), model.config

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(ids, mask).pooler_output


def scene(image, text):
    """Return the share of the sky, light and land in a prompt that its image, uint8 (64, 64, 3), shows.

    None if the prompt has none of these, or if the image has another size.
    """
    if image.shape != (scenes.SIZE, scenes.SIZE, 3):
        return None
    asked = {name: [value for value in values if value in text] for name, values in scenes.ATTRIBUTES.items()}
    shown = [value in asked[name] for name, value in scenes.read(image).items() if asked[name]]
    return sum(shown) / len(shown) if shown else None
