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
    """Import diffusers so that it and the libraries it uses print nothing, unless the environment says otherwise."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR" if "TORCH" in name else "critical")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # its warnings about several LoRAs
