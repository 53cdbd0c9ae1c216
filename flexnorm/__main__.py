"""``python -m flexnorm`` and ``flexnorm``: the command line, which is part of the lab."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs where the lab's dependencies are not installed."""
    try:
        from flexnorm.lab.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "flexnorm":
            raise
        sys.exit(f"the flexnorm command needs {error.name}: pip install 'flexnorm[lab]'")
    run()


if __name__ == "__main__":
    main()
