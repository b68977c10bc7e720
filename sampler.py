"""The interface for Python: a pipeline and settings in, refinements and samples out.

pipeline = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
sample = Sampler(pipeline, Settings(fine_steps=100, coarse_steps=10))("a lighthouse", seed=7)
sample.image, sample.serial_evaluations, sample.total_evaluations
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

import diffusion
from collocation import collocation, usual_window
from models.loading import find_model, inspect, is_compiled, load_pipeline
from refinement import Refinement, Sample, Sequential, Trajectory, judge, measured
from settings import Loading, SettingError, Settings, text, whole
from srds import Iterate, algorithm_1, srds

CHECK_SEED = whole(0, 2**64 - 1)
ENCODING = threading.Lock()  # a tokenizer's padding is shared by all threads


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    conditions: tensors of one row, or of two if guidance is classifier-free, the negative prompt's first.
    ignored: the part of the text beyond the tokenizer's limit, or "".
    encoded_for: the pipeline and the settings for which it was encoded.
    """

    text: str
    conditions: dict[str, torch.Tensor]
    ignored: str
    encoded_for: tuple


class OneProcess:
    """A process that shares its lanes with no other: the part of `study.processes.Processes` that `Sampler` uses.

    sharing: how many processes share the lanes of each tick.
    """

    sharing = 1

    def broadcast(self, value):
        """Return the first process's value."""
        return value

    def split(self, denoise):
        """Return `denoise` with the lanes of a call shared out to the processes."""
        return denoise

    def in_step(self, iterates):
        """Return the iterates, as many on every process as on the first."""
        return iterates


