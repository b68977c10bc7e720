"""Outputs for people: images, the filmstrip, plots, the CSV of errors and printed lines.

A record is a sample as in `result.json`, see `study.folder`: a dictionary with "made_by" and "result".
"""

import io
import textwrap
import warnings

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from settings import SETTINGS, in_one_line

SHOWN, ROWS = 64, 16  # samples in an overview's pictures, and in its filmstrip
IMAGES, GAIN = 6, 20  # most images in a row of the filmstrip, and the factor of the differences below them
CELL, GAP, LINE = 192, 4, 18  # pixels: width of an image with a caption, gap in a mosaic, a line of text
image_name = lambda k: f"srds_iteration_{k}" if k else "srds_initialized"  # of refinement k, without ".png"
shades = lambda count: colormaps["viridis"](np.linspace(0, 0.8, count))  # colours for `count` values, in their order
COLORS = {"srds": "#d62728", "collocation": "#1f77b4", "sequential": "#7f7f7f"}  # the same in all plots


def pictures(records, image_of, alike=True, kinds=("png",)):
    """Return the files that show samples side by side, bytes by name; for one sample, its own.

    image_of(record, name): the sample's image of that name, without ".png", uint8 (height, width, 3). alike: whether
    all samples have the same settings; otherwise they have no common size, steps or boundaries, and only the filmstrip
    is made. kinds: formats of the plot.
    """
    results, made = ([record[name] for record in records] for name in ("result", "made_by"))
    truth = all(result["errors"] is not None for result in results)
    files = {"srds_filmstrip.png": saved(Image.fromarray(filmstrip(records, image_of, truth)).save, "png")}
    shown_as = lambda name, record: "srds_final" if "iteration" in name and name not in captions(record) else name
    names = [*max(map(captions, records), key=len), "srds_final", *["srds_ddim_course"] * truth]
    for name in names if alike else ():
        images = [image_of(record, shown_as(name, record)) for record in records[:SHOWN]]
        images = captioned(images, names_of(made, 60)) if len(images) > 1 else images
        files[f"{name}.png"] = saved(Image.fromarray(mosaic(images)).save, "png")
    if alike and truth:
        together = np.linalg.norm(padded([result["errors"] for result in results]), axis=0)  # over all samples
        files["trajectory_errors_table.csv"] = error_table(together).encode()
        errors = together / np.sqrt(sum(result["elements"] for result in results))
        files |= {f"trajectory_errors_plot.{kind}": error_plot(errors, records, kind) for kind in kinds}
    return files


def saved(save, *how, **more):
    """Return the bytes that `save` writes to the file that is its first argument."""
    file = io.BytesIO()
    save(file, *how, **more)
    return file.getvalue()


def frames(image):
    """Return the frames of a video, or an image as a single frame: uint8 (frames, height, width, 3)."""
    return image.reshape(-1, *image.shape[-3:])


def animation(images, duration):
    """Return images of one size, uint8 (images, height, width, 3), as an animated WebP; duration: milliseconds each."""
    first, *rest = map(Image.fromarray, images)
    return saved(first.save, "webp", save_all=True, append_images=rest, duration=duration, loop=0, quality=95)


def sheet(image):
    """Return an image unchanged, or for a video a mosaic of at most 25 frames, including the first and the last."""
    images = frames(image)
    return mosaic(images[np.linspace(0, len(images) - 1, min(25, len(images))).round().astype(int)])


