"""The command `demo`: a web page that generates images."""

import errno
import os
import socket
from typing import Annotated

import typer

from zipar_train.cli.options import EitherCheckpointOption, Int8Option, OrRecipeOption, SetOption, one_of


def demo(
    checkpoint: EitherCheckpointOption = None,
    recipe: OrRecipeOption = None,
    overrides: SetOption = [],  # noqa: B006
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: other machines can use it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 7860,
    int8: Int8Option = False,
) -> None:
    """Show a web page on which images grow, until Ctrl-C. Needs pip install "zipar-train[demo]"."""
    source = one_of(checkpoint, recipe, overrides)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ModuleNotFoundError:
        raise ValueError('demo needs gradio: pip install "zipar-train[demo]"') from None
    from zipar_train.decoding.generator import load
    from zipar_train.demo.page import build_page

    check_free(host, port)
    generator = load(source, overrides=overrides, int8=int8)
    if generator.inference_family.tokenizer is None:
        raise ValueError("demo needs pixels: set model.tokenizer in the recipe")
    page = build_page(generator).queue(max_size=20)
    look = gradio.themes.Default(primary_hue="orange", neutral_hue="stone")
    how = {"share": False, "quiet": True, "prevent_thread_lock": True, "footer_links": ["api"], "theme": look}
    _, address, _ = page.launch(server_name=host, server_port=port or None, ssr_mode=False, **how)
    print(f"{generator.recipe.name}: {address}    Ctrl-C ends it", flush=True)
    page.block_thread()


def check_free(host: str, port: int) -> None:
    """Check that an address can be listened on.

    Raises:
        ValueError: If it cannot.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                words = f"--host {host} is not an address of this machine: use 127.0.0.1 or 0.0.0.0"
            elif error.errno == errno.EADDRINUSE:
                words = f"--port {port} is in use: choose another, or 0 for any that is free"
            else:
                words = f"--host {host} --port {port}: {error.strerror}. Choose another port"
            raise ValueError(words) from None
