"""What several test files share. Tests import it as `support`; it is no part of the product."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
