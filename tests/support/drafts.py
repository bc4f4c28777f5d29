"""Drafts of which a test knows how many tokens are right: a proposer as vLLM's `custom_class` takes them."""

import random
from typing import ClassVar


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
