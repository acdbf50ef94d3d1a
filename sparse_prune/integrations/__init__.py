"""Where people already work: Hugging Face."""
