"""Further measures of images: the CLIP score, and the content of the demo's scenes.

A score comes with its difference to the score of the ground truth, as scores vary more between prompts.
"""

import torch
from transformers import CLIPModel, CLIPProcessor

from models import scenes
from settings import SettingError, in_one_line

CLIP = "openai/clip-vit-large-patch14"


class Metrics:
    """Scores of how well an image shows its prompt: "clip" (Hessel et al., 2021), "scene".

    CLIP stays on the CPU, so that the reported memory of the sampler's device is the sampler's alone. Raises
    SettingError for weights that cannot be loaded.
    """

    def __init__(self, names):
        self.scores = {name: {"clip": self.clip, "scene": scene}[name] for name in names}
        if "clip" in names:
            try:
                self.model, self.processor = CLIPModel.from_pretrained(CLIP), CLIPProcessor.from_pretrained(CLIP)
            except OSError as error:
                why = in_one_line(error).split(". ")[0]
                raise SettingError("metrics", "clip", f"needs the weights of {CLIP} ({why}); leave it out") from error

    def measure(self, image, truth, text):
        """Return the scores of an image and their differences to the truth's, by column; None if one does not apply.

        image: uint8 (height, width, 3). truth: the ground truth's image, or None. text: the prompt.
        """
        found = {}
        for name, score in self.scores.items():
            found[name] = score(image, text)
            compared = truth is not None and found[name] is not None
            found[f"{name}_difference"] = found[name] - score(truth, text) if compared else None
        return found

    @torch.no_grad()
    def clip(self, image, text):
        """Return 100 times the cosine of image and prompt, cut to what CLIP reads; 0 if it is negative."""
        inputs = self.processor(text=text, images=image, return_tensors="pt", truncation=True)
        found = self.model(**inputs)
        return max(0.0, 100 * float(torch.cosine_similarity(found.text_embeds, found.image_embeds)))


def scene(image, text):
    """Return the share of the sky, light and land in a prompt that its image, uint8 (64, 64, 3), shows.

    None if the prompt has none of these, or if the image has another size.
    """
    if image.shape != (scenes.SIZE, scenes.SIZE, 3):
        return None
    asked = {name: [value for value in values if value in text] for name, values in scenes.ATTRIBUTES.items()}
    shown = [value in asked[name] for name, value in scenes.read(image).items() if asked[name]]
    return sum(shown) / len(shown) if shown else None
