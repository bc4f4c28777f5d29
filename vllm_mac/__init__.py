"""MAC attention (match, amend, complete) as an attention backend for vLLM."""

__version__ = "0.1.0"
