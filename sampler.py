"""The door to this program from Python: a pipeline and settings in, refinements and samples out.

pipeline = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
sample = Sampler(pipeline, Settings(fine_steps=100, coarse_steps=10))("a lighthouse", seed=7)
sample.image, sample.serial_evaluations, sample.total_evaluations
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

import diffusion
from collocation import collocation, usual_window
from models.loading import find_model, inspect, is_compiled, load_pipeline
from refinement import Refinement, Sample, Sequential, Trajectory, judge, measured
from settings import Loading, SettingError, Settings, text
from srds import Iterate, algorithm_1, srds
from study.planning import make_plan


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    conditions: tensors of one row, or of two where guidance is classifier-free, the negative prompt's first.
    ignored: what is cut from the end of the text, as the model reads no more; "" if nothing.
    encoded_for: the pipeline and the settings that it was encoded for.
    """

    text: str
    conditions: dict[str, torch.Tensor]
    ignored: str
    encoded_for: tuple


class OneProcess:
    """A process that shares its lanes with no other: what `Sampler` asks of `study.processes.Processes`.

    sharing: how many processes share the lanes of each tick.
    """

    sharing = 1

    def broadcast(self, value):
        """The first process's value."""
        return value

    def split(self, denoise):
        """`denoise` with the lanes of a call dealt out to the processes."""
        return denoise

    def agree(self, value):
        """The value of the first of the processes that share lanes."""
        return value

    def in_step(self, iterates):
        """The iterates, as many on every process as on the first."""
        return iterates


