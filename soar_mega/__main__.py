"""`python -m soar_mega` is the soar-mega command, under torchrun too."""

import sys

# --help answers at once: nothing heavy here. Processes that are spawned import this module again: the guard stays.
if __name__ == "__main__":
    from soar_mega.cli import main

    sys.exit(main())
