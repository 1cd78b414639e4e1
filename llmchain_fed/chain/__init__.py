"""LLMChain and the faces of a local model: the only home of langchain_core beside `library`."""
