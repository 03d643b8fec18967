"""``python -m kdkernels`` is the command ``kdkernels``."""

import sys

from kdkernels.cli import main

sys.exit(main())
