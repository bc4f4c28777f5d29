"""`vllm-mac doctor`: whether MAC would work here, what it would do with a model, and whether that would pay."""
