"""``python -m moeforge``."""

import sys

from moeforge.cli.main import main

sys.exit(main())
