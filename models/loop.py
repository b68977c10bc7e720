"""Any diffusers pipeline as a function of states and steps, without code for its family.

A parallel sampler acts between network calls, so it needs only the pipeline's loop over its steps, turned inside out. A
thread runs the pipeline's own call on a copy of the pipeline. The copy shares all parts with the original, but passes
each network call and each scheduler step to the sampler, and waits for the answer.

1. Look. The loop runs once; at each step, network calls return the outputs of the first step. This gives the first
   state, the grid that the pipeline has set, and the networks' arguments at each step, and checks that nothing else
   depends on the step.
2. Run. The loop runs with W copies of the sample, which stand for L <= W states, each at a step of its own. Networks
   get the rows of these L states, with the times of their steps.
3. Decode. The loop runs once more and is given the last state, so that the pipeline decodes it in its own way.

Samples that are made side by side have a loop and a thread each, and share network calls.
"""

import contextlib
import contextvars
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

from settings import Failure, in_one_line, out_of_memory

BEGINNING = threading.Lock()  # held before the loop, as all threads share a tokenizer's padding
ROUNDING = 0.02  # how far a copy's encoding may differ from one sample's, as a share of the largest number
ASK = contextvars.ContextVar("ask")  # in a thread of `inside_out`: passes an event to its caller, returns the answer
COPIES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size")


class Refused(Failure):
    """A pipeline that cannot be sampled in parallel, or that refuses its arguments, in one line."""


class Left(BaseException):
    """Raised in a thread whose caller no longer waits for it."""


def inside_out(function, *arguments):
    """Call a function in a thread, yield each event for which it calls `ASK`, and return the function's result.

    `send` gives the answer to an event; an exception as answer is raised in the thread, by its call of `ASK`.
    """
    asked, answers = queue.SimpleQueue(), queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    def ask(*event):
        asked.put(event)
        if isinstance(answer := answers.get(), BaseException):
            raise answer
        return answer

    def run():
        try:
            ASK.set(ask)
            with torch.cuda.device(device):
                asked.put(("end", function(*arguments)))
        except BaseException as error:
            asked.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (event := asked.get())[0] not in ("end", "error"):
            answers.put((yield event))
        if event[0] == "error":
            raise event[1]
        return event[1]
    finally:
        answers.put(Left())
        thread.join()


def events(pipeline, scheduler, steps, encoded, seed, threads, arguments):
    """Call a pipeline, yield the events of its loop, which `send` answers, and return the result of the call.

    ("network", name, module, args, kwargs): a call of a network. ("step", output, states, time): a step of the
    scheduler. scheduler: one of our own, which is used and changed. steps: a function that is given the scheduler's
    timesteps, and its sigmas, once they are set, and returns those to go through. encoded: the outputs of network calls
    before the loop, by their arguments; new ones are added. seed: for draws without a generator. threads: the number of
    torch threads; None to keep the current one.
    """
    beginning, most, twin, looping = contextlib.ExitStack(), torch.get_num_threads(), copy.copy(pipeline), False
    # Pipelines read the scale of a LoRA in their text encoders from these.
    scales = repr({name: value for name, value in arguments.items() if name.endswith("attention_kwargs")})

    def call(name, module, *args, **kwargs):
        if looping:
            return ASK.get()("network", name, module, args, kwargs)
        told = name, scales, *map(content, tree_flatten((args, kwargs))[0])
        if told not in encoded:
            encoded[told] = module(*args, **kwargs)
        return copy.copy(encoded[told])  # as the pipeline may change a list of features

    def step(model_output, timestep, sample, *_, return_dict=True, **__):
        states = ASK.get()("step", model_output, sample, timestep)
        if hasattr(scheduler, "_step_index"):  # a pipeline that inpaints needs the noise of the next step
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
        with beginning:
            torch.get_num_threads()  # before setting: a thread's first query resets its number to the shared one
            torch.set_num_threads(threads or most)
            ASK.get()("begun")
            beginning.enter_context(BEGINNING)
            devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
            beginning.enter_context(torch.random.fork_rng(devices))
            torch.manual_seed(seed)  # for what is drawn without the generator
            return twin(**arguments)

    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            vars(twin)[name] = own = copy.copy(part)
            vars(own)["_compiled_call_impl"] = functools.partial(call, name, part)  # a module's call prefers it
    # Perturbed-attention guidance sets its own attention processors in the parts that all calls share.
    shared = pipeline.components.values() if hasattr(pipeline, "set_pag_applied_layers") else ()
    attention = {part: part.attn_processors for part in shared if hasattr(part, "attn_processors")}
    vars(twin).update(scheduler=scheduler, progress_bar=progress_bar, maybe_free_model_hooks=lambda: None)
    vars(scheduler).update(step=step, set_timesteps=set_timesteps)
    try:
        with contextlib.closing(inside_out(run)) as thread:
            next(thread)
            torch.set_num_threads(most)  # new threads inherit the number set last
            return (yield from thread)
    finally:
        for part, processors in attention.items():
            part.set_attn_processor(processors)


