"""Answers beside their sources: a question is retrieved for, read and answered, and every passage's part in it told."""
