"""What the models of `scripts/gpu/evidence` are worth on held-out images: bits a code, and Frechet distances.

    python scripts/gpu/tin/judge.py bits RUN --images 5000 --json base.json
    python scripts/gpu/tin/judge.py distances BASE TUNED CONTROL --inputs FOLDER --json FILE.json --picture FILE.png

Each result is written when it is known, so a run that is cut short leaves what it has. Drawn batches are kept, and not
drawn again.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoder import load_decoder
from inputs import DECODER, NETWORK, find
from runlog import last, logged
from squeezenet import load_extractor
from torch import Tensor

from zipar_train import load
from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest
from zipar_train.evaluation.candidates import candidates, sample_set
from zipar_train.evaluation.likelihood import bits_per_code
from zipar_train.evaluation.report.plots import plot_samples
from zipar_train.evaluation.scores.features import Extractor, Pictures
from zipar_train.evaluation.scores.reference import Reference, open_reference
from zipar_train.evaluation.scores.scores import fidelity
from zipar_train.io.files import make_folder, write_atomic
from zipar_train.models.family import build
from zipar_train.models.restore import read
from zipar_train.models.tokenizers.base import Palette, Tokenizer
from zipar_train.recipe.model import Model
from zipar_train.run.provenance import environment

SHOWN = 12  # images of each row of the picture


def write(path: Path, content: dict[str, Any]) -> None:
    make_folder(path.parent)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def made_with(device: torch.device) -> dict[str, str]:
    """Card, versions, revision; a copy without a git history is told its revision by ZIPAR_REVISION."""
    found = environment(device)
    return found | {"revision": os.environ.get("ZIPAR_REVISION") or found["revision"]}


def bits(run: Path, *, images: int, out: Path, device: torch.device) -> None:
    """Held-out bits a code at every window of the run's recipe, in float32."""
    generator = load(run, device=device)
    recipe, extra = generator.recipe, generator.saved.extra
    loader = ShardLoader(recipe.data.val, batch_size=recipe.evaluate.batch_size)
    told: dict[str, Any] = {
        "environment": made_with(device),
        "parameters": parameters_of(recipe.model),
        "steps": extra["global_step"],
        "epochs": extra["global_step"] * recipe.data.micro_batch_size / read_manifest(recipe.data.train).samples,
        "training": last(logged(run)),
        "images": min(images, loader.manifest.samples),
        "bits": {},
    }
    for window in recipe.evaluate.windows:
        found = bits_per_code(generator.inference_family, generator.plan(window), loader, images=images)
        told["bits"][str(window)] = found
        print(f"{run.name}, window {window}: {found:.4f} bits a code", flush=True)
        write(out, told)


def parameters_of(model: Model) -> int:
    """The parameters that are trained; those of a loaded generator are fused."""
    return sum(parameter.numel() for parameter in build(model, device="meta", empty=True).model.parameters())


