"""The paper's experiments in its layout: serial and total evaluations, seconds, and how close SRDS comes to N steps.

    python -m benchmarks.paper --model demo      # writes results/paper-demo.csv; further options are those of main.py
    python -m benchmarks.paper --model stabilityai/stable-diffusion-2-1 --clip openai/clip-vit-base-patch16

N and B as in the paper, vanilla (`--schedule sweep`) and pipelined, one to three refinements and the default stop rule,
by one sweep of the command. "speedup": the sequential run's seconds over SRDS's. "clip": the cosine of image and prompt
times 100, mean; "clip, sequential": that of the ground truth.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
STEPS = "fine-steps:coarse-steps=25:5,100:10,196:14,961:31"
STOPS = "max-iterations:tolerance=1:0,2:0,3:0,31:0.1"


def clip_scores(name, pictures):
    """The cosine of image and prompt, times 100, by pair of prompt and path; name: a CLIP model's folder or hub id."""
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    model, processor, scores = CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name), {}
    for text, path in {*pictures}:
        with Image.open(path) as image, torch.no_grad():
            inputs = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt", truncation=True)
            scores[text, path] = float(model(**inputs).logits_per_image / model.logit_scale.exp()) * 100
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Further options go to main.py.")
    parser.add_argument("--model", default="demo", help="as of main.py (%(default)s)")
    parser.add_argument("--prompts", default="prompts.txt", help="as of main.py (%(default)s)")
    parser.add_argument("--clip", help="a CLIP model's folder or hub id; without it there are no CLIP scores")
    args, further = parser.parse_known_args()
    name = f"paper-{Path(args.model).name.lower()}"
    folder = ROOT / "output" / name
    sweeps = [word for sweep in (STEPS, "schedule=sweep,pipelined", STOPS) for word in ("--sweep", sweep)]
    command = [
        sys.executable,
        "main.py",
        "-o",
        folder,
        "--model",
        args.model,
        "--prompts",
        args.prompts,
        *sweeps,
        *further,
    ]
    subprocess.run(command, cwd=ROOT, check=True)

    rows = pd.read_csv(folder / "results.csv", keep_default_na=False, na_values=[""]).query("final").copy()
    rows["stop"] = rows.max_iterations.map("k = {:.0f}".format).where(rows.tolerance == 0, "default stop")
    rows["speedup"] = rows.sequential_seconds / rows.seconds
    columns = ["k", "serial_evaluations", "total_evaluations", "seconds", "speedup", "difference"]
    if args.clip:
        for column, file in (("clip", "srds_final"), ("clip, sequential", "srds_ddim_gt")):
            pictures = list(zip(rows.prompt, (folder / "samples" / rows.folder / f"{file}.png")))
            scores = clip_scores(args.clip, pictures)
            rows[column] = [scores[picture] for picture in pictures]
            columns.append(column)
    table = rows.groupby(["fine_steps", "coarse_steps", "schedule", "stop"], sort=False)[columns].mean().reset_index()
    table.to_csv(ROOT / "benchmarks" / "results" / f"{name}.csv", index=False, float_format="%.5g")
    print(table.round(3).to_string(index=False))
