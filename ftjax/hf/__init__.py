"""Other people's files in and out: Hugging Face folders, GGUF files, tokenizers and PEFT adapters."""
