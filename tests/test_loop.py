"""A pipeline's loop as a function of states and steps: as the pipeline has it, in any batch, and leaving no trace."""

import copy
import gc
import inspect
import threading
from collections import namedtuple

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from models.loading import known
from models.loop import Loop, Refused
from pipelines import FAMILIES, flux, stable_diffusion
from sampler import Sampler
from settings import Settings

N, Stepped = 6, namedtuple("Stepped", ["prev_sample"])


def other(kind, pipeline, **parts):
    """A pipeline of another class with the parts of one, and further ones."""
    names = inspect.signature(getattr(diffusers, kind).__init__).parameters
    parts = {**pipeline.components, "requires_safety_checker": False, **parts}
    return getattr(diffusers, kind)(**{name: part for name, part in parts.items() if name in names})


def flux_control():
    """It draws an encoding of its image."""
    config = flux().transformer.config | {"in_channels": 32, "out_channels": 16}
    return other("FluxControlPipeline", flux(), transformer=diffusers.FluxTransformer2DModel.from_config(config))


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
PART = {"image": PICTURE, "strength": 0.3, "num_inference_steps": 20}
MODES = {
    "perturbed attention": (lambda: other("StableDiffusionPAGPipeline", stable_diffusion()), {}),
    "image to image": (lambda: other("StableDiffusionImg2ImgPipeline", stable_diffusion()), PART),
    "condition": (flux_control, {"control_image": PICTURE}),
}
KINDS = {name: (make, {}) for name, make in FAMILIES.items()} | MODES


def make(pipeline, **arguments):
    if known(pipeline).prompted:
        arguments |= {"prompt": "a red sun", "height": 64, "width": 64}
    if "PixArt" in type(pipeline).__name__:
        arguments |= {"use_resolution_binning": False}
    return Loop(pipeline, known(pipeline).scheduler, {"num_inference_steps": N, **arguments}, 3, {})


def by_the_pipeline(loop, states):
    """What the pipeline's own call hands to its scheduler if that answers with the states, (N, ...), one by one."""
    pipeline, outputs = copy.copy(loop.pipeline), []

    def step(output, t, sample, **how):
        outputs.append(output.float())
        return Stepped(states[len(outputs) % len(states)][None].to(sample.dtype))

    vars(pipeline)["scheduler"] = copy.copy(known(loop.pipeline).scheduler)
    pipeline.scheduler.step = step
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**loop.arguments, generator=torch.Generator().manual_seed(3))
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_any_states_at_any_steps_are_denoised_as_by_the_pipeline_whatever_their_batch(kind):
    make_pipeline, arguments = KINDS[kind]
    loop = make(make_pipeline(), **arguments)
    states = torch.cat([loop.x, torch.randn(N - 1, *loop.x.shape[1:], generator=torch.Generator().manual_seed(0))])
    truth = by_the_pipeline(loop, states)
    for order in ([0], [4], [5, 0, 2], [1], [3, 1, 4, 4, 2, 0, 5], [2, 5], *([n] for n in range(N))):
        found = loop.denoise(states[order], torch.tensor(order))
        torch.testing.assert_close(found, truth[order], atol=1e-4 * float(truth.std()), rtol=1e-4)
    assert loop.copies, "in a batch"
    loop.close()
    alone = loop.denoise(loop.x, torch.tensor([0]))
    assert torch.equal(alone, truth[:1]) or kind in MODES, "to the bit, one by one, where no image is encoded"


@pytest.mark.parametrize(
    "limits, calls, sizes",
    [({}, 1, {14}), ({"max_batch": 1}, 7, {2}), ({"max_batch": 7}, 3, {2, 6}), ({"sizes": [4]}, 4, {4}),
     ({"sizes": [4, 8]}, 2, {8})],
)  # fmt: skip
def test_a_call_has_at_most_so_many_samples_or_one_of_a_few_sizes(limits, calls, sizes):
    loop, seen = make(stable_diffusion()), []
    x, n = torch.randn(7, 4, 8, 8), torch.tensor([0, 5, 2, 2, 1, 4, 3])
    whole = loop.denoise(x, n)
    loop = make(stable_diffusion())
    vars(loop).update(limits)
    memory = torch.empty(8, 2, 4, 8, 8)  # of all outputs of a size, as of a CUDA graph

    def answered(unet, inputs, output):
        seen.append(len(inputs[0]))
        return (memory.flatten(0, 1)[: seen[-1]].copy_(output[0]),)

    with loop.pipeline.unet.register_forward_hook(answered):
        torch.testing.assert_close(loop.denoise(x, n), whole, atol=1e-4, rtol=1e-4)
    assert (loop.calls, len(seen), {*seen}) == (calls, calls, sizes)


