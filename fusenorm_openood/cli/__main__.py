"""``python -m fusenorm_openood.cli``: the command ``fusenorm``."""

import sys

from fusenorm_openood.cli.main import main

sys.exit(main())
