"""Next-token generation with transformers' own `generate`, the baseline without this package."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from zipar_train.decoding.state import prompts
from zipar_train.models.family import Family
from zipar_train.plan.table import ROW_END
from zipar_train.recipe.schema import SamplingParams


class RowEnds(LogitsProcessor):
    """Logits processor that forces the row-end token, id V, after every row of W codes, and forbids it elsewhere.

    It maps logits of V codes, (R, V), to those of V + 1 tokens. The released models do the same: Emu3 in
    image_generation.py by `prefix_allowed_tokens_fn`, Lumina-mGPT in inference_solver.py by a logits processor.
    """

    def __init__(self, width: int):
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        ends = input_ids.shape[1] % (self.width + 1) == self.width
        if ends:
            return torch.cat([torch.full_like(scores, -torch.inf), torch.zeros_like(scores[:, :1])], dim=1)
        return torch.cat([scores, torch.full_like(scores[:, :1], -torch.inf)], dim=1)


class Stock:
    """Next-token decoder based on transformers' `generate` with a static cache.

    On CUDA, `generate` compiles the model's forward pass whenever the cache is static, which is its default behaviour
    (transformers, generation/utils.py, `_valid_auto_compile_criteria`). It stays enabled; the first call takes up to a
    minute.

    Token ids are codes, and id V is the row end. While `generate` runs, the model's input embeddings are a table for
    these ids. The table is built once, so compiled code stays valid between calls.
    """

    def __init__(self, family: Family):
        self.family, grid = family, family.grid
        codes = torch.arange(family.codebook_size, device=family.model.device)
        if grid.row_end:
            codes = torch.cat([codes, codes.new_tensor([ROW_END])])
        with torch.no_grad():
            self.table = nn.Embedding.from_pretrained(family.embed(codes[None])[0].clone())
        self.forced = LogitsProcessorList([RowEnds(grid.width)] if grid.row_end else [])

    @property
    def passes(self) -> int:
        """Forward passes of an image: one per code and, unlike in a plan, one per row end between rows."""
        grid = self.family.grid
        return grid.num_codes + (grid.height - 1 if grid.row_end else 0)

    def notes(self, *, guided: bool) -> list[str]:
        """Return remarks on this decoder's times."""
        found = []
        if self.family.model.device.type == "cuda":
            found.append("compiles the model by itself, its default with a static cache; compiling is not in its times")
        if guided:
            found.append("generates the conditional and the unconditional rows without mixing them")
        if self.family.grid.row_end:
            found.append(
                f"takes a pass for each row end too, {self.passes} an image: they are forced by a logits processor"
            )
        return [f"transformers generate {words}" for words in found]

    @torch.inference_mode()
    def __call__(self, condition: Any, sampling: SamplingParams) -> Tensor:
        """Generate codes, int64 (R, N).

        Under guidance, R = 2 B rows are sampled independently: the cost is the same, but the logits are not mixed.
        """
        family, grid = self.family, self.family.grid
        prompt, padding = prompts(family, family.check(condition), guided=sampling.guidance != 1)
        seen = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device) if padding is None else ~padding
        sampled: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            sampled = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        own = family.model.get_input_embeddings()
        family.model.set_input_embeddings(self.table)
        try:
            generated = family.model.generate(  # type: ignore[operator]
                inputs_embeds=prompt,
                attention_mask=seen.long(),
                position_ids=torch.arange(prompt.shape[1], device=prompt.device).expand(
                    len(prompt), -1
                ),  # padding counts too
                cache_implementation="static",
                max_new_tokens=self.passes,
                min_new_tokens=self.passes,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=self.forced,
                **sampled,
            )
        finally:
            family.model.set_input_embeddings(own)
        if not grid.row_end:
            return generated
        last = generated.new_full((len(generated), 1), family.codebook_size)
        return (
            torch.cat([generated, last], dim=1).view(len(generated), grid.height, grid.row_length)[..., :-1].flatten(1)
        )
