"""Animations of generation: every code appears in the pass that generates it."""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zipar_train.decoding.sheet import sheet
from zipar_train.io.files import write_atomic

FORMATS = (".gif", ".webp", ".mp4")
SECONDS, HOLD = 6.0, 1.6  # of the animation, about, and of its last frame
FRAMES, DECODED = 120, 24  # at most: frames, and decodes by a tokenizer with several pixels per code
PAPER, INK, MUTED = (255, 255, 255), (32, 32, 32), (120, 120, 120)
PENDING, FRESH = (225, 221, 212), (217, 123, 60)  # colours of codes that are missing, and of those of the last passes
MARGIN, LINE = 12, 18  # pixels: around panels, of a line of text
SIDE, WIDE = 640, 1400  # pixels at most: of a panel with a tokenizer's images, of panels in one row


def animate(films: "Sequence[Film]", path: str | Path) -> None:
    """Write an animation of one or more ways to generate images, beside each other and with one clock of passes.

    Args:
        films: At least one.
        path: A file whose name ends in .gif, .webp or .mp4; the last needs ffmpeg.

    Raises:
        ValueError: If the name has another ending, or ffmpeg is missing or fails.
        OSError: If the file cannot be written.
    """
    path = check_format(Path(path))
    longest = max(film.passes for film in films)
    stride = -(-longest // FRAMES)
    ends = [*range(0, longest, stride), longest]
    frames = [_row([film.frame(end, stride) for film in films]) for end in ends]
    pause = min(max(SECONDS / len(frames), 0.04), 0.25)
    write_atomic(path, _encoded(frames, pause, path.suffix.lower()))


def check_format(path: Path) -> Path:
    """Return the path if an animation can be written to it.

    Raises:
        ValueError: If the ending is unknown, or ffmpeg is needed and missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: no animation format ends in {path.suffix!r}. Use {', '.join(FORMATS)}")
    if path.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise ValueError(f"{path}: .mp4 needs ffmpeg, which is not on the PATH. Install it, or use .gif or .webp")
    return path


class Film:
    """The frames of one way to generate images.

    Every frame shows the codes that exist after a number of passes; codes of the frame's last passes are tinted, and
    those that are still missing are shaded. Images of a tokenizer with several pixels per code are decoded every few
    passes, with missing codes filled from the row above.

    Args:
        title: Words above the images.
        codes: int64 (B, H, W).
        generated_at: The pass that generated each code, from 0, int64 (B, H, W).
        pixels: The pixels of the codes, uint8 (B, 3, height, width).
        decode: Codes (B, H, W) to such pixels.
    """

    def __init__(
        self, title: str, codes: Tensor, generated_at: Tensor, pixels: Tensor, decode: Callable[[Tensor], Tensor]
    ):
        self.title, self.codes, self.at, self.pixels, self.decode = title, codes, generated_at, pixels, decode
        self.passes = int(generated_at.max()) + 1
        self.scale = pixels.shape[-1] // codes.shape[-1]  # pixels per code
        self.every = 1 if self.scale == 1 else -(-self.passes // DECODED)
        self.decoded: tuple[int, Tensor] = (-1, pixels)

    def frame(self, end: int, stride: int) -> Image.Image:
        """Return the panel after `end` passes; codes of the last `stride` of them are tinted."""
        done = min(end, self.passes)
        fresh = (self.at < done) & (self.at >= done - stride) & (done < self.passes)
        pixels = tinted(tinted(self._pixels(done).float(), self.at >= done, PENDING), fresh, FRESH, share=0.55)
        picture = sheet(pixels.round().to(torch.uint8))
        if self.scale > 1:  # a hundred frames of megapixels are more than people, memory and files want
            picture.thumbnail((SIDE, SIDE))
        font, small = ImageFont.load_default(15), ImageFont.load_default(12)
        words = f"pass {done} of {self.passes}" if done < self.passes else f"complete after {self.passes} passes"
        width = max(picture.width, int(font.getlength(self.title)), int(small.getlength("complete after 9,999 passes")))
        panel = Image.new("RGB", (width, picture.height + 2 * LINE + 8), PAPER)
        draw = ImageDraw.Draw(panel)
        draw.text((0, 0), self.title, INK, font)
        draw.text((0, LINE + 2), words, MUTED, small)
        panel.paste(picture, (0, 2 * LINE + 8))
        return panel

    def _pixels(self, done: int) -> Tensor:
        """Return the pixels after some passes, or after a few fewer."""
        if self.scale == 1 or done == self.passes:  # a pixel depends on its own code only, and the rest is shaded
            return self.pixels
        wanted = done - done % self.every
        if self.decoded[0] != wanted:
            self.decoded = wanted, self.decode(filled(self.codes, self.at < wanted))
        return self.decoded[1]


def tinted(pixels: Tensor, mask: Tensor, colour: tuple[int, int, int], *, share: float = 1.0) -> Tensor:
    """Return pixels (B, 3, height, width) with a share of a colour where the codes of a mask (B, H, W) are."""
    scale = pixels.shape[-1] // mask.shape[-1]
    each = mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]
    tint = torch.tensor(colour, dtype=pixels.dtype)[:, None, None]
    return torch.where(each, pixels * (1 - share) + tint * share, pixels)


def filled(codes: Tensor, known: Tensor) -> Tensor:
    """Return codes (B, H, W) with unknown ones replaced by the known code above, in row 0 by the one on the left."""
    found = codes.clone()
    for column in range(1, codes.shape[2]):
        found[:, 0, column] = torch.where(known[:, 0, column], codes[:, 0, column], found[:, 0, column - 1])
    for row in range(1, codes.shape[1]):
        found[:, row] = torch.where(known[:, row], codes[:, row], found[:, row - 1])
    return found


def _row(panels: list[Image.Image]) -> Image.Image:
    """Return panels beside each other, or below each other if they are too wide."""
    across = sum(panel.width for panel in panels) + MARGIN * (len(panels) + 1) <= WIDE
    places, x, y = [], MARGIN, MARGIN
    for panel in panels:
        places.append((x, y))
        x, y = (x + panel.width + 2 * MARGIN, y) if across else (x, y + panel.height + MARGIN)
    width = max(x + panel.width for (x, _), panel in zip(places, panels, strict=True)) + MARGIN
    height = max(y + panel.height for (_, y), panel in zip(places, panels, strict=True)) + MARGIN
    page = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)  # video has even sizes
    for place, panel in zip(places, panels, strict=True):
        page.paste(panel, place)
    return page


def _encoded(frames: list[Image.Image], pause: float, suffix: str) -> bytes:
    if suffix == ".mp4":
        return _video(frames, pause)
    buffer, times = io.BytesIO(), [round(1000 * pause)] * (len(frames) - 1) + [round(1000 * HOLD)]
    if suffix == ".gif":
        frames = _indexed(frames)
    first, *rest = frames
    options = {"quality": 85, "method": 4} if suffix == ".webp" else {"optimize": False}
    first.save(buffer, suffix[1:], save_all=True, append_images=rest, duration=times, loop=0, **options)
    return buffer.getvalue()


def _indexed(frames: list[Image.Image]) -> list[Image.Image]:
    """Return frames that share a palette: their own colours, exactly, if they are 256 at most."""
    arrays = [np.asarray(frame).astype(np.int32) @ (1 << 16, 1 << 8, 1) for frame in frames]
    colours = np.unique(np.concatenate([np.unique(array) for array in arrays]))
    if len(colours) > 256:
        some = np.concatenate([np.asarray(frame) for frame in [*frames[:: -(-len(frames) // 8)], frames[-1]]])
        palette = Image.fromarray(some).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    rgb = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8)
    found = [Image.fromarray(np.searchsorted(colours, array).astype(np.uint8)).convert("P") for array in arrays]
    for frame in found:
        frame.putpalette(rgb.tobytes())
    return found


def _video(frames: list[Image.Image], pause: float) -> bytes:
    """Encode H.264 that browsers play, with ffmpeg."""
    rate, hold = round(1 / pause), round(HOLD / pause)
    raw = b"".join(frame.tobytes() for frame in [*frames, *[frames[-1]] * hold])
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames[0].width}x{frames[0].height}", "-r", str(rate)]
    coded = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "film.mp4"  # faststart writes twice: not to a pipe
        command = ["ffmpeg", "-loglevel", "error", "-y", *source, "-i", "-", *coded, str(file)]
        done = subprocess.run(command, input=raw, stderr=subprocess.PIPE)
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise ValueError(f"ffmpeg could not encode the animation ({words[-1]}). Use .gif or .webp")
        return file.read_bytes()
