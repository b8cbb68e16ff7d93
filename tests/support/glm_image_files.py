"""A tiny GLM-Image in the published layout: the autoregressive stage, its processor, and the recipe's section."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import interpolate

from zipar_train.recipe.model import Model, Words

CODES, VOCABULARY = 24, 200
GRID, PREVIEW = [3, 4], [2, 3]
SPECIAL = ["<|dit_token_24|>", "<|dit_token_25|>", "<sop>", "<eop>", "<|image|>", "<pad>", "<unk>", "<first>"]
WORDS = ["2", "3", "4", "11", "13", "18", "22", "a", "blue", "red", "car", "house", "small", "bad"]
CAPTIONS = ["a blue car", "a small red house", "car"]
# the published template of text alone: the text itself; tags stand in place of images
TEMPLATE = (
    "{% for m in messages %}{% for item in m.content %}"
    "{% if item.type == 'text' %}{{ item.text }}{% else %}<|image|>{% endif %}{% endfor %}{% endfor %}"
)
SHAPE = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden_size": 32, "ffn_size": 24}
OVERRIDES = [
    "model.size=null",
    *(f"model.{key}={value}" for key, value in SHAPE.items()),
    f"model.codebook_size={CODES}",
    f"model.grid={GRID}",
    f"model.preview={PREVIEW}",
]
CONFIG = {
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 29,
        "eos_token_id": 25,
        "vision_vocab_size": CODES + 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 2, 1],
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "intermediate_size": 16,
    },
    "vq_config": {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16},
    "image_start_token_id": CODES,
    "image_end_token_id": CODES + 1,
    "image_token_id": CODES + 4,
}


def write_checkpoint(folder: Path) -> Path:
    """Write the folders of a diffusers checkpoint that this stage needs, and return the folder."""
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration

    torch.manual_seed(0)
    model = GlmImageForConditionalGeneration(GlmImageConfig(**CONFIG))
    with torch.no_grad():  # so that every context, and every position, matters
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "visual.embeddings.position_embedding.weight")):
                parameter.mul_(4)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(45)
            elif parameter.ndim > 1:
                parameter.mul_(15)
            elif name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                parameter.normal_(std=0.2 if "v_proj" in name else 1)
            elif name.endswith("post_mlp_layernorm.weight"):
                parameter.mul_(0.1)
    model.save_pretrained(folder / "vision_language_encoder", max_shard_size="60KB")
    write_processor(folder / "processor")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "GlmImagePipeline"}))
    return folder


def write_processor(folder: Path) -> None:
    """Write the processor, whose tokenizer starts texts with a special token if it is asked for those."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import GlmImageImageProcessor, GlmImageProcessor, PreTrainedTokenizerFast

    words = [*(f"<|dit_token_{k}|>" for k in range(CODES)), *SPECIAL, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<first> $A", special_tokens=[("<first>", words.index("<first>"))]
    )
    text = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|dit_token_24|>",
        eos_token="<|dit_token_25|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
        chat_template=TEMPLATE,
    )
    images = GlmImageImageProcessor(
        patch_size=16, merge_size=1, temporal_patch_size=1, size={"shortest_edge": 16, "longest_edge": 2**20}
    )
    GlmImageProcessor(image_processor=images, tokenizer=text, chat_template=TEMPLATE).save_pretrained(folder)


class StandIn:
    """A pipeline in place of diffusers': every code is a grey, with the noise of its generator."""

    loaded: list = []

    @classmethod
    def from_pretrained(cls, folder, **options):
        if not (folder / "transformer").is_dir():
            raise OSError("no transformer")
        cls.loaded.append(options)
        return cls()

    def set_progress_bar_config(self, disable):
        assert disable

    def to(self, device):
        return self

    def __call__(self, *, prompt, prior_token_ids, height, width, generator, output_type):
        assert output_type == "pt" and len(prompt) == len(generator) == len(prior_token_ids)
        grey = prior_token_ids.view(-1, 1, height // 16, width // 16).float() / CODES
        noise = torch.stack([torch.rand(1, height // 16, width // 16, generator=each) for each in generator])
        images = interpolate((grey + noise) / 2, scale_factor=16).expand(-1, 3, -1, -1)
        return SimpleNamespace(images=images)


def section(folder: Path, *, tokens: int = 20, **changes) -> Model:
    words = Words(encoder=str(folder / "processor"), tokens=tokens, vocabulary=VOCABULARY)
    given = {
        "family": "glm-image",
        "grid": GRID,
        "preview": PREVIEW,
        "codebook_size": CODES,
        "tokenizer": "glm-image",
        "tokenizer_weights": str(folder),
        "token_prompt": words,
        **SHAPE,
    }
    return Model(**(given | changes))
