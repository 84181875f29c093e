"""The method: scores, losses, the prompt and the joint step (docs/method.md)."""
