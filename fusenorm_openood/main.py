"""Run `fusenorm_openood.openood.pipelines` as `python -m fusenorm_openood.main`."""

import sys

from fusenorm_openood.openood.pipelines import main as main

if __name__ == "__main__":
    sys.exit(main())
