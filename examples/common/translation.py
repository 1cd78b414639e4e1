"""The chain that translates, its scores and its table: what the scripts over the catalogues share.

Knows the chain, the publishers and how a result is shown. Knows nothing about how a federation is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import sacrebleu
from peft import LoraConfig

from examples.common.catalogues import Split
from llmchain_fed import History, LLMChain, LocalLLM, load_prompt
from llmchain_fed.recipes.parsers import StripOutputParser

PUBLISHERS = ("django", "wagtail", "plone", "pretix")
LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish", "it": "Italian", "nl": "Dutch", "pt_BR": "Portuguese"}


def make_chain(language: str) -> LLMChain:
    """A fresh chain: the recipe's prompt over SmolLM2 with an untrained LoRA adapter on every linear layer."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    llm = LocalLLM.from_pretrained("smollm2-135m-instruct", lora=lora, max_new_tokens=32, stop=["\n\n"])
    prompt = load_prompt("translate").partial(language=LANGUAGES.get(language, language))
    return LLMChain(llm=llm, prompt=prompt, output_parser=StripOutputParser())


def translate(chain: LLMChain, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The chain's translations of the sources, as one batch."""
    answers: list[str] = chain.batch([{"text": source} for source, _ in pairs])
    return answers


def chrf(answers: Sequence[str], pairs: Sequence[tuple[str, str]]) -> float:
    """Corpus chrF2, 0 to 100 (Popović 2015), as sacrebleu computes it by default."""
    return float(sacrebleu.corpus_chrf(list(answers), [[target for _, target in pairs]]).score)


def options(description: str) -> argparse.ArgumentParser:
    """The options that every script over these publishers has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--language", default="fr", help="target language code, such as fr, de, es, nl, it, pt_BR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=int, default=160, help="training examples per publisher")
    parser.add_argument("--test", type=int, default=32, help="held-out examples per publisher")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    return parser


def summary_row(
    name: str,
    split: Split,
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
    history: History,
) -> dict[str, str | float | None]:
    """One publisher's line of the table: held-out loss and chrF before and after, bytes, seconds of training."""
    records = [record.participants[name] for record in history]
    return {
        "publisher": name,
        "examples": len(split.train),
        "loss_before": records[0].held_out_before,
        "loss_after": records[-1].held_out_after,
        "chrf_before": chrf(before[name], split.held_out),
        "chrf_after": chrf(after[name], split.held_out),
        "MB_up": sum(r.bytes_up for r in records) / 1e6,
        "MB_down": sum(r.bytes_down + r.evaluation_bytes for r in records) / 1e6,
        "seconds": sum(r.seconds or 0 for r in records),
    }


def sample(
    name: str,
    index: int,
    splits: Mapping[str, Split],
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """One held-out source with its reference and both translations."""
    source, target = splits[name].held_out[index]
    answers = {"before": before[name][index], "after": after[name][index]}
    return {"participant": name, "prompt": source, "reference": target} | answers


def print_results(rows: Sequence[Mapping[str, object]], samples: Sequence[Mapping[str, str]]) -> None:
    """The table of losses, chrF and bytes per publisher, and sample translations."""
    print(
        f"\n{'publisher':<10}{'held-out loss (nats/token)':^28}{'chrF (0–100)':^18}{'MB up / down':^16}{'seconds':>8}"
    )
    for row in rows:
        losses = f"{_number(row['loss_before']):>11} → {_number(row['loss_after']):<14}"
        scores = f"{row['chrf_before']:>6.1f} → {row['chrf_after']:<9.1f}"
        traffic = f"{row['MB_up']:>6.0f} / {row['MB_down']:<7.0f}"
        print(f"{row['publisher']:<10}{losses}{scores}{traffic}{row['seconds']:>8.0f}")
    print("\nHeld-out texts, translated before and after:")
    for item in samples:
        print(f"  {item['participant']}: {item['prompt']}")
        for key in ("before", "after", "reference"):
            first, *more = item[key].split("\n")
            print(f"    {key:<10}{first}", *(f"{'':14}{line}" for line in more), sep="\n")


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "–"
