"""The interface for Python: a pipeline and settings in, refinements and samples out.

pipeline = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
sample = Sampler(pipeline, Settings(fine_steps=100, coarse_steps=10))("a lighthouse", seed=7)
sample.image, sample.serial_evaluations, sample.total_evaluations
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffusion
from collocation import collocation, usual_window
from models.loading import find_model, is_compiled, known, load_pipeline, networks
from models.loop import Loop, side_by_side
from refinement import Refinement, Sample, Sequential, Trajectory, judge, measured
from settings import SETTINGS, Failure, Loading, Settings, text, whole
from srds import Iterate, algorithm_1, srds

CHECK_SEED = whole(0, 2**64 - 1)


@dataclass(eq=False)
class Prompt:
    """A prompt for a pipeline, with its encodings and loops so far.

    arguments: further arguments of the pipeline's call. encoded: outputs of the text encoders. loops: each
    `models.loop.Loop` of the last seed, by what it depends on.
    """

    text: str
    arguments: dict
    pipeline: DiffusionPipeline
    encoded: dict = field(default_factory=dict)
    loops: dict = field(default_factory=dict)


# What a sampler uses of `study.processes.Processes`, for a process that shares its lanes with no other.
unchanged = lambda value: value
ALONE = SimpleNamespace(sharing=1, broadcast=unchanged, split=unchanged, served=unchanged)


def expect(finite, what, dtype):
    """Raise FloatingPointError unless all numbers of `what` are finite."""
    if not finite:
        raise FloatingPointError(f"{what} is not finite in {str(dtype).removeprefix('torch.')}")


def decoded(loop, states):
    """Return the image or video of a trajectory's last state, see `Refinement`. Raises FloatingPointError."""
    image = loop.decode(states[-1:])[0]
    if image.ndim not in (3, 4):
        raise Failure(f"{loop.kind} returns neither images nor videos")
    expect(states[-1].isfinite().all() and np.isfinite(image).all(), "the state or the image", loop.dtype)
    return np.broadcast_to((image * 255).round().astype(np.uint8), (*image.shape[:-1], 3))


def counted(denoise, on_tick: Callable[[int], object] | None):
    """Return `denoise`, which first calls `on_tick`, if there is one, with the number of lanes."""

    def ticking(x, n):
        on_tick(len(x))
        return denoise(x, n)

    return ticking if on_tick else denoise


