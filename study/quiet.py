"""The libraries' own messages: the command says what matters of them in one line of its own."""

import sys
import warnings

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def quiet_libraries():
    """Silence diffusers, transformers and huggingface_hub in this process, and their bars where nobody watches."""
    for logging in (hub_logging, transformers_logging, diffusers_logging):
        logging.set_verbosity(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # of several LoRAs
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
