"""The processes of `torchrun` or `accelerate launch`: how they exchange values and share work.

Each holds the whole model. Tensors and values travel by torch.distributed, which accelerate sets up; its store counts
the samples that are taken and carries why some failed. A process that fails prints its line and exits, and torchrun
ends the others.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed import HashStore, PrefixStore, rendezvous

from settings import Failure, SettingError

ENDLESS = timedelta(days=20)  # waiting for a slow process is no error; torchrun ends those that wait for a dead one


class Processes:
    """This process and the others of its launch, if there are any.

    rank, size: its number, and the number of processes. first: whether it is the one that prints and that writes the
    overview. parallel: what they share, "lanes" or "samples".

    All must call `join`, `wait`, `broadcast` and the methods that use them in the same order.
    """

    def __init__(self):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        launched = all(name in os.environ for name in names)  # some clusters set one or two of them
        self.rank, self.size, self.local_rank = (int(os.environ[name]) for name in names) if launched else (0, 1, 0)
        self.first, self.parallel, self.store = self.rank == 0, None, HashStore()

    def join(self, device, parallel):
        """Meet the others and return the device of this process, given the `device` that was asked for.

        parallel: what to share, "lanes" or "samples". Raises SettingError if there is no device for each process.
        """
        self.parallel = parallel
        if self.size == 1:
            return device
        if device.type != "cpu":
            if device != torch.device("cuda") or self.local_rank >= torch.cuda.device_count():
                remedy = "is not a device for each process; give cuda, with a process for each GPU, or cpu"
                raise SettingError("device", str(device), remedy)
            device = torch.device("cuda", self.local_rank)
        try:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = PrefixStore(f"srds/{attempt}", next(rendezvous("env://"))[0])
            self.store.set_timeout(ENDLESS)
            self.state = PartialState(cpu=device.type == "cpu", timeout=ENDLESS)
        except (RuntimeError, ValueError) as error:
            raise Failure(f"the processes of the launch cannot meet: {str(error).splitlines()[0][:160]}") from None
        return device

    @property
    def sharing(self):
        """The number of processes that share the lanes of each tick."""
        return self.size if self.parallel == "lanes" else 1

    def quiet(self):
        """A context in which only the first process prints."""
        return contextlib.redirect_stdout(sys.stdout if self.first else open(os.devnull, "w"))

    def in_turn(self):
        """A context that one process on each machine enters first, to download or create what the others then find."""
        return self.state.local_main_process_first() if self.size > 1 else contextlib.nullcontext()

    def wait(self):
        """Wait until all processes have called this."""
        if self.size > 1:
            self.state.wait_for_everyone()

    def broadcast(self, value=None):
        """Return the first process's value; those of the others are ignored."""
        return broadcast_object_list([value])[0] if self.size > 1 else value

    def deal(self, items):
        """Yield the items of a list, each in one process: the next goes to the first that asks. Once in a run."""
        while (i := self.store.add("dealt", 1) - 1) < len(items):
            yield items[i]

    def heard(self, name):
        """Return the text that was stored under a name, or None."""
        return self.store.get(name).decode() if self.store.check([name]) else None

    def split(self, denoise):
        """Return `denoise` with the lanes of a call shared out evenly among all processes; the others must `serve`."""

        def together(x, n):
            self.broadcast(n.tolist())
            return self._together(denoise, x, n)

        return together

    def _together(self, denoise, x, n):
        """Return the first process's `denoise(x, n)`, each process doing a part; the others' x is overwritten."""
        torch.distributed.broadcast(x, 0)
        most = -(-len(x) // self.size)
        mine = slice(self.rank * most, (self.rank + 1) * most)
        own, outputs = x.new_zeros(most, *x.shape[1:]), x.new_empty(self.size * most, *x.shape[1:])
        if len(n[mine]):
            own[: len(n[mine])] = denoise(x[mine], n[mine])
        torch.distributed.all_gather_single(outputs, own)
        return outputs[: len(x)]

    def served(self, iterates):
        """Yield iterates whose calls others `serve`, and tell these when there are no more.

        After an error in a call it tells nothing, as the others are waiting in that call.
        """
        with contextlib.suppress(GeneratorExit):  # the loop was left
            yield from iterates
        self.broadcast([])

    def serve(self, loop):
        """Do this process's part of the first one's calls, for a `models.loop.Loop`, until it has no more."""
        with contextlib.closing(loop):
            while n := self.broadcast():
                x = loop.x.new_empty(len(n), *loop.x.shape[1:])
                self._together(loop.denoise, x, torch.tensor(n, device="cpu"))

    def close(self):
        """Leave the group, once all processes have called this."""
        if self.size > 1:
            self.wait()
            sys.stdout.flush()
            self.state.destroy_process_group()
