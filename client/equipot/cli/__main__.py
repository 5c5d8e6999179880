"""Lets `python -m equipot.cli` stand for `equipot`."""

import sys

from equipot.cli.main import main

sys.exit(main())