def content(value):
    """Return a hashable key for an argument of an encoder: of a tensor, its content."""
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return value.dtype, value.shape, value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return repr(value)


def is_list(value):
    """Return whether a value is a list of tensors or of image sizes, one for each sample or layer."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    sizes = all(isinstance(each, (list, tuple)) for each in value)
    tensors = [isinstance(each, torch.Tensor) for each in (tree_flatten(value)[0] if sizes else value)]
    return not any(tensors) if sizes else all(tensors)


flatten = functools.partial(tree_flatten, is_leaf=is_list)
flat_arguments = lambda args, kwargs: flatten((dict(enumerate(args)), kwargs))


def same(one, other, off=0.0):
    """Return whether two values are equal. Tensors without values (meta) are equal if they have the same shape.

    off: how far floating-point numbers may differ, as a share of the largest.
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
    """Return the number of samples in a network's output, and whether the output is a list of them, as an argument is.

    told: the leaves of the network's arguments.
    """
    last = flatten(answer)[0][-1]
    given = [value for value in told if is_list(value) and isinstance(value[0], torch.Tensor)]
    listed = isinstance(last, list) and any(len(value) == len(last) for value in given)
    return len(last[-1] if is_list(last) and not listed else last), listed


def copied_along(value, before, rows):
    """Return the dimension of an argument along which the copies of a sample lie; None if they share the argument.

    before: the argument for one sample.
    """
    one, many = (each.shape if isinstance(each, torch.Tensor) else () for each in (before, value))
    differing = [dim for dim, sizes in enumerate(zip(one, many)) if sizes[0] != sizes[1]]
    # The pipeline makes no copies of an argument with a single row, such as a given mask.
    return differing[0] if differing else 0 if one[:1] == (rows,) and rows > 1 else None


