"""SRDS and collocation beside what else a user would pick, on the same prompts and the same noise, in one process.

    python benchmarks/peers.py          # about an hour on 2 cores; writes benchmarks/results/peers.{csv,png}

DDIM in sequence, ParaDiGMS, DDIM of fewer steps and DPM-Solver++ are diffusers' own pipelines and schedulers, which has
ParaDiGMS for Stable Diffusion alone: `benchmarks/collocation.py` compares on pixels, and more settings. "serial"
are network calls one after the other, "total" the guided evaluations in them, "widest" the network samples in the
largest, all means over prompts. "own" is the difference, in grey levels, to the method's own sequential limit,
"to N" to N-step DDIM. "speedup" is the seconds of the sequential run over those of the method, prompt by prompt.
"""

import argparse
import contextlib
import time

import numpy as np
import pandas as pd
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionParadigmsPipeline,
    StableDiffusionPipeline,
)
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import common
from models import scenes
from refinement import difference, judge
from sampler import Sampler
from settings import SCHEDULES, STOP_RULES

STEPS = (25, 100, 200, 1000)
FEWER = (10, 15, 20, 25)
TOLERANCES = (1e-1, 1e-2, 1e-3)
MOST = 4  # refinements to show; a run goes on until each rule has stopped it


def with_scheduler(pipeline, scheduler, kind=StableDiffusionPipeline):
    """A pipeline of the same parts with another scheduler."""
    names = "vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"
    parts = {name: pipeline.components[name] for name in names}
    return kind(**parts, scheduler=scheduler, requires_safety_checker=False)


@contextlib.contextmanager
def watched(network):
    """The network samples of each call, a list that grows."""
    calls = []
    hook = network.register_forward_pre_hook(lambda network, inputs: calls.append(len(inputs[0])))
    try:
        yield calls
    finally:
        hook.remove()


def diffusers_run(pipeline, steps, sampler, text, seed, **settings):
    """Image, seconds and the network samples of each call of one of diffusers' own pipelines."""
    pipeline.set_progress_bar_config(disable=True)
    with watched(pipeline.unet) as calls:
        started = time.perf_counter()
        latents = pipeline(
            text, num_inference_steps=steps, latents=sampler.loop("", seed).x,
            output_type="latent", **sampler.arguments, **settings,
        ).images  # fmt: skip
        image = sampler.image(latents)
        return image, time.perf_counter() - started, calls


def row(sampler, name, truth, own, image, seconds, serial, total, widest):
    """One run's entry; `truth` is the sequential run's image and seconds, `own` the method's own limit."""
    return {
        "N": sampler.settings.fine_steps, "method": name, "serial": serial, "total": total, "widest": widest,
        "seconds": seconds, "speedup": truth[1] / seconds, "own": difference(image, own),
        "to N": difference(image, truth[0]), "image": image,
    }  # fmt: skip


def encode(sampler, text):
    """A prompt, and the seconds of encoding it, which diffusers' pipelines take as well."""
    started = time.perf_counter()
    prompt = sampler.encode(text)
    return prompt, time.perf_counter() - started


def refined_rows(sampler, text, seed, truth, name):
    """An entry for each refinement, and for where each stop rule leaves the run."""
    settings, rows, stops, earlier = sampler.settings, [], {}, None
    prompt, encoding = encode(sampler, text)
    with watched(sampler.pipeline.unet) as calls:
        for refinement in sampler.vary(tolerance=0).refine(prompt, seed):
            k, image, seconds = refinement.k, refinement.image, encoding + refinement.seconds
            counts = refinement.serial_evaluations, refinement.total_evaluations, max(calls)
            rows.append(row(sampler, f"{name}, k={k}", truth, truth[0], image, seconds, *counts))
            last = refinement.exact or refinement.all_nodes or k == settings.max_iterations
            for rule in STOP_RULES:
                if rule not in stops and (last or judge(refinement, earlier, rule, settings.tolerance) == "converged"):
                    stops[rule] = {**rows[-1], "method": f"{name}, {rule} rule"}
            if k >= MOST and len(stops) == len(STOP_RULES):
                break
            earlier = refinement
    return rows + [stops[rule] for rule in STOP_RULES]


