"""The processes of `accelerate launch` or `torchrun`: what they tell each other, share out, and how they end together.

Each holds the whole model. Tensors travel by torch.distributed, which accelerate sets up; counters, short texts and the
line with which a failed run ends go through its store. A process alone needs none of it.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from datetime import timedelta

SILENCE = 30.0  # seconds without a sign of life after which a process counts as dead
START = 600.0  # the same before its first sign: it may be importing from a slow disk
ENDLESS = timedelta(days=20)  # all that waits does so for slow processes, as the watch finds dead ones; below 2^31 ms


class ProcessError(Exception):
    """Another process that cannot be reached, in one line."""

    def __init__(self, cause=None):
        why = f" ({str(cause).splitlines()[0].split('. ')[0][:160]})" if cause else ""
        super().__init__(
            f"another process of the run has died, or the launcher has ended it{why}; --resume keeps what is complete"
        )


class Processes:
    """This process, and the others of its launch if it has any. To be made once, in the main thread.

    rank, size: its number, and how many there are. first: whether it is the one that prints, and writes what is of the
    whole run. broken: whether something failed on this process in the middle of a tick, in which the others now wait.

    All but `count`, `take` and `end` must be called by all processes, in the same order. Raises ProcessError, at any
    call, where another process cannot be reached.
    """

    def __init__(self):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        launched = all(name in os.environ for name in names)  # some clusters set the one or other of themselves
        self.rank, self.size, self.local_rank = (int(os.environ[name]) for name in names) if launched else (0, 1, 0)
        self.first, self.broken, self.told, self.waits, self.counters = self.rank == 0, False, 0, 0, Counter()
        # What accelerate leaves where it was asked for several processes, but knows no launcher for them here.
        self.missing = not launched and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
        if self.size > 1:
            # Python's handlers wait until the main thread is back from a collective; this wakes the watch at once.
            self.signals, self.wake = socket.socketpair()
            self.wake.setblocking(False)
            signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, lambda *_: None)

            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or it tells of a lost store in hundreds of lines
            from torch.distributed import PrefixStore, rendezvous

            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = PrefixStore(f"srds/{attempt}", next(rendezvous("env://"))[0])
            self.store.set_timeout(ENDLESS)
            # A connection of its own, as one that waits for a key serves nothing else.
            self.watch = threading.Thread(target=self._watch, args=(self.store.clone(),), daemon=True)
            self.watch.start()

    def join(self, cpu):
        """Set up torch.distributed, with gloo on the CPU or nccl on GPUs of which each process has its own."""
        if self.size > 1:
            from accelerate import PartialState

            # Torch's own way with a lost peer is to abort without a word; here the watch ends the run.
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
            self.state = PartialState(cpu=cpu, timeout=ENDLESS)

    @contextlib.contextmanager
    def quiet(self):
        """Only the first process prints in here."""
        with contextlib.ExitStack() as stack:
            if not self.first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    @contextlib.contextmanager
    def in_turn(self):
        """Let one process a machine through first, then the others: it downloads, they find what it has."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def wait(self):
        """Wait until all processes have come here."""
        if self.size > 1:
            self.waits += 1
            with _reaching():  # by the store, as a barrier of torch's keeps idle GPUs busy
                if self.store.add(f"here/{self.waits}", 1) == self.size:
                    self.store.set(f"all/{self.waits}", "")
                self.store.wait([f"all/{self.waits}"])

    def tell(self, value=None):
        """The first process's value, anything that JSON can write."""
        if self.size == 1:
            return value
        self.told += 1
        with _reaching():
            if self.first:
                self.store.set(f"told/{self.told}", json.dumps(value))
                return value
            return json.loads(self.store.get(f"told/{self.told}"))

    def take(self, items):
        """The items of a list, each to one process: the next to the one that asks first. Once in a run."""
        while (i := self.count("taken") - 1) < len(items):
            yield items[i]

    def count(self, name, by=1):
        """A counter of all processes, after adding to it."""
        if self.size == 1:
            self.counters[name] += by
            return self.counters[name]
        with _reaching():
            return self.store.add(name, by)

    def split(self, denoise):
        """`denoise` with the lanes of a call dealt out evenly; every process gets the outputs of all."""
        import torch

        def together(x, n):
            most = -(-len(x) // self.size)
            mine = slice(self.rank * most, (self.rank + 1) * most)
            own, outputs = x.new_zeros(most, *x.shape[1:]), x.new_empty(self.size * most, *x.shape[1:])
            if len(n[mine]):
                own[: len(n[mine])] = denoise(x[mine], n[mine])
            with _reaching():
                torch.distributed.all_gather_single(outputs, own)
            return outputs[: len(x)]

        return together

    def in_step(self, iterates):
        """The iterates, as many on every process as the first one takes before it leaves its loop."""
        self.broken = True
        for iterate in iterates:
            self.broken = False
            try:
                yield iterate
            except GeneratorExit:  # the loop was left
                self.tell(False)
                raise
            if not self.tell(True):
                break
            self.broken = True
        self.broken = False

    def close(self):
        """End well: once all processes have come here."""
        if self.size > 1:
            self.wait()
            self.stop_watching()
            self.count("closed")
            while self.first and self.count("closed", 0) < self.size:  # the store may be in this process
                time.sleep(0.01)
            self.state.destroy_process_group()

    def stop_watching(self):
        """From here on, this process may end without the others taking it for dead."""
        if self.size > 1:
            self.wake.send(b"\0")  # which no signal is
            self.watch.join()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end(self, message, status):
        """End badly: print one line on the first process, whichever failed, and return the exit status.

        Of several processes none returns from here.
        """
        message = "main.py: error: " + " ".join(str(message).split())
        if self.size == 1:
            print(message, file=sys.stderr)
            return status
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending
        with contextlib.suppress(RuntimeError):  # no store, and the watch will see it
            self.store.compare_set("end", "", json.dumps([message, status]))
        self.watch.join()
        os._exit(status)

    def _watch(self, store):
        """A thread: shows the others that this process lives, and ends it when one of them fails or falls silent."""
        signs = {rank: (0, time.monotonic() + START) for rank in (range(1, self.size) if self.first else [0])}
        lost = json.dumps([f"main.py: error: {ProcessError()}", 1])
        try:
            while True:
                woken = select.select([self.signals], [], [], 1.0)[0] and self.signals.recv(64)
                if woken and 0 in woken:
                    return
                store.add(f"sign/{self.rank}", 1)
                for rank, (sign, limit) in signs.items():
                    now = store.add(f"sign/{rank}", 0)
                    if now != sign:
                        signs[rank] = now, time.monotonic() + SILENCE
                    elif time.monotonic() > limit:
                        store.compare_set("end", "", lost)
                if woken and signal.SIGTERM in woken:
                    store.compare_set("end", "", lost)
                if store.check(["end"]):
                    message, status = json.loads(store.get("end"))
                    break
        except RuntimeError:  # the store is gone, and with it the launcher or the first process
            message, status = json.loads(lost)
        if self._speaks(store):
            print(message, file=sys.__stderr__, flush=True)
            with contextlib.suppress(RuntimeError):
                store.set("said", "")
            time.sleep(2)  # the others look once a second, and the store may end with this process
        os._exit(status)

    def _speaks(self, store):
        """Whether this process is to print why the run ends: the first one, or another where that is dead.

        Others wait here until it is printed, as the launcher, seeing a process end, may kill those that have not.
        """
        try:
            if not self.first:
                with contextlib.suppress(RuntimeError):
                    store.wait(["said"], timedelta(seconds=5))
                    return False
            return store.add("speakers", 1) == 1
        except RuntimeError:  # there is no store: one a machine
            return self.local_rank == 0


@contextlib.contextmanager
def _reaching():
    """Torch's errors of the processes or the store of a launch as ProcessError."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise ProcessError(error) from error
