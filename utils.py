"""Outputs for people: images, filmstrip, error plot, CSV and printed lines.

A record is a sample as in `result.json`, see `study.folder`: a dictionary with "made_by" and "result".
"""

import io
import re

import numpy as np
import pandas as pd
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from settings import SETTINGS, in_one_line

SHOWN, ROWS = 64, 16  # samples in an overview's pictures, and in its filmstrip
CELL, GAP = 192, 4  # width of a filmstrip's picture, and space between a mosaic's, in pixels


def pictures(records, image_of, alike=True):
    """Return the files that show samples side by side, bytes by name; for one sample, its own.

    image_of(record, name): the image of a file name without ".png", uint8 (height, width, 3). alike: whether all have
    the same settings; otherwise they have no common size, steps or boundaries, and only the filmstrip is made.
    """
    results = [record["result"] for record in records]
    longest = max(len(result["refinements"]) for result in results) - 1
    truth = all(result["errors"] is not None for result in results)
    names = ["srds_initialized", *(f"srds_iteration_{k}" for k in range(1, longest + 1)), "srds_final"]
    names += ["srds_ddim_gt", "srds_ddim_course"] if truth else []
    images = lambda name, most: [image_of(record, shown_as(name, record)) for record in records[:most]]
    files = {"srds_filmstrip.png": png(filmstrip(records[:ROWS], lambda name: images(name, ROWS), names))}
    if alike:
        files |= {f"{name}.png": png(mosaic(images(name, SHOWN))) for name in names}
    if alike and truth:
        together = np.linalg.norm(padded([result["errors"] for result in results]), axis=0)  # over all samples
        files["trajectory_errors_table.csv"] = error_table(together).encode()
        files["trajectory_errors_plot.png"] = error_plot(together, results, results[0]["steps"])
    return files


def shown_as(name, record):
    """Return the name of the image shown as `name` in an overview: the final one from the last refinement on."""
    refinement = re.fullmatch(r"srds_iteration_([0-9]+)", name)
    return "srds_final" if refinement and int(refinement[1]) >= len(record["result"]["refinements"]) - 1 else name


def png(image):
    """Return the PNG bytes of an image, uint8 (height, width, 3)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def frames(image):
    """Return the frames of a video, or an image as a single frame: uint8 (frames, height, width, 3)."""
    return image.reshape(-1, *image.shape[-3:])


def animation(video):
    """Return a video, uint8 (frames, height, width, 3), as the bytes of an animated WebP with 8 frames a second."""
    first, *rest = map(Image.fromarray, video)
    file = io.BytesIO()
    first.save(file, "webp", save_all=True, append_images=rest, duration=125, loop=0, quality=90)
    return file.getvalue()


def sheet(image):
    """Return an image unchanged, or for a video a mosaic of at most 25 frames, including the first and the last."""
    images = frames(image)
    return mosaic(images[np.linspace(0, len(images) - 1, min(25, len(images))).round().astype(int)])


def mosaic(images):
    """Return images of one size as one, in about as many rows as columns on white; a single image is unchanged."""
    columns = int(np.ceil(np.sqrt(len(images))))
    rest = [np.full_like(images[0], 255)] * (-len(images) % columns)
    cells = np.pad(np.stack([*images, *rest]), [(0, 0), (0, GAP), (0, GAP), (0, 0)], constant_values=255)
    height, width = cells.shape[1:3]
    rows = cells.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, columns * width, 3)[:-GAP, :-GAP]


def filmstrip(records, images, names):
    """Return a picture with a row for each sample and captioned columns from the initialisation to the ground truth."""
    names = [name for name in names if name not in ("srds_ddim_course", "srds_final")]  # the last refinement is final
    height, width = images(names[0])[0].shape[:2]
    size, font = (CELL, round(CELL * height / width)), ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)
    line, gap = 18, 8
    row = line + 6 + size[1] + 3 * line + 2 * gap
    strip = Image.new("RGB", (gap + (CELL + gap) * len(names), row * len(records)), "white")
    draw = ImageDraw.Draw(strip)
    for r, name in enumerate(names_of([record["made_by"] for record in records], 160)):
        draw.text((gap, r * row + gap), name, "black", font)
    for c, name in enumerate(names):
        left = gap + c * (CELL + gap)
        for r, (record, image) in enumerate(zip(records, images(name))):
            top = r * row + gap + line + 6
            strip.paste(ImageOps.contain(Image.fromarray(image), size, Image.Resampling.BICUBIC), (left, top))
            draw.multiline_text((left, top + size[1] + 2), caption(name, record), "black", font, spacing=2)
    return np.asarray(strip)


def caption(name, record):
    """Return the lines under a picture of the filmstrip."""
    if name == "srds_ddim_gt":
        return f"ground truth\n{evaluations(record['result']['steps'])}"
    refinements = record["result"]["refinements"]
    entry = refinements[0 if name == "srds_initialized" else min(int(name.split("_")[2]), len(refinements) - 1)]
    title = f"k = {entry['k']}"
    return "\n".join([f"final ({title})" if shown_as(name, record) == "srds_final" else title, *facts(entry)])


def facts(entry):
    """Return the facts for the caption of a refinement's image: a list of texts."""
    known = [] if entry["difference"] is None else [f"difference {entry['difference']:.2g}"]
    return [evaluations(entry["serial_evaluations"]), *known]


