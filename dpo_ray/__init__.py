"""Online and offline preference optimization for language models, distributed with Ray."""
