"""How far the code that stands in for the end of a row is from that end, in pictures: no model has a say.

    .venv/bin/python scripts/evidence/colours.py --images imagenette2/val

Pictures are cropped to squares and averaged to 24 x 24 pixels; a pixel is a code. 1,000 of them, evenly spread.
"""

import argparse
from pathlib import Path
from typing import get_args

import numpy as np
from models import OUT
from PIL import Image
from tables import table, write
from tqdm import tqdm

from zipar_train import Grid, Plan
from zipar_train.plan.stand_in import StandIn
from zipar_train.plan.table import NEVER

SIDE, PICTURES, WINDOWS = 24, 1000, [12, 6, 3, 2, 1]


def small(path: Path) -> np.ndarray:
    """Colours of the middle of a picture, (SIDE * SIDE, 3), 0 .. 255."""
    picture = Image.open(path).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(square, dtype=np.float64).reshape(-1, 3)


def pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its folders, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))


def apart(colours: np.ndarray, plan: Plan) -> float:
    """Root mean square, over pictures and channels, of what its stand-ins are off by."""
    stands = plan.expires != NEVER
    off = colours[:, plan.source[stands]] - colours[:, plan.position[stands]]
    return float(np.sqrt((off**2).mean()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="a folder of pictures, folders in it too")
    found = parser.parse_args().images
    paths = pictures(found)
    if not paths:
        parser.error(f"no .jpeg, .jpg or .png in {found}")
    chosen = [paths[len(paths) * k // PICTURES] for k in range(PICTURES)] if len(paths) > PICTURES else paths
    colours = np.stack([small(path) for path in tqdm(chosen, unit="pictures")])
    grid = Grid(SIDE, SIDE)
    rows = [
        [rule, *(f"{apart(colours, Plan.zipar(grid, window=window, stand_in=rule)):.1f}" for window in WINDOWS)]
        for rule in get_args(StandIn)
    ]
    write("colours", OUT, table(["stands in", *(f"window {window}" for window in WINDOWS)], rows))
