"""Exchange with Hugging Face directories, both ways: safetensors and JSON only, never pickle, never remote code."""
