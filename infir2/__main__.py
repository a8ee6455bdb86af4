"""`python -m infir2` is the console script; torchrun starts it as `torchrun ... -m -- infir2 cpt RECIPE`."""

import sys

from infir2.cli import main

if __name__ == "__main__":
    sys.exit(main())