def leave(refinements):
    next(refinements)
    refinements.close()


def fail(refinements):
    next(refinements).states.fill_(float("nan"))
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in refinements]


@pytest.mark.parametrize("end", [list, leave, next, fail])
@pytest.mark.parametrize("make_pipeline", [stable_diffusion, flux, MODES["perturbed attention"][0]])
def test_a_pipeline_is_unchanged_and_no_thread_is_left_however_sampling_ends(make_pipeline, end):
    tqdm(disable=True)  # starts a thread of its own, once
    pipeline, threads = make_pipeline(), threading.active_count()
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    names = "forward", "_compiled_call_impl", "attn_processors"
    state = lambda: (dict(vars(pipeline)), [[getattr(part, name, None) for name in names] for part in parts.values()])
    use = lambda: pipeline("a moon", num_inference_steps=2, height=64, width=64, output_type="np",
                           generator=torch.Generator().manual_seed(1)).images.tobytes()  # fmt: skip
    image, before = use(), state()
    sampler = Sampler(pipeline, Settings(fine_steps=6, coarse_steps=3), {"height": 64, "width": 64})
    end(sampler.refine("a red sun"))
    del sampler
    gc.collect()
    assert state() == before and threading.active_count() == threads and use() == image


def test_an_error_in_the_network_is_the_callers_and_the_next_call_works():
    loop = make(stable_diffusion())
    before, x, n = threading.active_count(), loop.x, torch.tensor([2])
    truth = loop.denoise(x, n)

    def fail(*inputs):
        raise MemoryError("of the network")

    with loop.pipeline.unet.register_forward_pre_hook(fail), pytest.raises(MemoryError, match="of the network"):
        loop.denoise(x, n)
    assert threading.active_count() == before and torch.equal(loop.denoise(x, n), truth)


def test_the_thread_of_a_running_loop_computes_with_one_thread():
    """Two teams of threads would compete at each call of a network on the CPU: it then takes up to twice as long."""
    found, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        count = lambda pipeline, i, t, values: found.append(torch.get_num_threads()) or {}
        loop = make(stable_diffusion(), callback_on_step_end=count)
        del found[:]
        for _ in range(3):
            loop.denoise(loop.x, torch.tensor([0]))
        loop.close()
        assert found and {*found} == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def at_step(number, change):
    """A callback of the pipeline's loop that changes something after a step."""
    return lambda pipeline, i, t, values: change(pipeline, values) if i == number else {}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda pipeline, values: vars(pipeline).update(_guidance_scale=3.0) or {}, "guides differently at step 3"),
        (lambda pipeline, values: {"latents": values["latents"] + 1}, "has changed the states at step 3"),
        (lambda pipeline, values: vars(pipeline).update(_interrupt=True) or {}, "ends before the last"),
        (lambda pipeline, values: vars(pipeline).update(_cross_attention_kwargs={"scale": 2}) or {}, "calls unet"),
    ],
)
def test_what_depends_on_the_step_is_refused_naming_it(change, words):
    with pytest.raises(Refused, match=words):
        make(stable_diffusion(), callback_on_step_end=at_step(2, change))


def test_what_the_pipelines_own_checks_refuse_is_one_line_of_theirs():
    with pytest.raises(Refused, match="StableDiffusionPipeline cannot be called like this: .*divisible by 8") as error:
        Loop(stable_diffusion(), known(stable_diffusion()).scheduler, {"prompt": "a", "height": 9, "width": 8}, 0, {})
    assert error.value.status == 2


def test_a_network_that_wants_an_image_says_so_in_one_line():
    pipeline = stable_diffusion()
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    pipeline.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(Refused, match="StableDiffusionPipeline cannot be called like this: "):
        make(pipeline)


def test_a_whole_pipeline_runs_where_no_value_can_be_read():
    """On torch's meta device, which has shapes only: sampling then never waits for the device."""
    pipeline = stable_diffusion().to("meta")
    sampler = Sampler(pipeline, Settings(fine_steps=9, coarse_steps=3), {"height": 64, "width": 64})
    *_, last = sampler.iterates("a red sun")
    assert last.exact and last.ticks == 9 and last.states.is_meta and last.states.shape == (4, 4, 8, 8)