def gathered(values, before, rows, spots, listed=None):
    """Return copies from several calls as those of one call, for a leaf of a network's arguments or of its output.

    values: the leaf in each call. before: that of one sample. spots: the copies, pairs of a call and a place in it.
    listed: for an output, whether its lists have an entry for each sample; None for arguments, whose length shows it.

    A call has rows x copies samples: the copies of each row of a sample lie next to each other. If a row has several
    entries, such as the frames of a video, they stay together.
    """
    if is_list(before) and (len(values[0]) > len(before) if listed is None else listed):
        copies = [len(value) // len(before) for value in values]
        return [values[i][r * copies[i] + place] for r in range(len(before)) for i, place in spots]
    if is_list(before):
        return type(before)(gathered(each, was, rows, spots, listed) for *each, was in zip(*values, before))
    dim = 0 if listed is not None and getattr(before, "ndim", 0) else copied_along(values[0], before, rows)
    if dim is None:
        return values[0]
    rows = rows if before.shape[dim] % rows == 0 else before.shape[dim]
    parts = [value.movedim(dim, 0).unflatten(0, (rows, -1, before.shape[dim] // rows)) for value in values]
    if spots == [(0, place) for place in range(parts[0].shape[1])]:
        return values[0]
    found = torch.stack([parts[i][:, place % parts[i].shape[1]] for i, place in spots], 1)
    # The same strides in calls of any width: otherwise, a compiled network would be compiled again.
    return found.flatten(0, 2).movedim(0, dim).contiguous()


class Told(NamedTuple):
    """A network's arguments at step 0, as the leaves of a tree, and by place, the leaves that change, at each step."""

    name: str
    first: list
    changing: dict


class Loop:
    """The loop of a pipeline's call, for one prompt and seed, as a function of states and steps.

    x: the first state, float32 (1, ...). N: the number of steps. looked: the scheduler as the pipeline has set it.
    rows: for each network, the samples in a call for one state. calls: the number of network calls that `denoise` made.
    """

    def __init__(self, pipeline, scheduler, arguments, seed, encoded, max_batch=None, answers=()):
        """arguments: those of the pipeline's call. encoded: see `events`.

        max_batch: most network samples in one call, but at least those of one state; None for no limit. The attribute
        `sizes` may be set to the sizes that a call may have, rising: each call is then padded to one with copies.
        `widest` may be set to the most states expected, so that the pipeline's call need not begin again for more.
        answers: the networks' outputs at step 0 of another prompt; without them, each network is called once to look.

        Raises Refused, naming the step, if more than the networks' arguments depends on the step.
        """
        self.pipeline, self.template, self.arguments, self.seed = pipeline, scheduler, arguments, seed
        self.kind = f"the {type(pipeline).__name__}"
        self.encoded, self.max_batch, self.sizes, self.answers = encoded, max_batch, (), [*answers]
        self.width, self.widest, self.calls, self.running, self.kinds = 1, 1, 0, None, {}
        known = inspect.signature(type(pipeline).__call__).parameters
        self.copies = next((name for name in COPIES if name in known), None)
        try:
            self._look()
        except (AttributeError, TypeError, ValueError) as error:  # from the pipeline's own checks
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
                        leaves, tree = flat_arguments(args, kwargs)
                        calls.append((name, [type(leaf)(leaf) if is_list(leaf) else leaf for leaf in leaves], tree))
                        if new and not seen:  # after copying, as a UNet empties a list of features
                            with torch.compiler.set_stance("force_eager"):  # the loop has times of another shape
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
        if not all(isinstance(values, torch.Tensor) for told in self.told for values in told.changing.values()):
            self.copies = None  # all copies share a number

    def _expect(self, condition, what, step):
        if not condition:
            raise Refused(f"{self.kind} {what} at step {step}; its steps can only be taken in order")

    def _compared(self, calls):
        """Return the `Told` of a network from its calls, one for each step: name, leaves and their tree."""
        (name, first, tree), changing = calls[0], {}
        for i, call in enumerate(calls):
            self._expect(call[0] == name and call[2] == tree, f"calls {name} differently", i)
        for j, values in enumerate(zip(*(leaves for _, leaves, _ in calls))):
            other = [i for i, value in enumerate(values) if not same(value, values[0])]
            if other:
                kinds = (torch.Tensor, int, float)
                self._expect(isinstance(values[0], kinds), f"tells {name} another {type(values[0]).__name__}", other[0])
                if isinstance(values[0], torch.Tensor):  # a network moves a single time to its device, but not several
                    values = torch.stack([value.reshape(value.shape or (1,)) for value in values]).to(self.x.device)
                changing[j] = values
        return Told(name, first, changing)

    # Run

    @torch.no_grad()
    def denoise(self, x, n):
        """Return guided outputs, float32 (L, ...), for L states x, float32, at steps n, int64 (L,) on the CPU."""
        if len(x) > 1 and not self.copies:  # the pipeline cannot make copies
            return torch.cat([self.denoise(*lane) for lane in zip(x.split(1), n.split(1))])
        ask = ASK.get(None)
        if ask and hasattr(self.pipeline, "set_pag_applied_layers"):
            raise Refused(f"{self.kind} changes what samples side by side share; leave out --batch", status=2)
        try:
            if len(x) > self.width or not self.running:  # with two copies or more, the rows of each can be told apart
                most = max(len(x), self.widest if self.copies else 1)
                self._start(max(2 ** (most - 1).bit_length(), 2 if (self.sizes or ask) and self.copies else 1))
            if len(x) > self.width:  # the pipeline turned out to make no copies
                return self.denoise(x, n)
            states = torch.cat([x, x[-1:].expand(self.width - len(x), *x.shape[1:])]).to(self.dtype)
            try:
                event = self.running.send(states)
            except StopIteration:  # the loop has done all its steps
                self._start(self.width)
                event = self.running.send(states)
            for c in range(len(self.told)):
                request = self, c, n.tolist(), event[2], *flat_arguments(*event[3:])
                event = self.running.send(ask(request) if ask else answered([request])[0])
            return event[1][: len(x)].to(torch.float32, copy=True)
        except BaseException:
            self.close()
            raise

    def close(self):
        """End the pipeline's call that `denoise` has begun; the next `denoise` begins another."""
        if self.running:
            self.running.close()
        self.running, self.width = None, 1

    def _start(self, width):
        """Begin a call of the pipeline with `width` copies, and go to its first step, without calling networks.

        If the copies differ from one sample, states are denoised one by one, in a call with one copy.
        """
        self.close()
        self.width = width
        # With more than one torch thread, two thread pools would compete at each network call on the CPU.
        again = (lambda steps: steps[-1:].repeat(100 * len(steps))) if self.N == 1 else lambda steps: steps.repeat(3)
        self.running = self._events(again, width, threads=1, output_type="latent")
        try:
            event, alike = next(self.running), True
            for begun in (False, True):  # the look's states are used from the second step on
                for c, told in enumerate(self.told):
                    alike = alike and (not begun or self._alike(c, told, *event[3:]))
                    event = self.running.send(self.joined([self.answers[c]], c, [(0, 0)]))
                alike = alike and len(event[2]) == width
                if not begun:
                    event = self.running.send(self.x.to(self.dtype).expand(width, *self.x.shape[1:]))
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # such as for a list of generators
            if width == 1 or out_of_memory(error):
                raise
            alike = False
        if not alike:
            if width == 1:
                raise Refused(f"{self.kind} differs between calls with the same seed")
            self.copies, self.kinds = None, {}
            self._start(1)

    def _alike(self, c, told, args, kwargs):
        """Return whether network c has the same arguments for the first and the last copy as for one sample."""
        pairs = enumerate(zip(flat_arguments(args, kwargs)[0], told.first, strict=True))
        pairs = [pair for j, pair in pairs if j not in told.changing]
        one = lambda value, before, lane: gathered([value], before, self.rows[c], [(0, lane)])
        return all(same(one(*pair, lane), pair[1], ROUNDING) for lane in {0, self.width - 1} for pair in pairs)

    def joined(self, outputs, c, spots):
        """Return the output of network c for all copies, from the outputs of calls. spots: see `gathered`."""
        leaves, tree = flatten(self.answers[c])
        spots, how = [*spots, *spots[:1] * (self.width - len(spots))], (self.rows[c], self.listed[c])
        pairs = zip(zip(*(flatten(output)[0] for output in outputs)), leaves)
        return tree_unflatten([gathered(values, was, how[0], spots, how[1]) for values, was in pairs], tree)

    # Decode

    @torch.no_grad()
    def decode(self, state):
        """Return the pipeline's output for a last state, (1, ...): an array (1, ...) of floats from 0 to 1."""
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
                    else:  # a network that looks at the image
                        answer = event[1](*event[2], **event[3])
            except StopIteration as end:
                return end.value[0]


# Network calls. A request is a tuple: a loop, the number of its network, the steps of its first copies, the network,
# and the leaves and the tree of its arguments for all copies.


def kind(loop, c, n, module, leaves, tree):
    """Return what requests must have in common to share a call, hashable."""
    (_, first, changing), rows = loop.told[c], loop.rows[c]

    def of(value, before):
        if is_list(before):
            return len(before) if len(value) > len(before) else (*map(of, value, before),)
        dim = copied_along(value, before, rows)
        return content(before) if dim is None else (dim, before.shape, before.dtype)

    if c not in loop.kinds:
        leaves = (changing[j].shape[1:] if j in changing else of(*pair) for j, pair in enumerate(zip(leaves, first)))
        limits = loop.max_batch, *loop.sizes, loop.copies or id(loop)  # without copies, its rows cannot be told apart
        loop.kinds[c] = id(module), repr(tree), rows, loop.listed[c], limits, *leaves
    return loop.kinds[c]


def answered(requests):
    """Return the network's output for each of some requests of one kind, in as few calls as possible."""
    (loop, c, _, module, _, tree), *_ = requests
    rows, changing = loop.rows[c], [loop.told[c].changing for loop, c, *_ in requests]
    sizes = [max(1, size // rows) for size in loop.sizes] if loop.copies else []
    most = sizes[-1] if sizes else max(1, (loop.max_batch or 10**9) // rows)
    lanes, outputs = [(i, lane) for i, request in enumerate(requests) for lane in range(len(request[2]))], []
    for some in (lanes[i : i + most] for i in range(0, len(lanes), most)):
        filled = some + some[-1:] * (next((size for size in sizes if size >= len(some)), len(some)) - len(some))
        leaves = zip(*(request[4] for request in requests))
        told = [gathered(values, before, rows, filled) for values, before in zip(leaves, loop.told[c].first)]
        for j in changing[0]:
            values = [changing[i][j][requests[i][2][lane]] for i, lane in filled]
            told[j] = values[0]
            if isinstance(values[0], torch.Tensor):
                values = torch.stack(values, 1)
                told[j] = values.expand(max(rows, len(values)), *values.shape[1:]).flatten(0, 1)
        args, kwargs = tree_unflatten(told, tree)
        # Cloned, as the next replay of a CUDA graph writes to the same memory.
        outputs.append(tree_map_only(torch.Tensor, torch.clone, module(*args.values(), **kwargs)))
    places = [[divmod(at, most) for at, (i, _) in enumerate(lanes) if i == own] for own in range(len(requests))]
    for (loop, *_), spots in zip(requests, places):
        loop.calls += len(dict(spots))
    return [loop.joined(outputs, c, spots) for (loop, c, *_), spots in zip(requests, places)]


def attempted(requests):
    """Return the outputs of `answered`, with an error for each that fails; a shared call that fails is split."""
    try:
        return answered(requests)
    except Exception as error:
        again = len(requests) > 1 and not out_of_memory(error)
        return [attempted([each])[0] if again else error for each in requests]


@torch.no_grad()
def side_by_side(function, items, most):
    """Call a function for each item, at most `most` at a time, and yield the results; an error ends all.

    Each call has a thread of its own. One thread runs at a time, until it reaches a network call. When all have reached
    one, the calling thread makes these network calls: one for all requests of a kind.
    """
    items, answers = iter(items), {}
    if most == 1:
        yield from map(function, items)
    try:
        while True:
            answers |= {inside_out(function, item): None for item in itertools.islice(items, most - len(answers))}
            if not answers:
                return
            kinds = {}
            for thread, answer in answers.items():
                try:
                    (request,) = thread.send(answer)
                    kinds.setdefault(kind(*request), {})[thread] = request
                except StopIteration as end:
                    yield end.value
            # In one assignment: after an interrupt, all threads must be closed.
            answers = {one: said for some in kinds.values() for one, said in zip(some, attempted([*some.values()]))}
    finally:
        for thread in answers:
            thread.close()
