"""Any diffusers pipeline as a function of states and steps, without a line for its family.

A parallel sampler acts between network calls, so all that it needs of a pipeline is the loop over its steps, turned
inside out. A thread runs the pipeline's own call on a copy of the pipeline, which shares all parts with it, but hands
out each call of a network and each step of the scheduler, and waits for the answer.

1. Look. The loop runs once, with networks answering at each step what they said at the first. It shows the first
   state, the grid that the pipeline has set, what networks are told at each step, and that nothing else depends on it.
2. Run. The loop runs with W copies of the sample, which stand for L <= W states, each at a step of its own. Networks
   get the rows of these L states, and are told the times of their steps.
3. Decode. The loop runs once more, with a last state handed in, so that the pipeline decodes it in its own way.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import queue
import threading
from typing import NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from tqdm import tqdm

from diffusion import on
from settings import Failure, in_one_line, out_of_memory

BEGINNING = threading.Lock()  # before the loop, as a tokenizer's padding is shared by all threads
ROUNDING = 0.02  # of the largest number: by how much a copy's encoding may differ from one sample's
COPIES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size")


class Refused(Failure):
    """A pipeline that cannot be sampled in parallel, or that refuses its arguments, in one line."""


class Left(BaseException):
    """Raised in a pipeline's call that nobody waits for any more."""


def events(pipeline, scheduler, steps, encoded, seed, threads, arguments):
    """Call a pipeline, and yield what its loop asks for, to be answered by `send`; returns what the call returns.

    ("network", name, module, args, kwargs): a call of a network. ("step", output, states, time): a step of the
    scheduler. scheduler: one of our own, which is used and changed. steps: a function that is given the scheduler's
    timesteps, and its sigmas, once they are set, and returns those to go through. encoded: what networks have said
    before the loop, by what they were told; new ones are added. seed: for draws without a generator. threads:
    torch's; None: as now.
    """
    asked, answers, twin, looping = queue.SimpleQueue(), queue.SimpleQueue(), copy.copy(pipeline), False
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    beginning, most = contextlib.ExitStack(), torch.get_num_threads()
    # Pipelines read from these the scale of a LoRA in their text encoders.
    scales = repr({name: value for name, value in arguments.items() if name.endswith("attention_kwargs")})

    def ask(*event):
        asked.put(event)
        answer = answers.get()
        if answer is Left:
            raise Left
        return answer

    def call(name, module, *args, **kwargs):
        if looping:
            return ask("network", name, module, args, kwargs)
        told = name, scales, *map(content, tree_flatten((args, kwargs))[0])
        if told not in encoded:
            encoded[told] = module(*args, **kwargs)
        return copy.copy(encoded[told])  # as the pipeline may change a list of features

    def step(model_output, timestep, sample, *_, return_dict=True, **__):
        states = ask("step", model_output, sample, timestep)
        if hasattr(scheduler, "_step_index"):  # a pipeline that inpaints asks for noise of the next step
            begun = scheduler.begin_index or 0 if scheduler.step_index is None else scheduler.step_index
            scheduler._step_index = begun + 1
        return SchedulerOutput(prev_sample=states) if return_dict else (states,)

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args, **kwargs):
        type(scheduler).set_timesteps(scheduler, *args, **kwargs)
        for name in {"timesteps", "sigmas"} & vars(scheduler).keys():
            setattr(scheduler, name, steps(getattr(scheduler, name)))

    def progress_bar(iterable=None, total=None):
        nonlocal looping
        looping = True
        beginning.close()
        return tqdm(iterable, total=total, disable=True)

    def run():
        try:
            with torch.cuda.device(device), beginning:
                torch.get_num_threads()  # a thread's first query resets its number to the shared one, so before setting
                torch.set_num_threads(threads or most)
                asked.put("begun")
                beginning.enter_context(BEGINNING)
                beginning.enter_context(torch.random.fork_rng([device] * (device >= 0)))
                torch.manual_seed(seed)  # for what is drawn without the generator
                asked.put(("end", twin(**arguments)))
        except BaseException as error:
            asked.put(("error", error))

    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            vars(twin)[name] = own = copy.copy(part)
            vars(own)["_compiled_call_impl"] = functools.partial(call, name, part)  # which a module's call prefers
    # Perturbed-attention guidance sets processors of its own in the parts that all calls share.
    shared = pipeline.components.values() if hasattr(pipeline, "set_pag_applied_layers") else ()
    attention = {part: part.attn_processors for part in shared if hasattr(part, "attn_processors")}
    vars(twin).update(scheduler=scheduler, progress_bar=progress_bar, maybe_free_model_hooks=lambda: None)
    vars(scheduler).update(step=step, set_timesteps=set_timesteps)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        asked.get()
        torch.set_num_threads(most)  # as new threads inherit the number set last
        while (event := asked.get())[0] in ("network", "step"):
            answers.put((yield event))
        if event[0] == "error":
            raise event[1]
        return event[1]
    finally:
        answers.put(Left)
        thread.join()
        for part, processors in attention.items():
            part.set_attn_processor(processors)