def prompt_rows(sampler, blocks, text, seed, peers):
    """All entries of one prompt at one N."""
    N, config, pipeline = sampler.settings.fine_steps, sampler.model.scheduler.config, sampler.pipeline
    trailing = {"timestep_spacing": "trailing"}
    if peers:
        ddim = with_scheduler(pipeline, DDIMScheduler.from_config(config, **trailing))
        image, seconds, calls = diffusers_run(ddim, N, sampler, text, seed)
        pair = calls[0]
    else:  # diffusers' DDIM steps past the grid where N does not divide the training steps
        prompt, encoding = encode(sampler, text)
        sequential = sampler.sequential(prompt, seed)
        image, seconds, pair = sequential.image, encoding + sequential.seconds, max(sampler.loop(prompt, seed).rows)
    truth = image, seconds
    rows = [row(sampler, "sequential DDIM", truth, image, *truth, N, N, pair)]
    for B, schedule in blocks:
        varied = sampler.vary(coarse_steps=B, schedule=schedule)
        rows += refined_rows(varied, text, seed, truth, f"SRDS {schedule} B={B}")
    B, schedule = blocks[0]
    varied = sampler.vary(coarse_steps=B, schedule=schedule, max_iterations=1)
    rows.append({**refined_rows(varied, text, seed, truth, "")[1], "method": f"SRDS {schedule} B={B}, bound to 1"})
    rows += refined_rows(sampler.vary(method="collocation", coarse_steps=1), text, seed, truth, "collocation")
    if not peers:
        return rows
    for window in sorted({round(N**0.5), min(N, 64 if N == 1000 else N)}):
        for tolerance in TOLERANCES:
            scheduler = DDIMParallelScheduler.from_config(config, **trailing)
            paradigms = with_scheduler(pipeline, scheduler, StableDiffusionParadigmsPipeline)
            run = diffusers_run(paradigms, N, sampler, text, seed, parallel=window, tolerance=tolerance)
            counts = len(run[2]), sum(run[2]) / pair, max(run[2])
            rows.append(row(sampler, f"ParaDiGMS {window}, {tolerance:g}", truth, image, *run[:2], *counts))
    for steps in FEWER:
        for name, kind in (("DDIM", DDIMScheduler), ("DPM-Solver++", DPMSolverMultistepScheduler)):
            more = trailing if kind is DDIMScheduler else {}
            other = with_scheduler(pipeline, kind.from_config(config, **more))
            run = diffusers_run(other, steps, sampler, text, seed)
            rows.append(row(sampler, f"{name} {steps}", truth, run[0], *run[:2], len(run[2]), steps, pair))
    return rows


def summarise(rows, attributes):
    """A line for each N and method over the prompts."""
    table = pd.DataFrame(rows)
    table["adherence"] = [
        scenes.read(image) == attributes[text] for image, text in zip(table.pop("image"), table.prompt)
    ]
    groups = table.groupby(["N", "method"], sort=False)
    summary = groups[["serial", "total", "widest", "seconds"]].mean()
    for name, function in (("speedup", "median"), ("speedup min", "min"), ("speedup max", "max")):
        summary[name] = groups.speedup.agg(function)
    for name in ("own", "to N"):
        summary[name], summary[f"{name}, worst"] = groups[name].mean(), groups[name].max()
    summary["adherence, %"] = 100 * groups.adherence.mean()
    return summary.reset_index()


def plot(table, path):
    table = table[table.N.isin(STEPS)]
    figure = Figure(figsize=(4 * table.N.nunique(), 8), layout="constrained")
    grid = figure.subplots(2, table.N.nunique(), squeeze=False)
    for column, (N, part) in zip(grid.T, table.groupby("N")):
        for axes, across in zip(column, ("serial", "seconds")):
            refinements = part[part.method.str.contains("k=")]
            for name, line in refinements.groupby(refinements.method.str.partition(", ")[0], sort=False):
                style = "k-" if name == "collocation" else "-" if "pipelined" in name else ":"
                axes.plot(line[across], line["to N"].clip(lower=1e-3), style, marker="o", markersize=4, label=name)
            others = part[part.method.str.contains("Para|DPM|DDIM")]
            groups = others.groupby(others.method.str.replace(r"[,]? [0-9.e-]+$", "", regex=True), sort=False)
            for (name, line), marker in zip(groups, "*sDv^<"):
                if name != "sequential DDIM":
                    axes.plot(line[across], line["to N"].clip(lower=1e-3), "--", color="0.4", marker=marker, label=name)
            axes.axvline(part[part.method == "sequential DDIM"][across].iloc[0], color="black", linewidth=0.8)
            axes.axhline(1, color="0.7", linestyle=":")
            axes.set(xscale="log", yscale="log", xlabel={"serial": "serial evaluations"}.get(across, across))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set(ylabel="difference to N-step DDIM, grey levels", title=f"N = {N}")
        column[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=16, help="a quarter of them above N = 200 (%(default)s)")
    parser.add_argument("--steps", type=int, nargs="*", default=[25, 100, 961, 1000, 200, 196],
                        help="the results of the others stay (%(default)s)")  # fmt: skip
    args = parser.parse_args()
    loaded, path = common.load(args.model), common.RESULTS / "peers.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame({"N": []})
    # ParaDiGMS ends so. The model's usual guidance goes by its name, which a pipeline made here does not have.
    to_one = DDIMScheduler.from_config(loaded.model.scheduler.config, set_alpha_to_one=True)
    sampler = Sampler(with_scheduler(loaded.pipeline, to_one), arguments=loaded.arguments)
    texts, attributes = common.prompts(np.random.default_rng(11), args.prompts)
    for N in args.steps:
        sqrt = round(N**0.5)
        varied = sampler.vary(fine_steps=N, coarse_steps=sqrt)
        blocks = [(B, schedule) for B in (sqrt, 2 * sqrt) for schedule in SCHEDULES]  # pipelined first
        print(f"N = {N}:", flush=True)
        rows = []
        for i, text in enumerate(texts[: args.prompts // 4 if N > 200 else None]):
            started = time.perf_counter()
            new = prompt_rows(varied, blocks, text, 42 + i, peers=N in STEPS)
            rows += [{**entry, "prompt": text} for entry in new]
            print(f"  prompt {i + 1}: {time.perf_counter() - started:.0f} s", flush=True)
        table = pd.concat([table[table.N != N], summarise(rows, dict(zip(texts, attributes)))]).sort_values(
            "N", kind="stable"
        )
        common.save(table, "peers")
    plot(table, common.RESULTS / "peers.png")
