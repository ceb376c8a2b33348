"""Makes the folders of tests importable by name: ``from oracles.published import published_logits``."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)
