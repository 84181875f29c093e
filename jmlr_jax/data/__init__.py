"""Questions and passages: reading, filtering, tokenising, and batches of token ids."""
