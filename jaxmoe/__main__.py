"""`python -m jaxmoe`: see `jaxmoe.cli`."""

import sys

from jaxmoe import cli

if __name__ == "__main__":
    sys.exit(cli.main())
