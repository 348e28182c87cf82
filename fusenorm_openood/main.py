"""``python -m fusenorm_openood.main``: see :mod:`fusenorm_openood.openood.pipelines`."""

import sys

from fusenorm_openood.openood.pipelines import main as main

if __name__ == "__main__":
    sys.exit(main())
