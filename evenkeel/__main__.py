"""``python -m evenkeel``: the command line."""

from evenkeel.cli import main

if __name__ == "__main__":
    main()