def distances(
    runs: list[Path],
    inputs: Path,
    *,
    out: Path,
    picture: Path,
    device: torch.device,
    reference: str | None = None,
    palette: Path | None = None,
    adaptive: bool = False,
) -> None:
    """Scores of as many images as the recipe says at every window of every run, against held-out images.

    Args:
        reference: The held-out images' manifest; None: the recipe's data.val.
        palette: Colours of the codes, uint8 (V, 3), as .npy; None: the codes are the VQ-VAE's.
        adaptive: Adaptive windows, too.
    """
    decoder: Any = load_palette(palette) if palette else load_decoder(find(inputs, DECODER), device=device)
    extractor = load_extractor(find(inputs, NETWORK), device=device)
    recipe = read(runs[0]).recipe
    assert recipe is not None
    settings, model, data = recipe.evaluate, recipe.model, recipe.data
    compared = open_reference(
        reference or data.val,
        extractor,
        tokenizer=decoder,
        size=model.grid[1] * decoder.stride,
        batch_size=settings.batch_size,
        grids=model.rasters,
        codes=model.codebook_size,
    )
    told: dict[str, Any] = {
        "environment": made_with(device),
        "images": settings.images,
        "reference": compared.words,
        "reference_images": compared.images,
        "decoder": decoder.sha256,
        "features": f"{extractor.name}, 512 features",
        "features_weights": extractor.weights,
        "rows": [],
    }
    count = min(settings.images, read_manifest(data.train).samples)
    real = Pictures(lambda: blocks(data.train, decoder, count, device=device), count, words="training images")
    told["real"] = {"images": count, **scores(real, compared, extractor)}
    print(f"{count:,} training images: FD {told['real']['fid']['mean']:.3f}", flush=True)
    write(out, told)
    held = next(blocks(data.val, decoder, SHOWN, device=device))
    samples: dict[tuple[str, int], Tensor] = {("held-out images, decoded", model.grid[1]): held}
    for run in runs:
        own = read(run).recipe or recipe
        (candidate,) = candidates(own, [run], device=device)
        candidate = replace(candidate, name=run.name)
        candidate.generator.inference_family.tokenizer = decoder  # type: ignore[misc]
        ways = [("planned", window) for window in settings.windows]
        ways += [("adaptive", window) for window in settings.windows if adaptive and window < model.grid[1]]
        for mode, window in ways:
            drawn = sample_set(own, candidate, window, settings.seeds[0], out=out.parent, mode=mode)
            drawn.make(progress=False)
            row = {
                "run": run.name,
                "mode": mode,
                "window": window,
                "passes": passes_of(drawn.passes()),
                "images_per_second": drawn.speed,
                "dtype": drawn.settings["dtype"],
                **scores(drawn.pictures(), compared, extractor),
            }
            told["rows"].append(row)
            write(out, told)
            if mode == "planned":
                samples[run.name, window] = next(drawn.pixels())[:SHOWN]
            print(f"{run.name}, window {window}, {mode}: FD {row['fid']['mean']:.3f}", flush=True)
        plot_samples(samples, picture)


def passes_of(passes: Tensor) -> int | float:
    """The mean of the images' forward passes; an integer if all take as many."""
    mean = passes.double().mean().item()
    return int(mean) if (passes == passes[0]).all() else mean


def load_palette(path: Path) -> Palette:
    """A tokenizer of colours, one pixel a code.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        colours = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--palette {path}: not an array of colours ({error})") from error
    if colours.dtype != np.uint8 or colours.ndim != 2 or colours.shape[1] != 3:
        raise ValueError(f"--palette {path}: {colours.dtype} {colours.shape}, and colours are uint8 (V, 3)")
    return Palette(torch.from_numpy(colours))


def scores(pictures: Pictures, reference: Reference, extractor: Extractor) -> dict[str, Any]:
    """Each score as {mean, std}, see `zipar_train.evaluation.scores.scores`."""
    found = fidelity(extractor(pictures), reference, extractor, kid=False)
    return {name: score.model_dump() for name, score in found.items()}


def blocks(shards: str, decoder: Tokenizer, count: int, *, device: torch.device) -> Iterator[Tensor]:
    """Pixels of the first images of a shard set, uint8 (b, 3, px, px), on the CPU."""
    loader = ShardLoader(shards, batch_size=min(count, 500))
    for batch in loader:
        codes = batch.codes[:count].view(-1, *loader.manifest.grid)
        count -= len(codes)
        yield decoder.decode(codes.to(device)).cpu()
        if not count:
            return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("bits")
    verb.add_argument("run", type=Path)
    verb.add_argument("--images", type=int, default=5000)
    verb = verbs.add_parser("distances")
    verb.add_argument("runs", type=Path, nargs="+")
    verb.add_argument("--inputs", type=Path, required=True)
    verb.add_argument("--picture", type=Path, required=True)
    verb.add_argument("--reference", metavar="MANIFEST", help="held-out images; otherwise the recipe's data.val")
    verb.add_argument("--palette", type=Path, metavar="FILE.npy", help="colours of the codes, for another dataset")
    verb.add_argument("--adaptive", action="store_true", help="adaptive windows, too")
    for verb in verbs.choices.values():
        verb.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if asked.verb == "bits":
            bits(asked.run, images=asked.images, out=asked.json, device=here)
        else:
            more = {"reference": asked.reference, "palette": asked.palette, "adaptive": asked.adaptive}
            distances(asked.runs, asked.inputs, out=asked.json, picture=asked.picture, device=here, **more)
    except ValueError as error:
        sys.exit(f"judge: {error}")