def mosaic(images, columns=None):
    """Return images of one size as one image on white; without `columns`, in about as many columns as rows."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rest = [np.full_like(images[0], 255)] * (-len(images) % columns)
    cells = np.pad(np.stack([*images, *rest]), [(0, 0), (0, GAP), (0, GAP), (0, 0)], constant_values=255)
    height, width = cells.shape[1:3]
    rows = cells.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, columns * width, 3)[:-GAP, :-GAP]


def captioned(images, texts):
    """Return images of one size, enlarged to CELL pixels in width if they are smaller, each with a text below."""
    size = ImageOps.contain(Image.fromarray(images[0]), (max(CELL, images[0].shape[1]), 2**16)).size
    texts, cells = ["\n".join(textwrap.fill(line, size[0] // 8) for line in text.split("\n")) for text in texts], []
    below = (0, 0, 0, LINE * (1 + max(text.count("\n") for text in texts)) + GAP)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)
    for image, text in zip(images, texts):
        cell = ImageOps.expand(Image.fromarray(image).resize(size), below, "white")
        ImageDraw.Draw(cell).multiline_text((0, size[1] + 2), text, "black", font, spacing=2)
        cells.append(np.asarray(cell))
    return cells


def filmstrip(records, image_of, truth):
    """Return a picture with a row for each sample: refinements with captions, and the ground truth, if there is one.

    Below each image is its difference to the ground truth. If there are many samples or refinements, some are left out.
    """
    shown, room, rows = records[:ROWS], IMAGES - truth, []
    last = max(len(record["result"]["refinements"]) for record in shown) - 1
    chosen = range(last + 1) if last < room else [0, 1, *np.linspace(2, last, room - 2).round().astype(int).tolist()]
    rule = np.full((2 * GAP, (CELL + GAP) * (len(chosen) + truth) - GAP, 3), 255, np.uint8)  # above a line of text
    fit = lambda each: ImageOps.expand(ImageOps.contain(Image.fromarray(each), (CELL, 2**16)), (0, 0, 0, GAP), "white")
    change = lambda image, truth: (GAIN * abs(image.astype(int) - truth)).clip(max=255).astype(np.uint8)
    for record, title in zip(shown, names_of([record["made_by"] for record in shown], 160)):
        texts, final = captions(record), len(record["result"]["refinements"]) - 1
        names = [*dict.fromkeys(image_name(min(k, final)) for k in chosen), *["srds_ddim_gt"] * truth]  # none twice
        images = [image_of(record, name) for name in names]
        pairs = [[image, change(image, images[-1])] if truth else [image] for image in images]
        texts["srds_ddim_gt"] = texts.get("srds_ddim_gt", "") + f"\nlower: difference × {GAIN}"
        cells = captioned([np.vstack([*map(fit, pair)]) for pair in pairs], [texts[name] for name in names])
        stop = len(cells) - truth
        cells[stop:stop] = [np.full_like(cells[0], 255)] * (len(chosen) - stop)
        rows += [*captioned([rule], [title]), mosaic(cells, len(cells))]
    less = captioned([rule], [f"{len(shown)} of {len(records)} samples shown"]) * (len(records) > len(shown))
    return np.vstack([*rows, *less])


def captions(record):
    """Return the lines under a sample's images, by name: those of the refinements, then of the ground truth."""
    result, last = record["result"], record["result"]["refinements"][-1]
    title = lambda entry: f"k = {entry['k']}{' (final)' if entry is last else ''}"
    texts = {image_name(each["k"]): "\n".join([title(each), *facts(each)]) for each in result["refinements"]}
    return texts | ({"srds_ddim_gt": f"ground truth\n{evaluations(result['steps'])}"} if result["errors"] else {})


def facts(entry):
    """Return the texts for the caption of a refinement's image: serial evaluations and, if known, the difference."""
    known = [] if entry["difference"] is None else [f"difference {entry['difference']:.2g}"]
    return [evaluations(entry["serial_evaluations"]), *known]


def evaluations(count):
    return f"{count} serial evaluation{'' if count == 1 else 's'}"


def names_of(rows, most):
    """Return names that distinguish samples: the prompt, cut to `most` characters, and the settings that differ.

    rows: a dictionary for each sample, with its prompt, seed, settings and arguments.
    """
    names, rows = [], [row.get("arguments", {}) | row for row in rows]
    known = dict.fromkeys(name for row in rows for name in row if name in SETTINGS or name in row.get("arguments", ()))
    differing = [name for name in known if len({str(row.get(name)) for row in rows}) > 1]
    for row in rows:
        text = in_one_line(row["prompt"], most + 1)
        text = text if len(text) <= most else text[: most - 3] + "..."
        given = [f"{name.replace('_', ' ')} {row[name]}" for name in differing if row.get(name) is not None]
        names.append(", ".join(filter(None, [text, *given])) or "(no prompt)")
    return names


def padded(samples):
    """Return lists of rows as one array, (samples, refinements, ...); a sample that has stopped keeps its last row."""
    longest = max(map(len, samples))
    return np.array([rows + rows[-1:] * (longest - len(rows)) for rows in samples])


def error_table(errors):
    """Return the CSV: a row for each refinement except k = 0 (row 0 of `errors`), a column for each boundary."""
    rows = [f"Iteration_{k}" for k in range(1, len(errors))]
    columns = [f"Boundary_{i}" for i in range(1, errors.shape[1] + 1)]
    return pd.DataFrame(errors[1:], rows, columns).to_csv(float_format="%.9g", lineterminator="\n")


def error_plot(errors, records, kind):
    """Return a plot. Left: distance at each boundary after each refinement; right: difference against evaluations.

    errors: root mean squares, (refinements, boundaries). kind: as in `plotted`.
    """
    results, made, B = [record["result"] for record in records], records[0]["made_by"], errors.shape[1]
    points = [[(each["serial_evaluations"], each["difference"]) for each in one["refinements"]] for one in results]
    N, mean = results[0]["steps"], ", mean\n(band: all samples)" if len(results) > 1 else ""

    def left(axes):
        log_scale(axes, errors)
        for k, color in enumerate(shades(len(errors))):
            axes.plot(range(1, B + 1), errors[k], "o-", color=color, markersize=4, label=f"k = {k}")
        axes.set(title="State against the ground truth", xlabel="boundary", ylabel="root mean square of the difference")
        axes.xaxis.get_major_locator().set_params(integer=True)
        label_lines(axes)

    def right(axes):
        look = {"color": COLORS[made["method"]], "label": made["method"] + mean, "marker": "o", "markersize": 4}
        cost_plot(axes, [(points, look)], "serial evaluations", {N: N})
        axes.set_title("Image against the ground truth")

    words = in_one_line(results[0]["model"], 80), made["method"], made["solver"], f"N = {N}, B = {B}"
    return plotted([left, right], 2, kind, ", ".join([*words, f"samples: {len(results)}"]))