class Sampler:
    """Sample with a diffusers pipeline as it is in memory, with its weights, adapters, dtype, device and hooks.

    The pipeline is not changed and can still be used. Its scheduler only gives the noise schedule. An autoencoder that
    overflows in float16 (Stable Diffusion XL's) is float32 while it decodes. If the pipeline offloads its parts, the
    one that ran last stays on the device until the next prompt or the end of a call.

    pipeline: an instance of a class in `models.families.FAMILIES`, or of one derived from it.
    settings: a `Settings`; None for the defaults. The attribute `asked` keeps it; `settings` has the model's usual
        values in place of None.
    processes: those that share the lanes of each tick, all of which must make the same calls; None for this process
        alone.

    Public attributes: model, device, shape (of a state), grid, solver and boundaries.

    Raises SettingError if the model cannot do what is asked, and ModelError for a pipeline of no known family.
    """

    def __init__(self, pipeline, settings=None, *, processes=None):
        self.asked = settings or Settings()
        self.pipeline, self.processes = pipeline, processes or OneProcess()
        with torch.device("cpu"):  # for schedulers and tables, whatever torch's default device is
            self.model = inspect(pipeline)
            self.device = torch.device(pipeline._execution_device)
            self.settings = settings = self.asked.resolve(self.model)
            self.shape = self.model.family.shape(settings.height, settings.width)
            self.boundaries = diffusion.boundaries(settings.fine_steps, settings.coarse_steps)
            self.grid = self._grid()
            restarts = self.boundaries if settings.method == "srds" else ()  # a block does not know the step before it
            self.solver = diffusion.Solver(self.grid, settings.solver, settings.eta, settings.seed, restarts)

    def _grid(self):
        settings, family, scheduler = self.settings, self.model.family, self.model.scheduler
        if not family.flow:
            return diffusion.diffusion_grid(scheduler, settings.fine_steps, settings.solver)
        tokens = self.shape[1] * self.shape[2] // family.patch**2
        return diffusion.flow_grid(scheduler, settings.fine_steps, family.sigmas(settings.fine_steps), tokens)

    @classmethod
    def from_pretrained(cls, model, settings=None, **loading):
        """Load a model, as the command does: `model` is a hub id, a local folder or "demo".

        loading: device, dtype, variant, lora, textual_inversion, offload, vae_tiling and compile, see `Loading`.

        Raises SettingError, if possible before weights are loaded, and ModelError if the model cannot be loaded.
        """
        settings, loading = settings or Settings(), Loading(model, **loading)
        found = find_model(loading.model)
        settings.resolve(found)
        return cls(load_pipeline(found, loading), settings)

    def vary(self, **settings):
        """Return a sampler with the same pipeline and other settings."""
        return Sampler(self.pipeline, replace(self.asked, **settings), processes=self.processes)

    def __call__(self, prompt, seed=None, start=None):
        """Sample a prompt and return the `Sample`: all refinements until the stop rule is met."""
        prompt = self.encode(prompt)
        refinements = tuple(self.refine(prompt, seed, start=start))
        self._offload()
        return Sample(prompt.text, self._seed(seed), refinements)

    def refine(self, prompt, seed=None, on_tick=None, start=None) -> Iterator[Refinement]:
        """Yield the initialisation and each refinement as soon as it is known, until the stop rule is met.

        prompt: a text, or what `encode` returns for one. seed: None for the settings' own. on_tick: called before each
        network call with the number of its lanes. start: the `Trajectory` of an earlier sample by this model, from
        which to start; its prompt, guidance, number of steps and solver may differ.

        Raises FloatingPointError if the last state or the image is not finite, and SettingError for a start that does
        not fit.
        """
        rule, tolerance = self.settings.stop_rule, self.settings.tolerance
        prompt, earlier, seconds, widest, calls = self.encode(prompt), None, 0.0, 0, 0
        denoiser = self.denoiser(prompt)

        def ticked(lanes):
            nonlocal widest, calls
            widest, calls = max(widest, lanes), calls + denoiser.calls(-(-lanes // self.processes.sharing))
            if on_tick:
                on_tick(lanes)

        with contextlib.closing(self.iterates(prompt, seed, ticked, start)) as iterates:
            started = time.perf_counter()
            for iterate in iterates:
                refinement = measured(iterate, self.image(iterate.states), calls, widest, earlier)
                complete = iterate.exact or iterate.all_nodes
                verdict = "converged" if complete else judge(refinement, earlier, rule, tolerance)
                seconds += time.perf_counter() - started
                earlier = refinement._replace(verdict=verdict, seconds=seconds)
                yield earlier
                if verdict == "converged":
                    break
                started = time.perf_counter()

    def sequential(self, prompt, seed=None, coarse=False, on_tick=None, kept=None) -> Sequential:
        """Sample step by step and return the ground truth; with `coarse`, sample by the B coarse steps alone.

        prompt, seed, on_tick: as in `refine`, which raises the same. kept: the grid points whose states are returned,
        in rising order, 0 to N; None for the boundaries. Raises SettingError if they do not rise.
        """
        if kept is not None and not (kept and [*kept] == sorted({*kept}) and 0 <= kept[0] <= kept[-1] <= self.N):
            raise SettingError("kept", kept, f"is not a rising list of grid points from 0 to {self.N}; give one")
        denoise, step = self._counted(self.denoiser(prompt), on_tick), self._solver(seed).step
        points = self.boundaries if coarse else range(self.N + 1)
        x, started = self.noise(seed), time.perf_counter()
        states = diffusion.sequential(x, denoise, step, points, kept or self.boundaries)
        return Sequential(states, self.image(states), time.perf_counter() - started)

    @property
    def N(self):
        """The number of fine steps."""
        return self.settings.fine_steps

    @functools.cached_property
    def truth_depends_on(self):
        """What a ground truth depends on besides prompt and seed; samplers for which it is equal can share one."""
        settings = self.settings
        batch = (self.widest, settings.max_batch) if settings.fixed_batch else None
        steps = settings.fine_steps, settings.solver, settings.eta, tuple(self.solver.extrapolation.tolist())
        return *steps, *self.encoded_for, batch

    def trajectory(self, states, seed=None) -> Trajectory:
        """Return what `refine` can start from, for the states and the seed of a sample or a ground truth.

        Raises SettingError unless the states are (B + 1, C, H, W), as this sampler's.
        """
        given, wanted = tuple(getattr(states, "shape", ())), (len(self.boundaries), *self.shape)
        if given != wanted:
            raise SettingError("states", given, f"is not the shape of this sampler's, {wanted}; give `Sample.states`")
        clean = self._solver(seed).held(states, self.boundaries)
        return Trajectory(clean, self.boundaries, self.model.name, self._seed(seed))

    def iterates(self, prompt, seed=None, on_tick=None, start=None) -> Iterator[Iterate]:
        """Yield what `srds.srds` or `collocation.collocation` yields: the method alone, no images, no stop rule."""
        settings, solver, x = self.settings, self._solver(seed), self.noise(seed)
        denoise = self._counted(self.processes.split(self.denoiser(prompt)), on_tick)
        held = begun = None
        if start is not None:
            if not isinstance(start, Trajectory):
                raise SettingError("start", type(start).__name__, "is not a trajectory; give what `trajectory` returns")
            start.check(self.shape, self.model.name)
            held = start.clean.to(x).flatten(1), start.weights(settings.fine_steps)
        if settings.method == "srds":
            correct = {"damped": solver.damped, "paper": algorithm_1}[settings.correction]
            if held:
                chain, n = solver.unrolled(self.shape), torch.tensor(self.boundaries[1:], device="cpu")
                begun = chain.held(x.flatten(1), n, *held).reshape(-1, *self.shape)
            how = settings.schedule, settings.max_iterations, correct
            iterates = srds(x, denoise, solver.step, self.boundaries, *how, begun)
        else:
            how = settings.nodes, settings.window, settings.max_iterations, not self.model.family.latent, held
            broadcast, tolerance = self.processes.broadcast, settings.tolerance
            iterates = collocation(x, denoise, solver, self.boundaries, *how, broadcast, tolerance)
        return self.processes.in_step(iterates)

    def encode(self, prompt) -> Prompt:
        """Encode a text. A `Prompt` that was encoded for this pipeline and the same settings is returned unchanged.

        Encode again after the pipeline's adapters or text encoders have changed. Raises SettingError for no text.
        """
        if isinstance(prompt, Prompt):
            if prompt.encoded_for == self.encoded_for:
                return prompt
            prompt = prompt.text
        prompt = text(empty=True)("prompt", prompt)
        self._offload()  # so that the first encoder does not share the device with the network
        with ENCODING, torch.device("cpu"):
            conditions = self.model.family.encode(self.pipeline, prompt, *self.encoded_for[1:], self.device)
            return Prompt(prompt, conditions, self.ignored(prompt), self.encoded_for)

    @property
    def encoded_for(self):
        """What a `Prompt` depends on besides the text: the pipeline, and the settings that are encoded with it."""
        settings = self.settings
        return self.pipeline, settings.negative_prompt, settings.guidance_scale, (settings.height, settings.width)

    def ignored(self, words):
        """Return the part of a text beyond the tokenizer's limit, or ""."""
        if not self.model.family.prompted:
            return ""
        tokenizer, limit = self.model.family.tokenizer(self.pipeline)
        if hasattr(self.pipeline, "maybe_convert_prompt"):  # an embedding of several vectors has as many tokens
            words = self.pipeline.maybe_convert_prompt(words, tokenizer)
        return diffusion.cut_from_prompt(tokenizer, limit, words)

    def denoiser(self, prompt):
        """Return the `diffusion.Denoiser` of a prompt."""
        settings, conditions = self.settings, self.encode(prompt).conditions
        predict = functools.partial(self.model.family.predict, self.pipeline)
        return diffusion.Denoiser(
            predict, conditions, self.grid.times, settings.guidance_scale, settings.max_batch,
            self._batch_sizes(diffusion.rows(conditions)), self.network.dtype,
        )  # fmt: skip

    def _batch_sizes(self, rows):
        """Return the batch sizes that a call may have, if a lane has `rows` network samples; None for any."""
        most, max_batch = rows * self.widest, self.settings.max_batch
        if self.settings.fixed_batch:
            return [diffusion.fixed_batch(most, max_batch)]
        if is_compiled(self.network):
            most = min(most, max_batch or most)
            return diffusion.compiled_batches(min(rows, most), most)

    @property
    def network(self):
        """The module that is called at each step."""
        return getattr(self.pipeline, self.model.family.network)

    @property
    def widest(self):
        """Most lanes in a call of this process, not counting nodes that collocation adds or starts from."""
        settings = self.settings
        collocated = settings.window or usual_window(settings.fine_steps)
        lanes = settings.coarse_steps if settings.method == "srds" else collocated
        return -(-lanes // self.processes.sharing)

    def noise(self, seed=None):
        """Return the initial noise x_T, float32 (1, C, H, W)."""
        return diffusion.initial_noise(self.shape, self._seed(seed), self.device)

    def image(self, states):
        """Return the image of a trajectory's last state: uint8 (height, width, 3). Raises FloatingPointError."""
        return diffusion.decode(self.model.family, self.pipeline, states[-1])

    def warm_up(self):
        """Make each call once before it is timed, as a first call chooses kernels and allocates memory.

        Raises FloatingPointError if the network's output is not finite.
        """
        denoise, x, compiled = self.denoiser(""), self.noise(), is_compiled(self.network)
        widths = range(1, self.widest + 1) if compiled else (1, self.widest)
        for lanes in [*widths] * (3 if compiled else 1):  # a CUDA graph is recorded at the second call
            outputs = denoise(x.expand(lanes, -1, -1, -1), torch.zeros(lanes, dtype=int, device="cpu"))
            if not outputs.isfinite().all():
                dtype = str(self.network.dtype).removeprefix("torch.")
                raise FloatingPointError(f"the network's output is not finite in {dtype}")
        self.image(x)

    def _seed(self, seed):
        return self.settings.seed if seed is None else CHECK_SEED("seed", seed)

    def _solver(self, seed):
        return self.solver.with_seed(self._seed(seed))

    def _offload(self):
        for hook in getattr(self.pipeline, "_all_hooks", ()):
            hook.offload()

    @staticmethod
    def _counted(denoise, on_tick: Callable[[int], object] | None):
        def counted(x, n):
            on_tick(len(x))
            return denoise(x, n)

        return counted if on_tick else denoise