def evaluations(count):
    return f"{count} serial evaluation{'' if count == 1 else 's'}"


def names_of(rows, most):
    """Return names that distinguish samples: the prompt, cut, then the seed and each setting in which they differ.

    rows: dictionaries with the prompt, seed, settings and arguments of each.
    """
    names, rows = [], [row.get("arguments", {}) | row for row in rows]
    known = dict.fromkeys(name for row in rows for name in row if name in SETTINGS or name in row.get("arguments", ()))
    differing = [name for name in known if len({str(row.get(name)) for row in rows}) > 1]
    for row in rows:
        text = in_one_line(row["prompt"], most + 1) or "(no prompt)"
        text = text if len(text) <= most else text[: most - 3] + "..."
        given = [f"{name.replace('_', ' ')} {row[name]}" for name in differing if row.get(name) is not None]
        names.append(", ".join([text, *given]))
    return names


def padded(samples):
    """Return lists of rows as one array, (samples, refinements, ...); a sample that stopped keeps its last row."""
    longest = max(map(len, samples))
    return np.array([rows + rows[-1:] * (longest - len(rows)) for rows in samples])


def error_table(errors):
    """Return the CSV: a row for each refinement except k = 0 (row 0 of `errors`), a column for each boundary."""
    rows, columns = errors.shape
    table = pd.DataFrame(errors[1:], columns=[f"Boundary_{i}" for i in range(1, columns + 1)])
    table.index = [f"Iteration_{k}" for k in range(1, rows)]
    return table.to_csv(float_format="%.9g", lineterminator="\n")


def error_plot(errors, results, steps):
    """Return PNG bytes. Left: error at each boundary after each refinement; right: difference against evaluations."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)

    count = len(errors)
    labelled = set(np.linspace(0, count - 1, min(count, 9)).round().astype(int))
    _scale(left, errors)
    for k, row in enumerate(errors):
        color = colormaps["viridis"](0.9 * k / max(count - 1, 1))
        label = f"k = {k}" if k in labelled else None
        left.plot(range(1, len(row) + 1), row, color=color, marker="os^Dv<>pX"[k % 9], label=label)
    left.set(xlabel="boundary", ylabel="L2 norm of the state's difference", title="Trajectory against the ground truth")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=8, ncols=2 if count > 5 else 1)

    shown = [[(entry["serial_evaluations"], entry["difference"]) for entry in result["refinements"]]
             for result in results]  # fmt: skip
    ticks, mean = padded(shown).mean(0).T
    _scale(right, [value for points in shown for _, value in points])
    if len(shown) > 1:
        for i, points in enumerate(shown):
            right.plot(*zip(*points), "o-", color="0.65", label=None if i else "one sample")
    right.plot(ticks, mean, "ks-", label="refinements" if len(shown) == 1 else f"mean of {len(shown)}")
    right.axvline(steps, color="0.4", linestyle="--", label=f"sequential: N = {steps}")
    right.set(xlabel="serial evaluations", ylabel="difference, grey levels of 255")
    right.set_title("Image against the ground truth")
    right.set_xlim(0, 1.05 * max(steps, *(points[-1][0] for points in shown)))
    right.legend(fontsize=8)

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _scale(axes, values):
    """Make the axis logarithmic down to the least positive value, and linear from there to 0."""
    values = np.asarray(values, float)
    axes.set_yscale("symlog", linthresh=min(values[values > 0], default=1.0))
    axes.grid(True, color="0.9")


def line_of(entry):
    """Return one line about a refinement."""
    names = {"image_change": "image change", "trajectory_change": "trajectory change", "difference": "difference"}
    measured = [f"{words} {entry[name]:.2g}" for name, words in names.items() if entry[name] is not None]
    measured += [f"damping {entry['damping']:.2g}"] if entry["damping"] >= 0.005 else []
    measured = [evaluations(entry["serial_evaluations"]), *measured, entry["verdict"]]
    return f"  k = {entry['k']}: {', '.join(measured)}"
