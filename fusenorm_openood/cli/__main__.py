"""Run the command `fusenorm` as `python -m fusenorm_openood.cli`."""

import sys

from fusenorm_openood.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
