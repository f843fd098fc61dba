"""Other formats: GGUF files for llama.cpp, and what each engine serves."""
