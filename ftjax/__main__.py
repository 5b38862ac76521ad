"""`python -m ftjax` is the command `ftjax`."""

import sys

from ftjax.cli.main import main

sys.exit(main())
