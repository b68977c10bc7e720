"""The terminal: what it cannot show, and libraries that print nothing."""

import os
import signal
import sys
import warnings


def prepare_terminal():
    """Have output escaped where the terminal cannot show it, and SIGTERM act as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # if closed
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)


def quiet_libraries():
    """Silence diffusers, transformers and huggingface_hub, and their progress bars if stderr is no terminal."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    for logging in (hub_logging, transformers_logging, diffusers_logging):
        logging.set_verbosity(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # its warnings about several LoRAs
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
