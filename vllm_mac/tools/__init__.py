"""The commands of `vllm-mac`, which the backend itself never imports."""
