"""The command `generate`: images."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from zipar_train.cli.options import (
    EitherCheckpointOption,
    Int8Option,
    OrRecipeOption,
    SetOption,
    animation_file,
    codes_file,
    integers,
    one_of,
    picture_file,
    sides,
    user_path,
)


def generate(
    checkpoint: EitherCheckpointOption = None,
    recipe: OrRecipeOption = None,
    out: Annotated[
        Path | None, typer.Option(parser=user_path, callback=picture_file, metavar="PATH", help="The picture to write.")
    ] = None,
    codes: Annotated[
        Path | None,
        typer.Option(parser=user_path, callback=codes_file, metavar="PATH", help="The .safetensors file of codes."),
    ] = None,
    animate: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            callback=animation_file,
            metavar="PATH",
            help="The .gif, .webp or .mp4 file to write: the images as they grow, next-token beside the window (a "
            "quarter of a row if not given), without and with lookahead (32 if not given).",
        ),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    labels: Annotated[str | None, typer.Option(help="Class numbers, for example 3,5: one image each.")] = None,
    captions: Annotated[
        list[str], typer.Option("--caption", help="A text-conditional model's prompt: one image each. Repeatable.")
    ] = [],  # noqa: B006
    window: Annotated[int | None, typer.Option(help="1 .. the grid's width; next-token if not given.")] = None,
    released: Annotated[
        bool,
        typer.Option(
            "--released", help="Baseline: decode as the released ZipAR code does, attending to unwritten slots."
        ),
    ] = False,
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive", help="A row starts once its first code passes verification, at --window the earliest."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Image k of a seed is always the same.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1: none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the most probable code.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0: no cut.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1: no cut.")] = None,
    lookahead: Annotated[
        int | None, typer.Option(help="Slots fed per pass, 32 for example: the same images in fewer passes; 0: none.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Rows and columns of codes, 48x64 for example; one of the recipe's grids.")
    ] = None,
    int8: Int8Option = False,
) -> None:
    """Generate images into one picture, a file of codes, an animation, or all of them. Defaults are the recipe's."""
    if (labels is None) == (not captions):
        raise ValueError("give either --labels or --caption")
    if out is None and codes is None and animate is None:
        raise ValueError("give --out for a picture, --codes for a file of codes, or --animate for an animation")
    if released and adaptive:
        raise ValueError("the released code has no adaptive windows: drop --released or --adaptive")
    if adaptive and window is None:
        raise ValueError("--adaptive needs --window: the smallest that a row may open at")
    if lookahead and (released or adaptive):
        raise ValueError(f"--lookahead does not go with {'--released' if released else '--adaptive'}: leave one out")
    wanted: Any = integers("--labels", labels) if labels is not None else captions
    source = one_of(checkpoint, recipe, overrides)
    from zipar_train.decoding.generator import load

    given: dict[str, Any] = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "lookahead": lookahead,
    }
    generator = load(source, overrides=overrides, int8=int8)
    settings = {key: value for key, value in given.items() if value is not None}
    mode: Any = "released" if released else "adaptive" if adaptive else "planned"
    generate_images = partial(generator.generate, wanted, seed=seed, grid=sides("--grid", grid))
    if animate is not None and generator.inference_family.tokenizer is None:
        raise ValueError("--animate needs pixels: set model.tokenizer in the recipe, or use --codes")
    if out is not None or codes is not None:
        images = generate_images(window=window, mode=mode, pixels=out is not None, **settings)
        if codes is not None:
            images.save_codes(codes)
        if out is not None:
            images.save(out)
        passes = images.passes.double()
        mean = f"{passes.mean():.1f} passes on average, {int(passes.min())} to {int(passes.max())}"
        files = " and ".join(str(path) for path in (out, codes) if path is not None)
        print(f"{files}: {len(images)} images in {mean if len(passes.unique()) > 1 else f'{int(passes[0])} passes'}")
    if animate is not None:
        row = generator.family(sides("--grid", grid)).grid.row_length
        window = max(1, row // 4) if window is None else window
        ways: list[tuple[str, dict[str, Any]]] = [("next-token", {"lookahead": 0})]
        words = f"window {window}" if mode == "planned" else f"window {window}, {mode}"
        ways.append((words, {"window": window, "mode": mode, **({"lookahead": 0} if mode == "planned" else {})}))
        if mode == "planned":
            ahead = settings.get("lookahead") or 32
            ways.append((f"window {window}, lookahead {ahead}", {"window": window, "lookahead": ahead}))
        panels = [(words, generate_images(trace=True, **settings | how)) for words, how in ways]
        (title, first), *beside = panels
        first.animate(animate, title=title, beside=beside)
        slowest = ", ".join(f"{words}: {int(images.passes.max())}" for words, images in panels)
        print(f"{animate}: {len(panels[0][1])} images; passes of the slowest, {slowest}")
