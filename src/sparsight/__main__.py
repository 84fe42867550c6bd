"""`python -m sparsight VERB` is `sparsight VERB`."""

import sys

from sparsight.cli import main

sys.exit(main())
