"""`python -m imagewright.bench.gpu`"""

import sys

from imagewright.bench.gpu.command import main

sys.exit(main())
