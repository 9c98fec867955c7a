"""`python -m trl_ext`, and `accelerate launch -m trl_ext`."""

import sys

from trl_ext.cli import main


if __name__ == "__main__":
    sys.exit(main())
