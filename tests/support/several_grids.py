"""A tiny Emu3 on three grids, its text tokenizer, and shards of pictures of several sizes."""

import io
import tarfile

from commands import picture

from zipar_train.data.tokenize import tokenize
from zipar_train.recipe.load import load_recipe

CODES = 12
WORDS = ["<pad>", "<bos>", "<unk>", "<|image start|>", "<|image token|>", "4*4", "3*6", "6*3", "a", "red", "car", "bad"]
TOKENS = [*WORDS, "<|extra_200|>", *(f"<|extra_{k}|>" for k in range(201, 208))]
TOKENS += [f"<|visual token {k:06d}|>" for k in range(CODES)]
SIDES = [(4, 4), (3, 6), (6, 3)]
SIZES = [(40, 40), (60, 30), (33, 60), (44, 40), (90, 46)]  # of pictures: width, height
NEAREST = [(4, 4), (3, 6), (6, 3), (4, 4), (3, 6)]
COUNT = 30


def words(folder):
    """A tokenizer of text as Emu3's, with few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<|image start|>", "<|image token|>"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=special,
    ).save_pretrained(folder)
    return folder


def overrides(words, folder, *more):
    return [
        "model.size=null",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "model.hidden_size=16",
        "model.ffn_size=24",
        f"model.codebook_size={CODES}",
        "model.grid=[4,4]",
        "model.other_grids=[[3,6],[6,3]]",
        f"model.token_prompt={{encoder: {words}, tokens: 8, vocabulary: {len(TOKENS)}, negative_prompt: bad}}",
        "model.tokenizer=palette",
        "model.tokenizer_weights=null",
        "model.weights=null",
        "tune.lora=null",
        "tune.compile=false",
        "tune.attention=sdpa",
        "tune.distill=0",
        "zipar.windows={5: 1, 2: 1}",
        "evaluate.windows=[5,2]",
        f"data.train={folder}/train.json",
        f"data.val={folder}/val.json",
        "data.micro_batch_size=4",
        "data.workers=0",
        "optim.global_batch_size=4",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.val_check_interval=1.0",
        "trainer.max_epochs=1",
        "log.wandb=disabled",
        f"run_dir={folder}/run",
        *more,
    ]


def shards(words, folder):
    """Shards of COUNT pictures of several sizes, `train.json` and `val.json`."""
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for i in range(COUNT):
                buffer = io.BytesIO()
                picture(i, SIZES[i % 5]).save(buffer, "png")
                for kind, data in (("png", buffer.getvalue()), ("txt", b"a red car")):
                    member = tarfile.TarInfo(f"{i:04d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        recipe = load_recipe("emu3-gen", overrides(words, folder))
        tokenize(recipe, images=str(folder / f"{split}.tar"), out=folder, split=split, per_shard=11, progress=False)
    return folder
