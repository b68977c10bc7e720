"""How well an image shows its prompt, by a network."""

import torch
from transformers import CLIPModel, CLIPProcessor

from settings import SettingError, in_one_line

CLIP = "openai/clip-vit-large-patch14"


class ClipScore:
    """The CLIP score (Hessel et al., 2021): 100 times the cosine of image and prompt, or 0 if that is negative.

    Its network stays on the CPU, so that the reported memory of the sampler's device is the sampler's alone. Raises
    SettingError for weights that cannot be loaded.
    """

    def __init__(self):
        try:
            self.model, self.processor = CLIPModel.from_pretrained(CLIP), CLIPProcessor.from_pretrained(CLIP)
        except OSError as error:
            why = in_one_line(error).split(". ")[0]
            raise SettingError("clip_score", True, f"needs the weights of {CLIP} ({why}); leave it out") from error

    @torch.no_grad()
    def __call__(self, image, text):
        """Return the score of an image, uint8 (height, width, 3), and a prompt, cut to what CLIP reads."""
        found = self.model(**self.processor(text=text, images=image, return_tensors="pt", truncation=True))
        return max(0.0, 100 * float(torch.cosine_similarity(found.text_embeds, found.image_embeds)))
