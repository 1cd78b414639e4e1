"""Peak memory of two rounds with N simulated participants that train all weights of a small random Llama.

One update is 1.7 MB: a server that kept a thousand of them would show it.

    python tests/benchmarks/many_participants.py N
"""

import resource
import sys

import common
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel


def tiny_model() -> LocalModel:
    """Two layers, 0.4 M parameters, one token a character."""
    characters = {chr(code): code - 32 + 2 for code in range(32, 127)}
    vocabulary = {"<pad>": 0, "</s>": 1, **characters, "\n": len(characters) + 2}
    characterwise = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characterwise.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characterwise, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LocalModel(LlamaForCausalLM(config), tokenizer, name="tiny")


def main(count: int) -> None:
    chain = LLMChain(llm=LocalLLM(model=tiny_model()), prompt="Reverse: {text}\n")
    numbers = {f"p{i}": [str(8 * i + j) for j in range(8)] for i in range(count)}
    participants = {name: [(text, text[::-1]) for text in texts] for name, texts in numbers.items()}
    federation = FederatedAveraging(
        chain, participants=participants, lr=1e-3, batch_size=8, seed=0, evaluation=None, progress=False
    )
    federation.fit(rounds=2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    common.answer(peak_bytes=peak, rounds=federation.round)


if __name__ == "__main__":
    main(int(sys.argv[1]))
