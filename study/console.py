"""The terminal: output that survives a broken pipe, and libraries that print nothing."""

import contextlib
import io
import os
import signal
import sys
import warnings


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


class Lasting:
    """A stream whose pipe or disk may fail without ending the run; later output is lost."""

    def __init__(self, stream):
        self.stream = io.StringIO() if stream is None else stream  # it was closed before the start
        if hasattr(stream, "reconfigure"):  # a prompt may have characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def write(self, text):
        return self._lasting(self.stream.write, text)

    def flush(self):
        self._lasting(self.stream.flush)

    def _lasting(self, call, *text):
        try:
            return call(*text)
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            return len("".join(text))

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_streams():
    """A context in which standard output and error are `Lasting` streams, and SIGTERM acts as Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(Lasting(sys.stdout)))
        stack.enter_context(contextlib.redirect_stderr(Lasting(sys.stderr)))
        with contextlib.suppress(ValueError):  # not in the main thread
            before = signal.signal(signal.SIGTERM, interrupt)
            stack.callback(signal.signal, signal.SIGTERM, before or signal.SIG_DFL)
        yield
