"""Near-OOD and far-OOD tables, with the flags of OpenOOD's script of the same name."""

import sys

from fusenorm_openood.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
