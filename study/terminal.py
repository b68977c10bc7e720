"""What a terminal, a pipe or a scheduler does to a run from outside."""

import contextlib
import io
import os
import signal


class Lasting:
    """A stream whose pipe or disk may fail without ending the run: what is printed after that is lost."""

    def __init__(self, stream):
        self.stream = io.StringIO() if stream is None else stream  # closed before the start

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
def terminable():
    """SIGTERM as Ctrl-C; several processes have their own way with it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
