"""The engine room: a Hugging Face module and its tokenizer. Knows torch, nothing of LangChain, data or federation."""
