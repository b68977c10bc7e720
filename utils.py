"""What a person looks at: images, filmstrip, error plot, CSV and the lines printed."""

import io
import re
import textwrap

import numpy as np
import pandas as pd
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from settings import in_one_line

SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "ddpm": "DDPM", "dpmsolver++": "DPM++ 2M"}
MOST_TEXT = 4000  # characters of a prompt in what an image says of itself
CELL, GAP = 192, 4  # width of a filmstrip's picture, and space between a mosaic's, in pixels


def stage(name, result):
    """The image that stands for `name` in an overview: from a prompt's last iteration on, its final one."""
    iteration = re.fullmatch(r"srds_iteration_([0-9]+)", name)
    return "srds_final" if iteration and int(iteration[1]) >= len(result["iterations"]) - 2 else name


def png(image, text):
    """PNG bytes of a uint8 (height, width, 3) image with text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", pnginfo=chunks)
    return file.getvalue()


def parameters(result, about):
    """A sample's settings in the words of AUTOMATIC1111's web UI, which others read as well."""
    settings = settings_of(result, about)
    size = f"{settings['width']}x{settings['height']}"
    words = {
        "Steps": settings["fine_steps"], "Sampler": SAMPLERS.get(settings["solver"], settings["solver"]),
        "CFG scale": settings["guidance_scale"], "Seed": result["seed"], "Size": size, "Model": about["model"]["name"],
    }  # fmt: skip
    last = ", ".join(f"{name}: {value}" for name, value in words.items() if value is not None)
    away = [f"Negative prompt: {settings['negative_prompt'][:MOST_TEXT]}"] if settings["negative_prompt"] else []
    return "\n".join([result["prompt"][:MOST_TEXT], *away, last])


def mosaic(images):
    """Images of one size side by side in rows, on white, about as many rows as columns; one alone as it is."""
    columns = int(np.ceil(np.sqrt(len(images))))
    rest = [np.full_like(images[0], 255)] * (-len(images) % columns)
    cells = np.pad(np.stack([*images, *rest]), [(0, 0), (0, GAP), (0, GAP), (0, 0)], constant_values=255)
    height, width = cells.shape[1:3]
    rows = cells.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, columns * width, 3)[:-GAP, :-GAP]


def filmstrip(results, images, names, about):
    """How each prompt's image converges: a row a prompt, captioned columns from the initialisation to the truth."""
    names = [name for name in names if name not in ("srds_ddim_course", "srds_final")]  # the last iteration is final
    height, width = images(names[0])[0].shape[:2]
    size, font = (CELL, round(CELL * height / width)), _font()
    line, gap = 18, 8
    row = line + 6 + size[1] + 3 * line + 2 * gap
    strip = Image.new("RGB", (gap + (CELL + gap) * len(names), row * len(results)), "white")
    draw = ImageDraw.Draw(strip)
    for r, name in enumerate(names_of(results, 160)):
        draw.text((gap, r * row + gap), name, "black", font)
    for c, name in enumerate(names):
        left = gap + c * (CELL + gap)
        for r, (result, image) in enumerate(zip(results, images(name))):
            top = r * row + gap + line + 6
            strip.paste(ImageOps.contain(Image.fromarray(image), size, Image.Resampling.BICUBIC), (left, top))
            caption = "\n".join(_caption(name, result, settings_of(result, about)["fine_steps"]))
            draw.multiline_text((left, top + size[1] + 2), caption, "black", font, spacing=2)
    return np.asarray(strip)


