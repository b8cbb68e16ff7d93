"""Weights and shards for a recipe without downloading any: random, in the published layouts, at the published sizes.

    python scripts/gpu/synthetic_data.py WORK [--small] [--set KEY=VALUE ...]

WORK/model.pt is a LlamaGen, WORK/tokenizer.pt a VQ-16, WORK/data/{train,val}.json are shards. A sixteenth of the codes
occurs in the shards, so that a model learns something within a few steps.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import write_shards
from zipar_train.models.family import build
from zipar_train.models.llamagen.state_dict import to_published
from zipar_train.recipe.load import load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "reference"))
from original import random_vq  # noqa: E402

PUBLISHED = {"base": 128, "mult": (1, 1, 2, 2, 4), "latent": 256, "embed": 8, "blocks": 2}  # of vq_ds16_c2i.pt
IMAGES = {"train": 1024, "val": 64}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("work", type=Path)
parser.add_argument("--small", action="store_true", help="a small tokenizer")
parser.add_argument("--set", dest="overrides", action="append", default=[])
asked = parser.parse_args()
recipe = load_recipe("llamagen-l", asked.overrides)

torch.manual_seed(0)
family = build(recipe.model, device="cuda" if torch.cuda.is_available() else "cpu")
state = {name: tensor.cpu() for name, tensor in family.model.state_dict().items()}
heads = family.model.config.num_attention_heads
torch.save({"model": to_published(state, heads=heads, codes=recipe.model.codebook_size)}, asked.work / "model.pt")
shape = {} if asked.small else PUBLISHED
torch.save({"model": random_vq(**shape, codes=recipe.model.codebook_size)[0]}, asked.work / "tokenizer.pt")

rng = np.random.default_rng(0)
rows, columns = recipe.model.grid
layout = Layout(
    source="synthetic", grid=(rows, columns), codes=recipe.model.codebook_size, classes=recipe.model.num_classes
)
for split, count in IMAGES.items():
    samples = (
        Sample(f"{split}{i:06d}", rng.integers(recipe.model.codebook_size // 16, size=(1, rows, columns)), i % 1000)
        for i in range(count)
    )
    write_shards(samples, asked.work / "data" / f"{split}.json", per_shard=256, layout=layout)
for path in sorted(asked.work.rglob("*.*")):
    if path.suffix in (".pt", ".json", ".tar"):
        print(f"{path.stat().st_size / 2**20:9.1f} MiB  {path.relative_to(asked.work)}")
