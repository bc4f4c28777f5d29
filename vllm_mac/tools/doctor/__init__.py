"""`vllm-mac doctor`: whether MAC works here, what it does with a model, and whether that pays."""
