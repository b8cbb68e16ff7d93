"""Entry point of `zipar-train` and of `python -m zipar_train`, which Lightning uses to start further processes."""

import sys


def main() -> None:
    """Install signal handlers before any slow import, then run the command line."""
    from zipar_train.run.signals import Stopped, raised

    with raised() as heard:
        try:
            from zipar_train.cli import main as run

            run()
        except Stopped as stop:
            heard.quiet()
            print(f"zipar-train: {stop}", file=sys.stderr)
            sys.exit(128 + stop.signum)
        finally:
            heard.leave()


if __name__ == "__main__":
    main()
