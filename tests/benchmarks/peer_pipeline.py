"""The peer in generation: `prompt | HuggingFacePipeline`, langchain-huggingface's way, over the same prompts.

`as_pipeline` wraps a transformers pipeline, `HuggingFacePipeline(pipeline=…, batch_size=32)`: the batch size
stays with the wrapper and prompts run one by one. `from_model_id` hands the same batch size to the pipeline
as well, which makes true batches (so in 1.2.3).

    .venv-bench/bin/python tests/benchmarks/peer_pipeline.py WORK.json as_pipeline|from_model_id
"""

import sys
from typing import Any

import common
from langchain_core.prompts import PromptTemplate
from langchain_huggingface import HuggingFacePipeline
from transformers import pipeline


def make_llm(work: dict[str, Any], how: str) -> HuggingFacePipeline:
    length = {"max_new_tokens": work["new_tokens"], "min_new_tokens": work["new_tokens"]}
    options = {**length, "do_sample": False, "return_full_text": False}
    size = len(work["texts"])
    if how == "from_model_id":
        return HuggingFacePipeline.from_model_id(
            work["model"], task="text-generation", batch_size=size, pipeline_kwargs=options
        )
    module, tokenizer = common.load(work["model"], lora=False)
    pipe = pipeline("text-generation", model=module, tokenizer=tokenizer, device="cpu", **options)
    return HuggingFacePipeline(pipeline=pipe, batch_size=size)


def main(work: dict[str, Any], how: str) -> None:
    chain = PromptTemplate.from_template(common.PROMPT) | make_llm(work, how)
    inputs = [{"text": text} for text in work["texts"]]
    chain.batch(inputs[:2] if how == "as_pipeline" else inputs)
    answers: list[str] = []
    seconds = common.seconds(lambda: answers.extend(chain.batch(inputs)))
    common.answer(seconds=seconds, answers=answers)


if __name__ == "__main__":
    main(common.read_work(sys.argv[1]), sys.argv[2])
