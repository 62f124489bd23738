"""python -m gemma4_compile"""

import sys

from .cli import main

sys.exit(main())