def captioned(image, lines):
    """An image, at least 256 pixels wide, with lines of text below: uint8 (height, width, 3)."""
    picture, font, line = Image.fromarray(image), _font(), 18
    times = -(-256 // picture.width)
    picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.BICUBIC)
    lines = [part for text in lines for part in textwrap.wrap(in_one_line(text), picture.width // 8)]
    whole = Image.new("RGB", (picture.width, picture.height + line * len(lines) + 2 * GAP), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for i, text in enumerate(lines):
        draw.text((GAP, picture.height + GAP + i * line), text, "black", font)
    return np.asarray(whole)


def _font():
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)


def names_of(results, most):
    """Samples' prompts, cut, with their seeds where a prompt has several, and their settings in a sweep."""
    seeds = {}
    for result in results:
        seeds.setdefault(result["prompt"], set()).add(result["seed"])
    names = []
    for result in results:
        text = in_one_line(result["prompt"], most + 1)
        parts = [text if len(text) <= most else text[: most - 3] + "...", result.get("setting")]
        parts[1:1] = [f"seed {result['seed']}"] if len(seeds[result["prompt"]]) > 1 else []
        names.append(", ".join(filter(None, parts)))
    return names


def settings_of(result, about):
    """The settings of a sample: the run's, and in a sweep its own."""
    return about["settings"] | result.get("settings", {})


def _caption(name, result, steps):
    if name == "srds_ddim_gt":
        return ["ground truth", _evaluations(steps)]
    i = -1 if name == "srds_initialized" else int(name.rpartition("_")[2])
    entry = result["iterations"][min(1 + i, len(result["iterations"]) - 1)]
    title = stage_name(entry["iteration"])
    return [f"final ({title})" if stage(name, result) == "srds_final" else title, *facts(entry)]


def stage_name(iteration):
    """What an iteration is called where a person reads it; the initialisation is number -1."""
    return f"iteration {iteration}" if iteration >= 0 else "initialised"


def facts(entry):
    """What is said under a refinement's image: a list of texts."""
    error = entry["image_error"]
    return [_evaluations(entry["serial_evaluations"]), *([] if error is None else [f"difference {error:.3f}"])]


def _evaluations(count):
    return f"{count} serial evaluation{'' if count == 1 else 's'}"


def similarity(image, truth):
    """PSNR, dB (None for equal images), and SSIM of two uint8 images (height, width, 3)."""
    smallest = min(image.shape[:2])
    window = min(7, smallest - 1 + smallest % 2)  # the library's own, or what fits
    return {
        "psnr": None if (image == truth).all() else float(peak_signal_noise_ratio(truth, image)),
        "ssim": float(structural_similarity(truth, image, channel_axis=2, win_size=window)),
    }


def mean_points(samples):
    """The mean point by refinement of samples, each a list of points (x, y): (refinements, 2).

    A sample that stopped earlier keeps its last point.
    """
    longest = max(map(len, samples))
    return np.mean([points + points[-1:] * (longest - len(points)) for points in samples], 0)


def combine_errors(errors):
    """Norms over all prompts together, each (refinements + 1, B); a prompt that stopped keeps its last row."""
    longest = max(map(len, errors))
    padded = [np.pad(error, ((0, longest - len(error)), (0, 0)), mode="edge") for error in errors]
    return np.sqrt(np.square(padded).sum(0))


def error_table(errors):
    """The CSV: a row a refinement, a column a block; the initialisation, row 0 of `errors`, is left out."""
    rows, columns = errors.shape
    table = pd.DataFrame(errors[1:], columns=[f"Timestep_{i}" for i in range(columns)])
    table.index = [f"Iteration_{i}" for i in range(rows - 1)]
    return table.to_csv(float_format="%.9g", lineterminator="\n")


def error_plot(errors, results, steps):
    """PNG bytes. Left: error at each boundary after each refinement; right: image difference against evaluations."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)

    count = len(errors)
    labelled = set(np.linspace(0, count - 1, min(count, 9)).round().astype(int))
    floor = _zero_line(left, errors)
    for k, row in enumerate(errors):
        color = colormaps["viridis"](0.9 * k / max(count - 1, 1))
        _line(left, range(1, len(row) + 1), row, floor, color, "os^Dv<>pX"[k % 9],
              stage_name(k - 1) if k in labelled else None)  # fmt: skip
    left.set(xlabel="boundary", ylabel="L2 error of the latents", title="Trajectory against the truth")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=8, ncols=2 if count > 5 else 1)

    shown = [
        [(entry["serial_evaluations"], entry["image_error"]) for entry in result["iterations"]] for result in results
    ]
    ticks, mean = mean_points(shown).T
    floor = _zero_line(right, [*mean, *(error for points in shown for _, error in points)])
    if len(shown) > 1:
        for i, points in enumerate(shown):
            _line(right, *zip(*points), floor, "0.65", "o", None if i else "a prompt's refinements")
    label = "refinements" if len(shown) == 1 else f"mean of {len(shown)} prompts"
    _line(right, ticks, mean, floor, "black", "s", label)
    right.axvline(steps, color="0.4", linestyle="--", label=f"sequential: N = {steps}")
    right.set(xlabel="serial evaluations", ylabel="mean difference, 0-255", title="Image against the truth")
    right.set_xlim(0, 1.05 * max(steps, *(points[-1][0] for points in shown)))
    right.legend(fontsize=8)

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _zero_line(axes, values):
    """Make the axis logarithmic with a place for exact zeros below all else; returns where that is."""
    values = np.asarray(values, float)
    positive = values[values > 0]
    axes.set_yscale("log")
    axes.grid(True, color="0.9")
    floor = 10.0 ** np.floor(np.log10(positive.min()) - 0.5) if len(positive) else 1e-3
    if not len(positive):
        axes.set_ylim(floor / 10, 1)
    if (values == 0).any():
        axes.axhline(floor, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate("exactly 0", (0.01, floor), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
    return floor


def _line(axes, x, y, floor, color, marker, label):
    y = np.asarray(y, float)
    axes.plot(x, np.where(y > 0, y, floor), color=color, marker=marker, markersize=5, linewidth=1.4, label=label)
    zeros = y == 0
    axes.plot(np.asarray(x)[zeros], np.full(zeros.sum(), floor), marker, color="white", markeredgecolor=color, zorder=3)


def report(entry, state):
    """One refinement in one line."""
    keys = {"image_change": "image change", "trajectory_change": "trajectory change", "image_error": "difference"}
    measured = [f"{label} {entry[key]:.3f}" for key, label in keys.items() if entry[key] is not None]
    measured += [f"damping {entry['damping']:.2f}"] if entry["damping"] >= 0.005 else []
    measured = [_evaluations(entry["serial_evaluations"]), *measured, state]
    return f"  {stage_name(entry['iteration'])}: {', '.join(measured)}"
