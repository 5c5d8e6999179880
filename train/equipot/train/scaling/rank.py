"""One rank of a point that several processes train together: an ordinary rank that knows the controls too."""

import sys

from equipot.train.worker import main

if __name__ == "__main__":
    sys.exit(main())
