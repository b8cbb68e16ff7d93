"""The page: controls, images that grow, and next-token decoding with the same seed for comparison."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch
from PIL import Image

from zipar_train.decoding.animation import PENDING, filled, tinted
from zipar_train.decoding.generator import Generator
from zipar_train.decoding.pixel_stream import decoded
from zipar_train.decoding.sheet import sheet
from zipar_train.demo.inputs import MOST, labels_of, whole
from zipar_train.demo.live import LiveGenerator, Progress
from zipar_train.run.metrics_csv import validations

LOOKAHEAD, SLOWEST = 256, 200  # largest values of the sliders: slots, and milliseconds
WATCH = 3.0  # seconds that next-token takes in slow motion, about, unless it takes longer anyway
CLASSES = "207, 360, 387, 974"  # of ImageNet: golden retriever, otter, red panda, geyser
LARGE = "width: 100%; max-width: 640px"
SMALL = f"{LARGE}; image-rendering: pixelated"  # pixels of codes remain squares


def build_page(generator: Generator) -> gr.Blocks:
    """Return the page of a model.

    Args:
        generator: The model, with a tokenizer. Its one batch at a time is shared by everyone who opens the page.
    """
    classes, grid = generator.recipe.model.num_classes, generator.inference_family.grid
    row, bits, live = grid.row_length, measured_bits(generator), LiveGenerator(generator)

    def generate(
        prompt: Any, window: Any, lookahead: Any, guidance: Any, seed: Any, images: Any, slow: Any, compared: Any
    ) -> Iterator[list[str]]:
        """Yield the content of both columns, again and again."""
        try:
            count = whole("Images", images, 1, MOST)
            labels, number = labels_of(prompt, classes, count), whole("Seed", seed, 0, 2**53)  # JSON's integers
            ways = [(whole("Window", window, 1, row), whole("Lookahead", lookahead, 0, LOOKAHEAD))]
            ways += [(row, 0)] if compared else []
            pause = whole("Slow motion", slow, 0, SLOWEST) / 1000
            shown = ["", ""]
            for column, (width, ahead) in enumerate(ways):
                how = {"window": width, "lookahead": ahead, "slow": pause, "guidance": guidance, "seed": number}
                for progress in live.grow(labels, **how):
                    shown[column] = html(picture(generator, progress), words_of(progress, width, ahead, row, bits))
                    yield list(shown)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="zipar-train", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            f"## {generator.recipe.name}: rows that grow in parallel\n"
            f"{grid} codes. A row starts as soon as *window* codes of the row above exist. Missing codes are shaded."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                if classes is None:
                    prompt = gr.Textbox(label="Caption", lines=3, placeholder="A red panda in the snow")
                else:
                    some = CLASSES if classes == 1000 else ", ".join(map(str, range(min(4, classes))))
                    prompt = gr.Textbox(some, label=f"Classes, 0 .. {classes - 1}, with commas between them")
                window = slider(1, row, max(1, row // 4), step=1, label="Window", info=f"{row}: next-token")
                lookahead = slider(
                    0, LOOKAHEAD, 0, step=1, label="Lookahead", info="Slots per pass; the images stay the same. 0: none"
                )
                guidance = slider(
                    1, max(10, generator.recipe.sampling.guidance), generator.recipe.sampling.guidance, step=0.1,
                    label="Guidance", info="1: none",
                )  # fmt: skip
                seed = gr.Number(0, precision=0, label="Seed")
                images = slider(1, MOST, 4, step=1, label="Images")
                slow = slider(
                    0, SLOWEST, min(round(1000 * WATCH / grid.num_codes), 100), step=1, label="Slow motion",
                    info="Milliseconds per pass, at least. Times do not count the waits",
                )  # fmt: skip
                compared = gr.Checkbox(True, label="Then next-token with the same seed")
                with gr.Row():
                    start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
            with gr.Column(scale=2, min_width=320):
                first = gr.HTML(label="With the window")
            with gr.Column(scale=2, min_width=320):
                second = gr.HTML(label="Next-token")
        inputs, outputs = [prompt, window, lookahead, guidance, seed, images, slow, compared], [first, second]
        how: dict[str, Any] = {"api_name": "generate", "concurrency_limit": 1, "show_progress": "minimal"}
        running = gr.on([start.click, prompt.submit], generate, inputs, outputs, **how)
        stop.click(None, cancels=[running])
    return page


def slider(*args: Any, **how: Any) -> gr.Slider:
    """Return a slider whose value is checked with the others: Gradio's own complaint does not name the slider."""
    made = gr.Slider(*args, **how)
    made.preprocess = lambda payload: payload  # type: ignore[method-assign,assignment]
    return made


def picture(generator: Generator, progress: Progress) -> Image.Image:
    """Return the images so far as one sheet, with missing codes shaded."""
    if progress.images is not None:
        return progress.images.sheet(columns=columns_of(len(progress.codes)))
    tokenizer = generator.inference_family.tokenizer
    assert tokenizer is not None
    pixels = decoded(tokenizer, generator.device, filled(progress.codes, progress.known))
    shaded = tinted(pixels.float(), ~progress.known, PENDING).to(torch.uint8)
    return sheet(shaded, columns=columns_of(len(shaded)))


def html(image: Image.Image, words: str) -> str:
    """Return an image above words; it needs no file, of which every look at the progress would leave one."""
    small, buffer = image.width * image.height < 512**2, io.BytesIO()
    image.save(buffer, "webp", lossless=small, quality=90)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    style = SMALL if small else LARGE
    return f'<img src="{source}" alt="{words}" style="{style}"><p style="margin-top: 0.5em">{words}</p>'


def columns_of(images: int) -> int:
    """Return the images in a row, so that a sheet is about square."""
    return next(columns for columns in range(1, MOST + 1) if columns**2 >= images)


def words_of(progress: Progress, window: int, lookahead: int, row: int, bits: dict[int, float]) -> str:
    """Return passes, time, and the cost of the window in bits, as a sentence."""
    way = "next-token" if window == row else f"window {window}"
    way += f", lookahead {lookahead}" * bool(lookahead)
    words = f"{way}: {progress.passes} passes, {1000 * progress.seconds:,.0f} ms"
    if progress.images is None:
        return f"{words} ..."
    if window in bits and row in bits and window != row:
        words += f". It costs {bits[window] - bits[row]:+.4f} bits per code, {bits[window]:.4f} in all"
    elif bits and window == row and row in bits:
        words += f". {bits[row]:.4f} bits per code"
    elif bits:
        words += f". Bits per code were measured at windows {', '.join(map(str, sorted(bits, reverse=True)))}"
    return f"{words}."


def measured_bits(generator: Generator) -> dict[int, float]:
    """Return the validation bits per code at the end of the run, by window; empty for weights without a run."""
    checkpoint = generator.saved.path
    found = list(validations(checkpoint.parent.parent).values()) if checkpoint.suffix == ".ckpt" else []
    last = found[-1] if found else {}
    return {int(key.rpartition("_w")[2]): value for key, value in last.items() if key.startswith("val/bits_w")}
