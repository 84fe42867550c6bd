"""`python -m sparsight.cli VERB`, for where the script is not on the path."""

import sys

from sparsight.cli.main import main

sys.exit(main())