class Sampler:
    """SRDS on a diffusers pipeline, as it is in memory: its weights, adapters, dtype, device and hooks.

    The pipeline is not changed and can go on being used. Its scheduler gives the noise schedule, and is not otherwise
    used. An autoencoder that overflows in float16 (Stable Diffusion XL's) is float32 while it decodes. Of a pipeline
    with offloaded parts, the one that ran last stays on the device until the next prompt or the end of a call.

    pipeline: of a class in `models.families.FAMILIES`, or one derived from it.
    settings: a `Settings`; None for the defaults. `asked` is what was given; `settings` has the model's usual values
        in place of None, and the plan's blocks and schedule in place of "auto". Neither changes.
    processes: those of a launch, which then all make the same calls; None for this one alone.
    plan: as `study.planning.make_plan` returns it, where coarse_steps is "auto" and there is one already. The attribute
        is None where nothing was planned.

    Others may read model, device, shape (of a state), grid, solver and boundaries.

    Raises SettingError where the model cannot do what is asked, and ModelError for a pipeline of no known family.
    """

    def __init__(self, pipeline, settings=None, *, processes=None, plan=None):
        self.asked = settings = settings or Settings()
        self.pipeline, self.processes, self.plan = pipeline, processes or OneProcess(), plan
        self.model = inspect(pipeline)
        if is_compiled(self.network):
            settings.check_compiled()
        if settings.resolve(self.model).coarse_steps == "auto":
            if plan is None:
                one_block = Sampler(pipeline, replace(settings, coarse_steps=1), processes=processes)
                self.plan = self.processes.broadcast(make_plan(one_block, settings))
            settings = replace(settings, coarse_steps=self.plan["blocks"], schedule=self.plan["schedule"])
        self.settings = settings.resolve(self.model)

        settings, family, scheduler = self.settings, self.model.family, self.model.scheduler
        self.device = torch.device(pipeline._execution_device)
        self.shape = family.shape(settings.height, settings.width)
        self.boundaries = diffusion.boundaries(settings.fine_steps, settings.coarse_steps)
        if family.flow:
            tokens = self.shape[1] * self.shape[2] // family.patch**2
            sigmas = family.sigmas(settings.fine_steps)
            self.grid = diffusion.flow_grid(scheduler, settings.fine_steps, sigmas, tokens)
        else:
            self.grid = diffusion.diffusion_grid(scheduler, settings.fine_steps, settings.solver)
        restarts = self.boundaries if settings.method == "srds" else ()  # blocks begin without a step before
        self.solver = diffusion.Solver(self.grid, settings.solver, settings.eta, settings.seed, restarts)

    @classmethod
    def from_pretrained(cls, model, settings=None, **loading):
        """Load a model, as the command does: `model` is a hub id, a local folder or "demo".

        loading: device, dtype, variant, lora, textual_inversion, offload, vae_tiling and compile, see `Loading`.

        Raises SettingError, before weights are loaded where it can be known by then, and ModelError where the model
        cannot be had.
        """
        settings, loading = settings or Settings(), Loading(model, **loading)
        if loading.compile:
            settings.check_compiled()
        found = find_model(loading.model)
        settings.resolve(found)
        return cls(load_pipeline(found, loading), settings)

    def vary(self, **settings):
        """A sampler with the same pipeline and other settings; it plans again if they are those of a plan."""
        plan = None if settings.keys() & {"method", "fine_steps", "coarse_steps", "schedule"} else self.plan
        return Sampler(self.pipeline, replace(self.asked, **settings), processes=self.processes, plan=plan)

    def __call__(self, prompt, seed=None, start=None):
        """Sample a prompt: the `Sample` of all refinements until the stop rule is met."""
        prompt = self.encode(prompt)
        refinements = tuple(self.refine(prompt, seed, start=start))
        self._offload()
        return Sample(prompt.text, self._seed(seed), refinements)

    def refine(self, prompt, seed=None, on_tick=None, start=None) -> Iterator[Refinement]:
        """Yield the initialisation and each refinement as it is known; the last is where the stop rule is met.

        prompt: a text, or what `encode` made of one. seed: None for the settings' own. on_tick: called before each
        network call with the number of its lanes. start: a `Trajectory` to begin from, of an earlier sample by this
        model: of another prompt, guidance, number of steps or solver, or of the same.

        Raises FloatingPointError where a sample's last state or its image is not finite, and SettingError for a start
        that does not fit.
        """
        rule, tolerance = self.settings.stop_rule, self.settings.tolerance
        prompt, earlier, seconds, lanes = self.encode(prompt), None, 0.0, []

        def ticked(count):
            lanes.append(count)
            if on_tick:
                on_tick(count)

        with contextlib.closing(self.iterates(prompt, seed, ticked, start)) as iterates:
            started = time.perf_counter()
            for iterate in iterates:
                refinement = measured(iterate, self.image(iterate.states), max(lanes, default=0), earlier)
                verdict = "converged" if iterate.exact else judge(refinement, earlier, rule, tolerance)
                seconds += time.perf_counter() - started
                earlier = refinement._replace(verdict=verdict, seconds=seconds)
                yield earlier
                if verdict == "converged":
                    break
                started = time.perf_counter()

    def sequential(self, prompt, seed=None, coarse=False, on_tick=None, kept=None) -> Sequential:
        """Sample step by step: the ground truth that refinements approach; with `coarse`, by the B coarse steps alone.

        prompt, seed, on_tick: as in `refine`, and the same may be raised. kept: the grid points whose states are
        returned, rising, 0 to N; None: the boundaries.
        """
        denoise, step = self._counted(self.denoiser(prompt), on_tick), self._solver(seed).step
        points = self.boundaries if coarse else range(self.settings.fine_steps + 1)
        x, started = self.noise(seed), time.perf_counter()
        states = diffusion.sequential(x, denoise, step, points, kept or self.boundaries)
        return Sequential(states, self.image(states), time.perf_counter() - started)

    @functools.cached_property
    def truth_depends_on(self):
        """What a ground truth depends on beside prompt and seed; samplers that are alike in it can share one."""
        settings = self.settings
        batch = (self.widest, settings.max_batch) if settings.fixed_batch else None
        steps = settings.fine_steps, settings.solver, settings.eta, tuple(self.solver.extrapolation.tolist())
        return *steps, *self.encoded_for, batch

    def trajectory(self, states, seed=None) -> Trajectory:
        """What `refine` can start from, of a sample's or a ground truth's states, and of the seed that they have.

        Raises SettingError for states that are not (B + 1, C, H, W), as this sampler's are.
        """
        given, wanted = tuple(getattr(states, "shape", ())), (len(self.boundaries), *self.shape)
        if given != wanted:
            raise SettingError("states", given, f"is not the shape of this sampler's, {wanted}; give `Sample.states`")
        clean = self._solver(seed).held(states, self.boundaries)
        return Trajectory(clean, self.boundaries, self.model.name, self._seed(seed))

    def iterates(self, prompt, seed=None, on_tick=None, start=None) -> Iterator[Iterate]:
        """The method alone, as `srds.srds` and `collocation.collocation` yield it: no images, no stop rule."""
        settings, solver, x = self.settings, self._solver(seed), self.noise(seed)
        denoise = self._counted(self.processes.split(self.denoiser(prompt)), on_tick)
        held = begun = None
        if start is not None:
            if not isinstance(start, Trajectory):
                raise SettingError("start", type(start).__name__, "is no trajectory; give what `trajectory` returns")
            start.check(self.shape, self.model.name)
            held = start.clean.to(x).flatten(1), start.weights(settings.fine_steps)
        if settings.method == "srds":
            correct = {"damped": solver.damped, "paper": algorithm_1}[settings.correction]
            if held:
                chain, n = solver.unrolled(self.shape), torch.tensor(self.boundaries[1:])
                begun = chain.held(x.flatten(1), n, *held).reshape(-1, *self.shape)
            how = settings.schedule, settings.max_iterations, correct
            iterates = srds(x, denoise, solver.step, self.boundaries, *how, begun)
        else:
            how = settings.nodes, settings.window, settings.max_iterations, not self.model.family.latent, held
            iterates = collocation(x, denoise, solver, self.boundaries, *how, self.processes.agree, settings.tolerance)
        return self.processes.in_step(iterates)

    def encode(self, prompt) -> Prompt:
        """Encode a text. A `Prompt` that was encoded for this pipeline and the same settings is returned as it is.

        After a change of the pipeline's adapters or text encoders, encode again. Raises SettingError for no text.
        """
        if isinstance(prompt, Prompt):
            if prompt.encoded_for == self.encoded_for:
                return prompt
            prompt = prompt.text
        prompt = text(empty=True)("prompt", prompt)
        self._offload()  # or the first encoder would share the device with the network
        conditions = self.model.family.encode(self.pipeline, prompt, *self.encoded_for[1:], self.device)
        return Prompt(prompt, conditions, self.ignored(prompt), self.encoded_for)

    @property
    def encoded_for(self):
        """What a `Prompt` depends on beside the text: the pipeline, and of the settings what is encoded with it."""
        settings = self.settings
        return self.pipeline, settings.negative_prompt, settings.guidance_scale, (settings.height, settings.width)

    def ignored(self, words):
        """What is cut from the end of a text because the model reads no more; "" if nothing is."""
        if not self.model.family.prompted:
            return ""
        tokenizer, limit = self.model.family.tokenizer(self.pipeline)
        if hasattr(self.pipeline, "maybe_convert_prompt"):  # an embedding of several vectors has as many tokens
            words = self.pipeline.maybe_convert_prompt(words, tokenizer)
        return diffusion.cut_from_prompt(tokenizer, limit, words)

    def denoiser(self, prompt):
        """The `diffusion.Denoiser` of a prompt."""
        settings, conditions = self.settings, self.encode(prompt).conditions
        predict = functools.partial(self.model.family.predict, self.pipeline)
        return diffusion.Denoiser(
            predict, conditions, self.grid.times, settings.guidance_scale, settings.max_batch,
            self._batch_sizes(diffusion.rows(conditions)), self.network.dtype,
        )  # fmt: skip

    def _batch_sizes(self, rows):
        """The network samples that a call may have, of lanes with so many rows of conditions; None for any."""
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
        """Most lanes in one call of this process, but for nodes that collocation adds or evaluates first of a start."""
        settings = self.settings
        collocated = settings.window or usual_window(settings.fine_steps)
        lanes = settings.coarse_steps if settings.method == "srds" else collocated
        return -(-lanes // self.processes.sharing)

    def noise(self, seed=None):
        """The initial noise x_T, float32 (1, C, H, W)."""
        return diffusion.initial_noise(self.shape, self._seed(seed), self.device)

    def image(self, states):
        """The image of a trajectory's last state: uint8 (height, width, 3). Raises FloatingPointError."""
        return diffusion.decode(self.model.family, self.pipeline, states[-1])

    def warm_up(self):
        """Make each call that will be timed once beforehand: a first call chooses kernels and takes memory.

        Raises FloatingPointError where the network's output is not finite.
        """
        denoise, x, compiled = self.denoiser(""), self.noise(), is_compiled(self.network)
        widths = range(1, self.widest + 1) if compiled else (1, self.widest)
        for lanes in [*widths] * (3 if compiled else 1):  # a CUDA graph is recorded at the second call
            outputs = denoise(x.expand(lanes, -1, -1, -1), torch.zeros(lanes, dtype=int))
            if not outputs.isfinite().all():
                dtype = str(self.network.dtype).removeprefix("torch.")
                raise FloatingPointError(f"the network's output is not finite in {dtype}")
        self.image(x)

    def keeps_bits(self):
        """Whether a lane's output is the same to the bit whatever its place in a call and its neighbours there.

        That is what `fixed_batch` builds on; it depends on the device's kernels, so it is measured: on as many lanes as
        a call has, in order, in reverse, among others, and alone.
        """
        denoise, lanes = self.denoiser(""), self.widest
        x = torch.cat([self.noise(seed) for seed in range(lanes)])
        n = torch.arange(lanes) * self.settings.fine_steps // lanes
        outputs = denoise(x, n)
        reverse, others = denoise(x.flip(0), n.flip(0)).flip(0), denoise(torch.cat([x[:1], 2 * x[1:]]), n)
        alone = denoise(x[:1], n[:1])
        return torch.equal(outputs, reverse) and torch.equal(others[0], outputs[0]) and torch.equal(alone, outputs[:1])

    def _seed(self, seed):
        return self.settings.seed if seed is None else Settings.domains["seed"]("seed", seed)

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
