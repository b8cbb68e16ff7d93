"""The program `zipar-train`, also as `python -m zipar_train`: Lightning starts further processes that way."""

import sys


def main() -> None:
    """Listen to signals before anything is imported that takes time, then run the command line."""
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
