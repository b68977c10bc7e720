"""The processes of `accelerate launch` or `torchrun`: what they tell each other, share out, and how they end together.

Each holds the whole model. Tensors travel by torch.distributed, which accelerate sets up; counters, short texts and the
line with which a failed run ends go through its store. A process alone needs none of it.
"""

import contextlib
import hashlib
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

import torch
from accelerate import PartialState
from torch.distributed import PrefixStore, rendezvous

from settings import Failure, SettingError, in_one_line

SILENCE = 30.0  # seconds without a sign of life after which a process counts as dead
START = 600.0  # the same before its first sign: it may be importing from a slow disk
ENDLESS = timedelta(days=20)  # all that waits does so for slow processes, as the watch finds dead ones; below 2^31 ms


class ProcessError(Failure):
    """Another process that cannot be reached, in one line."""

    def __init__(self, cause=None):
        why = f" ({in_one_line(cause).split('. ')[0][:160]})" if cause else ""
        super().__init__(
            f"another process of the run has died, or the launcher has ended it{why}; --resume keeps what is complete"
        )


def launched():
    """Whether a launcher started this process; some clusters set the one or other variable of themselves."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def place():
    """Rank, size and local rank of this process, as its launcher says. Raises Failure where that cannot be."""
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, size, local_rank = map(int, found.values())
    except ValueError:
        rank, size, local_rank = -1, 0, 0
    if not 0 <= rank < size or local_rank < 0:
        said = ", ".join(f"{name}={value[:20]!r}" for name, value in found.items())
        raise Failure(f"there can be no such processes: {said}; launch by torchrun, or unset these variables", 2)
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise Failure("MASTER_ADDR or MASTER_PORT, where processes meet, is not set; launch by torchrun", 2)
    return rank, size, local_rank


class Processes:
    """This process, and the others of its launch if it has any. To be made once, in the main thread.

    rank, size: its number, and how many there are. first: whether it is the one that prints, and writes the record of
    the whole run. parallel: what they share, "lanes" or "prompts". broken: whether something failed on this process in
    the middle of a tick, in which the others now wait. closed: whether all have come to their end.

    All but `count`, `take`, `tell`, `told` and `end` must be called by all processes, in the same order. Raises
    ProcessError, at any call, where another process cannot be reached.
    """

    def __init__(self):
        self.rank, self.size, self.local_rank = place() if launched() else (0, 1, 0)
        self.first, self.parallel, self.broken, self.closed = self.rank == 0, None, False, False
        self.broadcasts, self.waits, self.counters, self.values = 0, 0, Counter(), {}
        if self.size > 1:
            # Python's handlers wait until the main thread is back from a collective; this wakes the watch at once.
            self.signals, self.wake = socket.socketpair()
            self.wake.setblocking(False)
            signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, lambda *_: None)

            self.waiting = threading.Timer(10.0, self._say_what_for)
            self.waiting.daemon = True
            self.waiting.start()
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            try:
                self.store = PrefixStore(f"srds/{attempt}", next(rendezvous("env://"))[0])
            except (RuntimeError, ValueError) as error:
                why = in_one_line(error).split(". ")[0][:160]
                raise Failure(f"the processes of the launch cannot meet at {self._where} ({why})") from None
            self.store.set_timeout(ENDLESS)
            # A connection of its own, as one that waits for a key serves nothing else.
            self.watch = threading.Thread(target=self._watch, args=(self.store.clone(),), daemon=True)
            self.watch.start()

    @property
    def _where(self):
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"

    def _say_what_for(self):
        print(f"process {self.rank} waits at {self._where} for all {self.size} of the launch", file=sys.stderr)

    @property
    def sharing(self):
        """How many processes share the lanes of each tick."""
        return self.size if self.parallel == "lanes" else 1

    def check_alike(self, known):
        """Raise Failure unless all processes are there and have the same settings `known`, as machines may differ."""
        # What accelerate leaves where it was asked for several processes, but knows no launcher for them here.
        if not launched() and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
            raise Failure(
                "accelerate launch has started one process, not several; give it --multi_gpu as well, or use torchrun "
                "(or, if one was meant, unset MASTER_ADDR)",
                status=2,
            )
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        self.wait()
        if self.size > 1:
            self.waiting.cancel()
        if self.broadcast(digest) != digest:
            raise Failure(
                f"argument --prompts/-p: process {self.rank} of the launch has other prompts or settings than the "
                "first; give all the same",
                status=2,
            )

    def own_device(self, device):
        """The device of this process, where `device` is that of the command: of several processes each has its GPU."""
        kind, asked = device.type, str(device)
        if self.broadcast(kind) != kind:
            remedy = "is what this machine has, but not what the first process has; name one that all have"
            raise SettingError("device", asked, remedy)
        if self.size == 1 or kind == "cpu":
            return device
        if device.index is not None or kind == "mps":
            raise SettingError("device", asked, "is one device for several processes; give cuda or cpu")
        if self.local_rank >= torch.cuda.device_count():
            remedy = f"has {torch.cuda.device_count()} GPUs on a machine, fewer than processes; launch one a GPU"
            raise SettingError("device", asked, remedy)
        return torch.device(kind, self.local_rank)

    def join(self, cpu, parallel):
        """Set up torch.distributed, with gloo on the CPU or nccl on GPUs, to share "lanes" or "prompts"."""
        if self.size > 1:
            self.parallel = parallel
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

    def broadcast(self, value=None):
        """The first process's value, anything that JSON can write; the others' own is not looked at."""
        if self.size == 1:
            return value
        self.broadcasts += 1
        key = f"broadcast/{self.broadcasts}"
        with _reaching():
            if self.first:
                self.store.set(key, json.dumps(value))
                return value
            return json.loads(self.store.get(key))

    def agree(self, value):
        """The first process's value where lanes are shared, as in `broadcast`; this process's own elsewhere."""
        return value if self.sharing == 1 else self.broadcast(value)

    def call(self, value):
        """Have the others, which share lanes, begin what the value names; returns when they are ready.

        From here to the first iterate of `in_step` they wait for this process, so it counts as broken.
        """
        self.broken = True
        self.broadcast(value)
        self.wait()

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

    def tell(self, name, value):
        """Leave a value, anything that JSON can write, under a name for whichever process asks."""
        if self.size == 1:
            self.values[name] = value
            return
        with _reaching():
            self.store.set(f"told/{name}", json.dumps(value))

    def told(self, name):
        """What was left under a name; None where nothing was."""
        if self.size == 1:
            return self.values.get(name)
        with _reaching():
            return json.loads(self.store.get(f"told/{name}")) if self.store.check([f"told/{name}"]) else None

    def split(self, denoise):
        """`denoise` with the lanes of a call dealt out evenly, if they are shared; all get the outputs of all."""
        if self.sharing == 1:
            return denoise

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
        """The iterates, as many on every process that shares lanes as the first takes before it leaves its loop."""
        if self.sharing == 1:
            yield from iterates
            return
        self.broken = True
        for iterate in iterates:
            self.broken = False
            try:
                yield iterate
            except GeneratorExit:  # the loop was left
                self.broadcast(False)
                raise
            if not self.broadcast(True):
                break
            self.broken = True
        self.broken = False

    def close(self):
        """End well: once all processes have come here."""
        self.closed = True
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


def wait_until(seen, seconds=90):
    """Whether something is seen before so many seconds are over; network file systems show changes late."""
    limit = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < limit:
        time.sleep(0.5)
    return found


@contextlib.contextmanager
def _reaching():
    """Torch's errors of the processes or the store of a launch as ProcessError."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise ProcessError(error) from error
