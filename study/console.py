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
    """Return whether a log record, cut to a line, says for the first time that a prompt is too long."""
    record.msg, record.args = in_one_line(record.getMessage(), 400), ()
    return "truncated" in record.msg and not (record.msg in said or said.add(record.msg))


def quiet_libraries():
    """Import diffusers so that it and the libraries it uses print nothing, unless the environment says otherwise.

    Only what a pipeline says of a prompt that is too long is printed, once.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR" if "TORCH" in name else "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", str(int(not sys.stderr.isatty())))
    from diffusers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    for handler in logging.get_logger("diffusers").handlers if "DIFFUSERS_VERBOSITY" not in os.environ else ():
        handler.addFilter(is_news)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # its warnings about several LoRAs
