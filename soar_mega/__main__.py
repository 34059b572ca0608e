"""`python -m soar_mega` is the soar-mega command, under torchrun too."""

import sys

# A checkpoint save spawns a helper process that imports this module again: nothing heavy here, and the guard stays.
if __name__ == "__main__":
    from soar_mega.cli import main

    sys.exit(main())
