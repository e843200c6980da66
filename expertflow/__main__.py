"""`python -m expertflow` is the command `expertflow`."""

import sys

from .cli import main

sys.exit(main())
