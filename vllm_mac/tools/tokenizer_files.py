"""Whether a model comes with a tokenizer."""

from pathlib import Path


def has_tokenizer(model: str) -> bool:
    """Whether a model's folder has a tokenizer; true for a name on the hub, which is not looked up."""
    folder = Path(model)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
    return not folder.is_dir() or any((folder / name).exists() for name in names)
