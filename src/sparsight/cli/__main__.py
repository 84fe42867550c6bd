"""`python -m sparsight.cli VERB`, for when the script is not on the path."""

import sys

from sparsight.cli.main import main

sys.exit(main())
