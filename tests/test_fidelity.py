"""Does the shipped default keep the testbed's answers? A small look on CPUs; `vllm-mac eval` has the figures.

One run of `vllm-mac eval` on the trained model in examples/testbed: retrieval, a long plan, and the
divergence of the next byte under teacher forcing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTBED = Path(__file__).resolve().parent.parent / "examples" / "testbed"