def content(value):
    """Return what an argument of an encoder is known by: a tensor's content."""
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return value.dtype, value.shape, value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return repr(value)


def is_list(value):
    """Return whether a value is a list of tensors or of image sizes: one for each sample, or each layer."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    sizes = all(isinstance(each, (list, tuple)) for each in value)
    tensors = [isinstance(each, torch.Tensor) for each in (tree_flatten(value)[0] if sizes else value)]
    return not any(tensors) if sizes else all(tensors)


flatten = functools.partial(tree_flatten, is_leaf=is_list)


def same(one, other, off=0.0):
    """Return whether two values are equal. Tensors without values are, if they have one shape.

    off: by how much floating-point numbers may differ, as a share of the largest.
    """
    if one is other:
        return True
    if is_list(one):
        return is_list(other) and len(one) == len(other) and all(same(*each, off) for each in zip(one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.is_meta:
            return one.shape == other.shape
        one, other = one.nan_to_num(), other.nan_to_num()
        close = off and one.is_floating_point() and (one - other).abs().max() <= off * other.abs().max()
        return bool(close or torch.equal(one, other))
    return type(one) is type(other) and one == other


def rows(answer, told):
    """Return how many samples a network has answered for, and whether with a list of them, like one it was given.

    told: the leaves of its arguments.
    """
    last = flatten(answer)[0][-1]
    given = [value for value in told if is_list(value) and isinstance(value[0], torch.Tensor)]
    listed = isinstance(last, list) and any(len(value) == len(last) for value in given)
    return len(last[-1] if is_list(last) and not listed else last), listed


def by_copies(value, before, rows, copies):
    """Return a tensor of copies of a sample as (rows, copies, ...). before: that of one sample, with `rows` or more.

    A network sees rows x copies samples, so what is more than one row of a sample, such as those of a video's frames,
    lies together.
    """
    rows = rows if len(before) % rows == 0 else len(before)
    return value.unflatten(0, (rows, copies, -1))


class Told(NamedTuple):
    """What a network is told at step 0, the leaves of a tree; and, by place, the leaves that change, at each step."""

    name: str
    first: list
    changing: dict


class Loop:
    """The loop of a pipeline's call, for one prompt and seed, as a function of states and steps.

    x: the first state, float32 (1, ...). N: the number of steps. looked: the scheduler as the pipeline has set it.
    rows: the samples in a call of each network for one state. calls: how many calls of networks `denoise` has made.
    """

    def __init__(self, pipeline, scheduler, arguments, seed, encoded, max_batch=None, answers=()):
        """arguments: those of the pipeline's call. encoded: see `events`.

        max_batch: most network samples in one call, though at least those of one state; None for no limit. The
        attribute `sizes` may be set to the sizes that a call may have, rising: each is then filled up with copies.
        `widest` may be set to the most states expected, so that the pipeline's call need not begin again for more.
        answers: what the networks said at step 0 of another prompt; without them, each is called once to look.

        Raises Refused, naming the step, if more depends on the step than what the networks are told of it.
        """
        self.pipeline, self.template, self.arguments, self.seed = pipeline, scheduler, arguments, seed
        self.kind = f"the {type(pipeline).__name__}"
        self.encoded, self.max_batch, self.sizes, self.answers = encoded, max_batch, (), [*answers]
        self.width, self.widest, self.calls, self.running = 1, 1, 0, None
        known = inspect.signature(type(pipeline).__call__).parameters
        self.copies = next((name for name in COPIES if name in known), None)
        try:
            self._look()
        except (AttributeError, TypeError, ValueError) as error:  # of the pipeline's own checks
            raise Refused(f"{self.kind} cannot be called like this: {in_one_line(error)}", status=2) from error

    def _events(self, steps, copies=1, scheduler=None, threads=None, **more):
        generators = [torch.Generator("cpu").manual_seed(self.seed) for _ in range(copies)]
        arguments = self.arguments | {"generator": generators[0]} | more
        if copies > 1:  # a generator each, so that a call draws the same for all
            arguments |= {self.copies: copies, "generator": generators}
            if isinstance(arguments.get("latents"), torch.Tensor):
                arguments["latents"] = arguments["latents"].repeat_interleave(copies, 0)
        scheduler = scheduler or copy.copy(self.template)
        return events(self.pipeline, scheduler, steps, self.encoded, self.seed, threads, arguments)

    # Look

    @torch.no_grad()
    def _look(self):
        new, seen, times, calls, answer, self.looked = not self.answers, [], [], [], None, copy.copy(self.template)
        with contextlib.closing(self._events(lambda steps: steps, scheduler=self.looked, output_type="latent")) as loop:
            with contextlib.suppress(StopIteration):
                while True:
                    kind, *event = loop.send(answer)
                    if kind == "network":
                        name, module, args, kwargs = event
                        leaves, tree = flatten((dict(enumerate(args)), kwargs))
                        calls.append((name, [type(leaf)(leaf) if is_list(leaf) else leaf for leaf in leaves], tree))
                        if new and not seen:  # afterwards, as a UNet takes an adapter's features out of their list
                            with torch.compiler.set_stance("force_eager"):  # as the loop has times in another shape
                                self.answers.append(module(*args, **kwargs))
                        self._expect(len(calls) <= len(self.answers), "calls other networks", len(seen))
                        answer = copy.copy(self.answers[len(calls) - 1])
                    else:
                        (output, state, time), seen, calls = event, [*seen, calls], []
                        answer = state.to(torch.promote_types(state.dtype, output.dtype))  # as schedulers do
                        times.append(torch.as_tensor(time, device=answer.device))
                        if len(seen) == 1:
                            guided, first = output, answer.clone()
                        self._expect(len(seen[-1]) == len(seen[0]), "calls other networks", len(seen) - 1)
                        self._expect(same(output, guided), "guides differently", len(seen) - 1)
                        self._expect(same(answer, first), "has changed the states", len(seen) - 1)
        if not seen:
            raise Refused(f"{self.kind} takes no step with these arguments, or none that can be followed", status=2)
        end = self.looked.timesteps[-len(seen) :].to(times[0])
        self._expect(same(torch.stack(times), end), "ends before the last of its timesteps", len(seen) - 1)
        if len(first) != 1:
            raise Refused(f"{self.kind} takes its steps with {len(first)} samples, not one")
        self.x, self.dtype, self.N = first.float(), first.dtype, len(seen)
        self.told = [self._compared(calls) for calls in zip(*seen)]
        self.rows, self.listed = zip(*(rows(answer, told.first) for answer, told in zip(self.answers, self.told)))

    def _expect(self, condition, what, step):
        if not condition:
            raise Refused(f"{self.kind} {what} at step {step}; its steps can only be taken in order")

    def _compared(self, calls):
        """Return the `Told` of a network, given its calls, one a step: name, leaves and their tree."""
        (name, first, tree), changing = calls[0], {}
        for i, call in enumerate(calls):
            self._expect(call[0] == name and call[2] == tree, f"calls {name} differently", i)
        for j, values in enumerate(zip(*(leaves for _, leaves, _ in calls))):
            other = [i for i, value in enumerate(values) if not same(value, values[0])]
            if other:
                kinds = (torch.Tensor, int, float)
                self._expect(isinstance(values[0], kinds), f"tells {name} another {type(values[0]).__name__}", other[0])
                if isinstance(values[0], torch.Tensor):  # a network moves one time to its device, and not several
                    values = torch.stack([value.reshape(value.shape or (1,)) for value in values]).to(self.x.device)
                changing[j] = values
        return Told(name, first, changing)

    # Run

    @torch.no_grad()
    def denoise(self, x, n):
        """Return guided outputs, float32 (L, ...), for L states x, float32, at steps n, int64 (L,) on the CPU."""
        if len(x) > 1 and not self.copies:  # the pipeline makes one sample a call
            return torch.cat([self.denoise(*lane) for lane in zip(x.split(1), n.split(1))])
        try:
            if len(x) > self.width or not self.running:  # of two copies at least, the rows of each can be told
                most = max(len(x), self.widest if self.copies else 1)
                self._start(max(2 ** (most - 1).bit_length(), 2 if self.sizes and self.copies else 1))
            if len(x) > self.width:  # the pipeline turned out to make one sample a call
                return self.denoise(x, n)
            states = torch.cat([x, x[-1:].expand(self.width - len(x), *x.shape[1:])]).to(self.dtype)
            try:
                event = self.running.send(states)
            except StopIteration:  # the loop has been through its steps
                self._start(self.width)
                event = self.running.send(states)
            for c in range(len(self.told)):
                event = self.running.send(self._answer(c, n.tolist(), *event[1:]))
            return event[1][: len(x)].to(torch.float32, copy=True)
        except BaseException:
            self.close()
            raise

    def close(self):
        """End the call that `denoise` has begun; the next one begins another."""
        if self.running:
            self.running.close()
        self.running, self.width = None, 1

    def _start(self, width):
        """Begin a call with so many copies, and go to its first step; its networks are not called.

        If the copies differ from one sample, states are denoised one by one, in a call with one copy.
        """
        self.close()
        self.width = width
        # One torch thread, or two thread pools would compete at each call of a network on the CPU.
        again = (lambda steps: steps[-1:].repeat(100 * len(steps))) if self.N == 1 else lambda steps: steps.repeat(3)
        self.running = self._events(again, width, threads=1, output_type="latent")
        try:
            event, alike = next(self.running), True
            for begun in (False, True):  # the look's states are used from the second step on
                for c, told in enumerate(self.told):
                    alike = alike and (not begun or self._alike(c, told, *event[3:]))
                    event = self.running.send(self._joined([self.answers[c]], c, [(1, 1)]))
                alike = alike and len(event[2]) == width
                if not begun:
                    event = self.running.send(self.x.to(self.dtype).expand(width, *self.x.shape[1:]))
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # as of a list of generators
            if width == 1 or out_of_memory(error):
                raise
            alike = False
        if not alike:
            if width == 1:
                raise Refused(f"{self.kind} differs between calls with the same seed")
            self.copies = None
            self._start(1)

    def _alike(self, c, told, args, kwargs):
        """Return whether network c is told the same of the first and the last copy as it was of one sample."""
        leaves, _ = flatten((dict(enumerate(args)), kwargs))
        pairs = [pair for j, pair in enumerate(zip(leaves, told.first, strict=True)) if j not in told.changing]
        lanes = {0, self.width - 1}
        return all(same(self._cut(*pair, [lane], self.rows[c]), pair[1], ROUNDING) for lane in lanes for pair in pairs)

    def _answer(self, c, n, name, module, args, kwargs):
        """Return what a network says of the first len(n) copies, at steps n, and anything for the rest."""
        (_, first, changing), rows = self.told[c], self.rows[c]
        leaves, tree = flatten((dict(enumerate(args)), kwargs))
        sizes = [max(1, size // rows) for size in self.sizes] if self.copies else []
        most = sizes[-1] if sizes else max(1, self.max_batch // rows) if self.max_batch else len(n)
        numbers = [values for values in changing.values() if not isinstance(values, torch.Tensor)]
        outputs, counts = [], []
        for _, run in itertools.groupby(range(len(n)), lambda i: [values[n[i]] for values in numbers]):
            run = [*run]
            for lanes in (run[i : i + most] for i in range(0, len(run), most)):
                size = next((size for size in sizes if size >= len(lanes)), len(lanes))
                filled = [*lanes, *lanes[-1:] * (size - len(lanes))]
                told = [self._cut(value, before, filled, rows) for value, before in zip(leaves, first)]
                for j, values in changing.items():
                    told[j] = self._at(values, [n[lane] for lane in filled], rows)
                args, kwargs = tree_unflatten(told, tree)
                # A copy, as the next replay of a CUDA graph writes to the same memory.
                outputs.append(tree_map_only(torch.Tensor, torch.clone, module(*args.values(), **kwargs)))
                counts.append((len(lanes), size))
                self.calls += 1
        return self._joined(outputs, c, counts)

    def _cut(self, value, before, lanes, rows):
        """Return the part of an argument for some lanes. before: the same argument for one sample.

        The copies of each of a sample's rows lie next to each other.
        """
        if is_list(value):
            if len(value) > len(before):
                return [value[r * self.width + lane] for r in range(len(before)) for lane in lanes]
            return type(value)(self._cut(each, was, lanes, rows) for each, was in zip(value, before))
        if not isinstance(value, torch.Tensor) or not value.ndim or self.width == 1:
            return value
        if value.shape == before.shape and len(before) == rows > 1:  # not copied by the pipeline, as a given mask
            return value.repeat_interleave(len(lanes), 0)
        dim = next((dim for dim, size in enumerate(before.shape) if value.shape[dim] == self.width * size), None)
        if dim is None or lanes == [*range(self.width)]:
            return value
        picked = slice(lanes[0], lanes[-1] + 1) if len(lanes) == lanes[-1] + 1 - lanes[0] else lanes
        value, before = value.movedim(dim, 0), before.movedim(dim, 0)  # most often the first
        # With the same strides in a call of any width, or a compiled network would be compiled again.
        return by_copies(value, before, rows, self.width)[:, picked].flatten(0, 2).movedim(0, dim).contiguous()

    @staticmethod
    def _at(values, n, rows):
        """Return the argument of some lanes that changes with the step, at their steps n; values: at each step."""
        if not isinstance(values, torch.Tensor):
            return values[n[0]]
        found = values[on(values, n)]
        found = found.expand(-1, rows, *found.shape[2:]) if found.shape[1] == 1 else found
        return found.transpose(0, 1).flatten(0, 1)

    def _joined(self, outputs, c, counts):
        """Return the output of network c for all copies.

        outputs: for each call, that for its lanes. counts: for each call, the lanes and the copies that filled it up.
        """
        missing, rows, listed = self.width - sum(count for count, _ in counts), self.rows[c], self.listed[c]

        def join(values, before):
            if is_list(before) and listed:
                found = [[value[r * size : r * size + count] for value, (count, size) in zip(values, counts)]
                         for r in range(len(before))]  # fmt: skip
                return [each for row in found for each in [*itertools.chain(*row), *row[0][:1] * missing]]
            if is_list(before):
                return type(before)(join(each, was) for each, was in zip(zip(*values), before))
            if not isinstance(before, torch.Tensor) or not before.ndim:
                return values[0]
            parts = [by_copies(value, before, rows, size)[:, :count] for value, (count, size) in zip(values, counts)]
            return torch.cat([*parts, parts[0][:, :1].expand(-1, missing, *[-1] * before.ndim)], 1).flatten(0, 2)

        leaves, tree = flatten(self.answers[c])
        pairs = zip(zip(*(flatten(output)[0] for output in outputs)), leaves)
        return tree_unflatten([join(values, was) for values, was in pairs], tree)

    # Decode

    @torch.no_grad()
    def decode(self, state):
        """Return what the pipeline makes of a last state, (1, ...): floats of 0 to 1, an array (1, ...)."""
        last = (lambda steps: steps[-1:]) if len(self.looked.timesteps) == self.N else lambda steps: steps
        answer, c = None, 0
        with contextlib.closing(self._events(last, output_type="np", return_dict=False)) as loop:
            try:
                while True:
                    kind, *event = loop.send(answer)
                    if kind == "step":
                        answer, c = state.to(self.dtype), 0
                    elif c < len(self.told) and event[0] == self.told[c].name:
                        answer, c = copy.copy(self.answers[c]), c + 1
                    else:  # one that looks at the image
                        answer = event[1](*event[2], **event[3])
            except StopIteration as end:
                return end.value[0]
