"""The terminal: what it cannot show, and libraries that print nothing."""

import os
import signal
import sys
import warnings

from settings import in_one_line

said = set()


def prepare_terminal():
    """Have output escaped where the terminal cannot show it, and SIGTERM act as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # if closed
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)


def is_news(record):
    """Cut a log record to one line; return whether it is a new warning that a prompt is too long."""
    record.msg, record.args = in_one_line(record.getMessage(), 400), ()
    news = "truncated" in record.msg and record.msg not in said
    said.add(record.msg)
    return news


def quiet_libraries():
    """Import diffusers so that it and the libraries it uses print nothing, unless the environment says otherwise.

    A pipeline's warning that a prompt is too long is printed, once.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR" if "TORCH" in name else "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", str(int(not sys.stderr.isatty())))
    from diffusers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if "DIFFUSERS_VERBOSITY" not in os.environ:
        for handler in logging.get_logger("diffusers").handlers:
            handler.addFilter(is_news)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # its warnings about several LoRAs
