"""What drafts: a proposer as vLLM's `custom_class` takes them, of which a test knows how many tokens are right; a draft
model and an EAGLE head that are often right."""

import json
import random
import shutil
from pathlib import Path
from typing import ClassVar

import torch


class Drafts:
    """Of each draft, of 0 to `num_speculative_tokens` tokens, a random number of tokens is right and the rest wrong.

    texts: the token sequences, each a prompt and what the model says to it, that drafts are taken from.
    """

    texts: ClassVar[list[list[int]]] = []

    def __init__(self, vllm_config):
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.draw = random.Random(0)

    def load_model(self, model) -> None:
        """There is none. vLLM's runner for CPUs asks for it."""

    def propose(self, sampled_token_ids, num_tokens, token_ids, slot_mappings=None) -> list[list[int]]:
        """sampled_token_ids: of each row. num_tokens: `[B]`, tokens of each. token_ids: `[B, *]`."""
        drafts = []
        for row, sampled in enumerate(sampled_token_ids):
            known = token_ids[row, : int(num_tokens[row])].tolist()
            count = self.draw.randint(0, self.most) if sampled else 0
            right = self.draw.randint(0, count)
            coming = next((text[len(known) :] for text in self.texts if text[: len(known)] == known), [])[:count]
            coming += [self.draw.randrange(256) for _ in range(count - len(coming))]
            drafts.append(coming[:right] + [(token + 1) % 256 for token in coming[right:]])
        return drafts


def write_near_twin(model, folder: Path) -> str:
    """The folder of a model that says nearly what `model` says: another output layer, by half its size."""
    from safetensors.torch import load_file, save_file

    twin = shutil.copytree(model, folder / "twin")
    weights = load_file(twin / "model.safetensors")
    noise = torch.randn(weights["lm_head.weight"].shape, generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] += 0.5 * weights["lm_head.weight"].std() * noise
    save_file(weights, twin / "model.safetensors", {"format": "pt"})
    return str(twin)


def write_eagle_head(model, folder: Path) -> str:
    """The folder of an EAGLE head: the model's first layer, which sees the last token, not the model's last state."""
    from safetensors.torch import load_file, save_file

    head = folder / "head"
    head.mkdir()
    config = json.loads((Path(model) / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights, size = load_file(f"{model}/model.safetensors"), config["hidden_size"]
    # A head norms its first layer's input nowhere, and joins the token's embedding and the model's state by `fc`.
    names = [name for name in weights if name.startswith("model.layers.0.") and "input_layernorm" not in name]
    join = torch.cat((torch.eye(size), torch.zeros(size, size)), 1).to(weights[names[0]].dtype)
    own = {name.removeprefix("model."): weights[name] for name in names} | {"fc.weight": join}
    save_file(own, head / "model.safetensors", {"format": "pt"})
    return str(head)
