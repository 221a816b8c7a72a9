"""`python -m dinv.reproduce`: see the package."""

import sys

from dinv.reproduce import main

sys.exit(main(sys.argv[1:]))
