"""``python -m transkd_fast`` is the ``transkd`` command."""

import sys

from transkd_fast.cli import main

sys.exit(main())