def plotted(draws, columns, kind, title=""):
    """Return a figure as the bytes of a png, pdf or svg, with text as text; `draws` are functions of axes."""
    figure = Figure(figsize=(5.5 * columns, 3.6 * (len(draws) // columns)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for draw, axes in zip(draws, figure.subplots(len(draws) // columns, columns, squeeze=False).flat):
        draw(axes)
    how = {"svg.fonttype": "none", "svg.hashsalt": "srds", "pdf.fonttype": 42}
    # A box stands for a letter that the font lacks, as in other pictures.
    with matplotlib.rc_context(how), warnings.catch_warnings(action="ignore", category=UserWarning):
        return saved(figure.savefig, format=kind, dpi=150, transparent=kind == "svg")


def log_scale(axes, values):
    """Make the vertical axis logarithmic, over whole decades; zeros lie in a grey band below them."""
    exponents = np.log10([value for value in np.ravel(values) if value > 0] or [1.0])
    low, high = int(np.floor(exponents.min())), int(np.ceil(max(exponents.max(), exponents.min() + 0.5)))
    zero = low - 0.06 * (high - low)
    axes.set_yscale("function", functions=(lambda y: np.log10(np.where(y > 0, y, 10.0**zero)), lambda y: 10.0**y))
    labels = {10.0**e: f"$10^{{{e}}}$" for e in range(low, high + 1, 1 + (high - low) // 9)}
    axes.set_yticks([0, *labels], ["0", *labels.values()])
    axes.set_ylim(10.0 ** (2 * zero - low), 10.0**high)
    axes.axhspan(10.0 ** (2 * zero - low), 10.0**low, color="0.93")


def cost_plot(axes, lines, words, costs):
    """Plot differences against costs, on an axis that is logarithmic if they are large.

    lines: for each line, its samples and its look. It shows their mean, and a band from the smallest to the largest
    value; a sample is a list of pairs of cost and difference, one for each refinement. words: the label of the axis of
    costs. costs: those of sequential sampling, by N.
    """
    log_scale(axes, [point[1] for samples, _ in lines for points in samples for point in points])
    for samples, look in lines:
        across, values = np.moveaxis(padded(samples), 2, 0)
        axes.plot(across.mean(0), values.mean(0), **look)
        axes.fill_between(across.mean(0), values.min(0), values.max(0), color=look["color"], alpha=0.15)
    how = {"color": COLORS["sequential"], "rotation": 90, "ha": "right", "va": "top", "fontsize": 8}
    for N, cost in costs.items():
        axes.axvline(cost, color=COLORS["sequential"], linestyle="--")
        axes.annotate(f"sequential, N = {N}", (cost, 0.98), (-2, 0), axes.get_xaxis_transform(), "offset points", **how)
    axes.set(xlabel=words, ylabel="difference, grey levels of 255")
    if max(costs.values()) >= 200:
        axes.set_xscale("log")
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    else:
        axes.set_xlim(0)
        axes.xaxis.get_major_locator().set_params(steps=[1, 2, 5, 10], integer=words != "seconds")
    label_lines(axes)


def label_lines(axes):
    """Write the label of a line beside its end, or of several beside the plot, near their heights; add a grid."""
    axes.grid(True, color="0.9")
    axes.autoscale_view()
    lines, figure = [line for line in axes.get_lines() if line.get_label()[0] != "_"], axes.figure
    across, heights = (axes.transData - axes.transAxes).transform([line.get_xydata()[-1] for line in lines]).T
    order, apart = heights.argsort(), np.arange(len(lines)) * min(1 / len(lines), figure.dpi / axes.bbox.height / 6)
    heights[order] = np.minimum(np.maximum.accumulate(heights[order] - apart) + apart, 1 - apart[::-1])
    aside = (across > 0.9) | (len(lines) > 1)
    for line, *place in zip(lines, np.where(aside, 1, across) + 0.02, heights):
        arrow = {"arrowstyle": "-", "color": line.get_color(), "lw": 0.5, "relpos": (0, 0.5)}
        how = {"color": line.get_color(), "va": "center", "fontsize": 8, "parse_math": False, "arrowprops": arrow}
        axes.annotate(line.get_label(), line.get_xydata()[-1], place, "data", "axes fraction", **how)


def line_of(entry):
    """Return the line that is printed about a refinement."""
    names = {"image_change": "image change", "trajectory_change": "trajectory change", "difference": "difference"}
    measured = [f"{words} {entry[name]:.2g}" for name, words in names.items() if entry[name] is not None]
    measured += [f"damping {entry['damping']:.2g}"] if entry["damping"] >= 0.005 else []
    measured = [evaluations(entry["serial_evaluations"]), *measured, entry["verdict"]]
    return f"  k = {entry['k']}: {', '.join(measured)}"
