"""Does MAC keep a model's answers: prompts, scores and comparisons."""
