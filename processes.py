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
ENDLESS = timedelta(days=365)  # collectives wait for slow processes; dead ones are found otherwise


class ProcessError(Exception):
    """Another process that cannot be reached, in one line."""

    def __init__(self):
        super().__init__(
            "another process of the run has died, or the launcher has ended it; --resume keeps what is complete"
        )


class Processes:
    """This process, and the others of its launch if it has any.

    rank, size: its number, and how many there are. first: whether it is the one that prints and writes.
    """

    def __init__(self):
        launched = "LOCAL_RANK" in os.environ  # some clusters set WORLD_SIZE for processes that no launcher started
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        self.rank, self.size, self.local_rank = (int(os.environ[name]) for name in names) if launched else (0, 1, 0)
        self.first, self.told, self.counters = self.rank == 0, 0, Counter()
        if self.size > 1:
            # Python's handlers wait until the main thread is back from a collective; this wakes the watch at once.
            self.signals, self.wake = socket.socketpair()
            self.wake.setblocking(False)
            signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, lambda *_: None)

            from torch.distributed import PrefixStore, rendezvous

            self.store = PrefixStore("srds", next(rendezvous("env://"))[0])
            self.store.set_timeout(ENDLESS)
            self.watch = threading.Thread(target=self._watch, args=(self.store.clone(),), daemon=True)
            self.watch.start()

    def join(self, cpu):
        """Set up torch.distributed, with gloo on the CPU or nccl on GPUs of which each process has its own."""
        if self.size > 1:
            from accelerate import PartialState

            with _reaching():
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
            with _reaching():
                self.state.wait_for_everyone()

    def tell(self, value=None):
        """The first process's value, anything that JSON can write. All processes call this, in the same order."""
        if self.size == 1:
            return value
        self.told += 1
        with _reaching():
            if self.first:
                self.store.set(f"told/{self.told}", json.dumps(value))
            return json.loads(self.store.get(f"told/{self.told}"))

    def take(self, numbers):
        """The numbers, each to one process: the next to the one that asks first."""
        while (i := self.count("taken") - 1) < len(numbers):
            yield numbers[i]

    def count(self, name, by=1):
        """A counter of all processes, after adding to it."""
        if self.size == 1:
            self.counters[name] += by
            return self.counters[name]
        with _reaching():
            return self.store.add(name, by)

    def split(self, denoise):
        """`denoise` with the lanes of a call dealt out evenly; every process gets the outputs of all."""
        if self.size == 1:
            return denoise
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
        for iterate in iterates:
            more = False
            try:
                yield iterate
                more = True
            finally:
                more = self.tell(more)
            if not more:
                break

    def close(self):
        """End well: once all processes have come here."""
        if self.size > 1:
            self.wait()
            self.wake.send(b"\0")
            self.watch.join()
            self.state.destroy_process_group()

    def end(self, message, status):
        """End badly: print one line on the first process, whichever failed, and return the exit status.

        Of several processes none returns from here.
        """
        message = "main.py: error: " + " ".join(str(message).split())
        if self.size == 1:
            print(message, file=sys.stderr)
            return status
        with contextlib.suppress(RuntimeError):  # no store, and the watch will see it
            self.store.compare_set("end", "", json.dumps([message, status]))
        self.watch.join()
        os._exit(status)

    def _watch(self, store):
        """A thread: shows the others that this process lives, and ends it when one of them fails or falls silent."""
        signs = {rank: (0, time.monotonic()) for rank in (range(1, self.size) if self.first else [0])}
        lost = json.dumps([f"main.py: error: {ProcessError()}", 1])
        try:
            while True:
                woken = select.select([self.signals], [], [], 1.0)[0] and self.signals.recv(64)
                if woken and 0 in woken:
                    return
                store.add(f"sign/{self.rank}", 1)
                for rank, (sign, since) in signs.items():
                    now = store.add(f"sign/{rank}", 0)
                    if now != sign:
                        signs[rank] = now, time.monotonic()
                    elif time.monotonic() - since > SILENCE:
                        store.compare_set("end", "", lost)
                if woken and signal.SIGTERM in woken:
                    store.compare_set("end", "", lost)
                if store.check(["end"]):
                    message, status = json.loads(store.get("end"))
                    break
        except RuntimeError:  # the store is gone, and with it the launcher or the first process
            message, status = json.loads(lost)
        if self.first or not self._heard(store):
            print(message, file=sys.__stderr__, flush=True)
        with contextlib.suppress(RuntimeError):
            store.set("said", "")
        os._exit(status)

    def _heard(self, store):
        """Whether another process prints why the run ends: the first one, or where it is dead the one that asks first.

        It returns when that is done, as the launcher, seeing a process end, may kill the others.
        """
        try:
            with contextlib.suppress(RuntimeError):
                store.wait(["said"], timedelta(seconds=5))
                return True
            return store.add("speakers", 1) > 1
        except RuntimeError:  # there is no store: one a machine
            return self.local_rank > 0


@contextlib.contextmanager
def _reaching():
    """Torch's errors of the processes or the store of a launch as ProcessError."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError from error
