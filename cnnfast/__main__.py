"""`python -m cnnfast` is the command `cnnfast`."""

import sys

from cnnfast.cli.main import main

sys.exit(main())