class Sampler:
    """Sample with a diffusers pipeline as it is in memory, with its weights, adapters, dtype, device and hooks.

    The pipeline can still be used as before. Its scheduler only gives the noise schedule. If the pipeline offloads its
    parts, the one that ran last stays on the device until another one runs.

    pipeline: a diffusers pipeline, of any class whose loop can be followed, see `models.loop`.
    settings: a `Settings`; None for the defaults. The attribute `asked` keeps it; the attribute `settings` has the
        model's usual values in place of None.
    arguments: those of the pipeline's call, by name, such as guidance_scale or image; arguments that are given with a
        prompt replace them. None for none.
    processes: the `Processes` that share the lanes of each tick, the others by `serve`; None for this process alone.
    together: the number of samples that share calls, see `batch`; it sets the sizes of calls of compiled networks.

    Public attributes: model and device; after the first look at the pipeline's loop, also shape (of a state),
    boundaries and solver.

    Raises SettingError if the model cannot do what the settings ask, and ModelError for a pipeline that cannot be
    sampled.
    """

    def __init__(self, pipeline, settings=None, arguments=None, *, processes=None, together=1):
        self.asked, self.arguments = settings or Settings(), dict(arguments or {})
        self.pipeline, self.processes = pipeline, processes or ALONE
        with torch.device("cpu"):  # for schedulers and tables, even if torch's default device is another
            self.model = known(pipeline)
            self.device = torch.device(pipeline._execution_device)
            self.settings = self.asked.resolve(self.model)
            self.model.check_call(self.arguments)
        self._answers, self._solvers, self.together = (), {}, together

    def loop(self, prompt, seed=None):
        """Return the `models.loop.Loop` of a prompt and seed."""
        settings, seed, prompt = self.settings, self._seed(seed), self.encode(prompt)
        sizes = settings.max_batch, settings.fixed_batch and self.widest, self.compiled and self.together
        depends_on = seed, settings.fine_steps, *sizes, *self._given
        if depends_on not in prompt.loops:
            prompt.loops = {key: loop for key, loop in prompt.loops.items() if key[0] == seed}
            arguments = {"prompt": prompt.text} if self.model.prompted else {}
            arguments |= self.arguments | {"num_inference_steps": settings.fine_steps} | prompt.arguments
            how = prompt.encoded, settings.max_batch, () if prompt.arguments else self._answers
            loop = prompt.loops[depends_on] = Loop(self.pipeline, self.model.scheduler, arguments, seed, *how)
            loop.sizes = self._batch_sizes(max(loop.rows))
            self._answers = self._answers if prompt.arguments else loop.answers
        self._looked = prompt.loops[depends_on]
        return self._looked

    @functools.cached_property
    def _given(self):
        """The sampler's own arguments, as a key."""
        simple = lambda value: value if isinstance(value, (str, int, float)) else id(value)
        return tuple((name, simple(value)) for name, value in sorted(self.arguments.items()))

    @functools.cached_property
    def _looked(self):
        """A loop of any prompt and seed."""
        return self.loop("")

    @property
    def shape(self):
        """The shape of a state."""
        return self._looked.x.shape[1:]

    @property
    def boundaries(self):
        """The grid points between blocks, 0 to N, a list; N is below `fine_steps` if a strength leaves out steps."""
        return self._steps(self._looked)[0]

    @property
    def solver(self):
        """The `diffusion.Solver`, for the settings' seed."""
        return self._steps(self._looked)[1]

    def _steps(self, loop, seed=None):
        """Return the boundaries and the `diffusion.Solver` of a loop's steps, the last ones of the grid."""
        settings, n = self.settings, diffusion.boundaries(loop.N, min(loop.N, self.settings.coarse_steps))
        with torch.device("cpu"):
            if self.model.flow:  # the grid depends on the size and on further arguments of the pipeline's call
                grid = diffusion.flow_grid(loop.looked).last(loop.N)
            else:
                grid = diffusion.diffusion_grid(self.model.scheduler, settings.fine_steps, settings.solver).last(loop.N)
            steps = tuple(grid.noise.tolist())
            if steps not in self._solvers:
                restarts = n if settings.method == "srds" else ()  # a block does not know the step before it
                self._solvers[steps] = diffusion.Solver(grid, settings.solver, settings.eta, settings.seed, restarts)
        return n, self._solvers[steps].with_seed(self._seed(seed))

    @classmethod
    def from_pretrained(cls, model, settings=None, arguments=None, **loading):
        """Load a model, as the command does: `model` is a hub id, a local folder, "demo" or "fashion".

        arguments: those of the pipeline's call, in addition to or in place of the command's usual ones, see
        `Model.usual`.
        loading: pipeline, device, dtype, variant, lora, textual_inversion, offload and compile, see `Loading`.

        Raises SettingError, if possible before weights are loaded, and ModelError if the model cannot be loaded.
        """
        settings, loading = settings or Settings(), Loading(model, **loading)
        found, arguments = find_model(loading.model, loading.pipeline), arguments or {}
        settings.resolve(found)
        found.check_call(arguments)
        return cls(load_pipeline(found, loading), settings, found.usual | arguments)

    def vary(self, **changes):
        """Return a sampler with the same pipeline and other settings or arguments of its call; None removes one."""
        settings = {name: value for name, value in changes.items() if name in SETTINGS}
        arguments = self.arguments | {name: value for name, value in changes.items() if name not in SETTINGS}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        return Sampler(self.pipeline, replace(self.asked, **settings), arguments, processes=self.processes)

    def __call__(self, prompt, seed=None, start=None, **arguments):
        """Sample a prompt and return the `Sample`: all refinements until the stop rule is met.

        arguments: those of the pipeline's call, as in `encode`.
        """
        prompt = self.encode(prompt, **arguments)
        refinements = tuple(self.refine(prompt, seed, start=start))
        return Sample(prompt.text, self._seed(seed), refinements, self.trajectory(refinements[-1].states, seed, prompt))

    def batch(self, asked, most=None) -> Iterator[tuple[int, Sample]]:
        """Sample prompts side by side, in network calls that they share; yield index and `Sample` of each when done.

        asked: for each sample its prompt, or a tuple (prompt, seed, start), of which the last ones may be left out.
        most: the number that are made at a time; None: all. If one fails, the others are made, and then its error is
        raised.
        """
        asked = [[each] if isinstance(each, (str, Prompt)) else each for each in asked]
        most, errors = whole(optional=True)("most", most), []
        self.together = min(most or len(asked), len(asked)) or 1

        def made(numbered):
            i, (prompt, *more) = numbered
            try:
                return i, self(replace(self.encode(prompt), loops={}), *more)  # loops of its own
            except Exception as error:
                errors.append(error)

        yield from filter(None, side_by_side(made, enumerate(asked), self.together))
        for error in errors:
            raise error

    def refine(self, prompt, seed=None, on_tick=None, start=None, **arguments) -> Iterator[Refinement]:
        """Yield the initialisation and each refinement as soon as it is known, until the stop rule is met.

        prompt: a text, or what `encode` returns for one. seed: None for the settings' own. on_tick: called before each
        tick, with the number of its lanes. start: an earlier `Sample` by this model, or a `Trajectory`, to start from;
        its prompt, guidance, number of steps and solver may differ. arguments: as in `encode`.

        Raises FloatingPointError if the last state or the image is not finite, and SettingError for a start that does
        not fit.
        """
        rule, tolerance = self.settings.stop_rule, self.settings.tolerance
        prompt, earlier, seconds, widths = self.encode(prompt, **arguments), None, 0.0, []
        loop = self.loop(prompt, seed)
        before = loop.calls
        ticked = lambda lanes: [call(lanes) for call in (widths.append, on_tick) if call]
        with contextlib.closing(loop), contextlib.closing(self.iterates(prompt, seed, ticked, start)) as iterates:
            started = time.perf_counter()
            for iterate in iterates:
                image = decoded(loop, iterate.states)
                refinement = measured(iterate, image, loop.calls - before, max(widths), earlier)
                complete = iterate.exact or iterate.all_nodes
                verdict = "converged" if complete else judge(refinement, earlier, rule, tolerance)
                seconds += time.perf_counter() - started
                earlier = refinement._replace(verdict=verdict, seconds=seconds)
                yield earlier
                if verdict == "converged":
                    break
                started = time.perf_counter()

    def sequential(self, prompt, seed=None, coarse=False, on_tick=None, kept=None, **arguments) -> Sequential:
        """Sample step by step and return the ground truth; if `coarse`, take the B coarse steps alone.

        prompt, seed, on_tick, arguments: as in `refine`, which raises the same. kept: the grid points whose states are
        returned, in rising order, 0 to N; None for the boundaries.
        """
        loop = self.loop(self.encode(prompt, **arguments), seed)
        loop.widest, (n, solver) = 1, self._steps(loop, seed)
        points, denoise = n if coarse else range(loop.N + 1), counted(loop.denoise, on_tick)
        with contextlib.closing(loop):
            started = time.perf_counter()
            states = diffusion.sequential(loop.x, denoise, solver.step, points, kept or n)
            return Sequential(states, decoded(loop, states), time.perf_counter() - started)

    @functools.cached_property
    def truth_depends_on(self):
        """What a ground truth depends on besides prompt and seed; samplers with equal values can share it."""
        settings = self.settings
        batch = (self.widest, settings.max_batch) if settings.fixed_batch else None
        steps = settings.fine_steps, settings.solver, settings.eta, batch
        restarts = self.boundaries if settings.solver == "dpmsolver++" and settings.method == "srds" else ()
        return *steps, *self._given, *restarts

    def trajectory(self, states, seed=None, prompt=None) -> Trajectory:
        """Return a start for `refine` made from the states, (B + 1, ...), and seed of a refinement or ground truth.

        prompt: that of the states, needed if its arguments, such as strength, change the steps; None: the last one.
        """
        n, solver = self._steps(self._looked if prompt is None else self.loop(prompt, seed), seed)
        return Trajectory(solver.held(states, n), n)

    def iterates(self, prompt, seed=None, on_tick=None, start=None) -> Iterator[Iterate]:
        """Yield the iterates of `srds.srds` or `collocation.collocation`: no images, no stop rule."""
        settings, loop = self.settings, self.loop(prompt, seed)
        n, solver = self._steps(loop, seed)
        loop.widest = self.widest
        x, denoise = loop.x, counted(self.processes.split(loop.denoise), on_tick)
        held = begun = None
        if start is not None:
            start = start.trajectory if isinstance(start, Sample) else start
            start.check(x.shape[1:])
            held = start.clean.to(x).flatten(1), start.weights(loop.N)
        if settings.method == "srds":
            correct = {"damped": solver.damped, "paper": algorithm_1}[settings.correction]
            if held:
                chain, ends = solver.unrolled(x.shape[1:]), torch.tensor(n[1:], device="cpu")
                begun = chain.held(x.flatten(1), ends, *held).reshape(-1, *x.shape[1:])
            how = settings.schedule, settings.max_iterations, correct
            iterates = srds(x, denoise, solver.step, n, *how, begun)
        else:
            how = settings.nodes, settings.window, settings.max_iterations, not hasattr(self.pipeline, "vae"), held
            iterates = collocation(x, denoise, solver, n, *how, settings.tolerance)
        return self.processes.served(iterates)

    def encode(self, prompt, **arguments) -> Prompt:
        """Return a `Prompt` for a text; all samplers of this pipeline then share its encodings.

        prompt: a text, None if `prompt_embeds` are among the arguments, or a `Prompt`; one of this pipeline is returned
        unchanged if no arguments are added. arguments: those of the pipeline's call, such as guidance_scale=4 or
        image=picture, which replace the sampler's own.

        Encode again after the pipeline's adapters or text encoders have changed. Raises SettingError for a prompt that
        is not a text, and for an argument that the pipeline does not have.
        """
        self.model.check_call(arguments)
        if isinstance(prompt, Prompt):
            if prompt.pipeline is self.pipeline:
                return replace(prompt, arguments=prompt.arguments | arguments, loops={}) if arguments else prompt
            prompt, arguments = prompt.text, prompt.arguments | arguments
        if not prompt and "prompt_embeds" in self.arguments | arguments:
            prompt, arguments = "", arguments | {"prompt": None}
        return Prompt(text(empty=True)("prompt", prompt), arguments, self.pipeline)

    @property
    def compiled(self):
        """Whether torch compiles the pipeline's networks, or parts of them."""
        return any(map(is_compiled, networks(self.pipeline)))

    def _batch_sizes(self, rows):
        """Return the batch sizes that a call may have, for lanes of `rows` network samples; [] if any size will do."""
        most, max_batch = rows * self.widest, self.settings.max_batch
        if self.settings.fixed_batch:
            return [diffusion.fixed_batch(most, max_batch)]
        if self.compiled:  # few, as each is compiled: powers of 2 times rows, then the largest
            most = min(most * self.together, max_batch or most * self.together)
            return [*(rows * 2**i for i in range(20) if rows * 2**i < most), most]
        return []

    @property
    def widest(self):
        """Most lanes that this process has in a tick, not counting nodes that collocation adds or starts from."""
        settings = self.settings
        collocated = settings.window or usual_window(settings.fine_steps)
        lanes = settings.coarse_steps if settings.method == "srds" else collocated
        return -(-lanes // self.processes.sharing)

    def image(self, states, prompt=None, seed=None):
        """Return the image or video of the last of `states`, see `Refinement`. Raises FloatingPointError."""
        return decoded(self._looked if prompt is None else self.loop(prompt, seed), states)

    def warm_up(self):
        """Make a call of each size before calls are timed, as a first call chooses kernels and allocates memory.

        Raises FloatingPointError if the network's output is not finite.
        """
        loop = self.loop("")
        widths = [size // max(loop.rows) for size in loop.sizes] or [1, self.widest * self.together]
        with contextlib.closing(loop):
            for lanes in widths * (3 if self.compiled else 1):  # a CUDA graph is recorded at the second call
                x = loop.x.expand(lanes, *loop.x.shape[1:])
                outputs = loop.denoise(x, torch.zeros(lanes, dtype=int, device="cpu"))
                expect(outputs.isfinite().all(), "the network's output", loop.dtype)
        self.image(loop.x)

    def _seed(self, seed):
        return self.settings.seed if seed is None else CHECK_SEED("seed", seed)
