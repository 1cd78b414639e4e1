"""Four software publishers teach one language model to translate, without pooling their texts.

    python -m examples.translation.demo        # English → French, SmolLM2-135M-Instruct, LoRA, this machine's cores
    python -m examples.translation.demo --language de --rounds 2

Prints held-out loss and chrF per publisher before and after, sample translations, bytes and seconds; writes an HTML
report, its chart of held-out losses, the history as JSON and the chain itself to `out/demo/`.
"""

from __future__ import annotations

import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

from examples.common.catalogues import split_publishers
from examples.common.translation import (
    LANGUAGES,
    PUBLISHERS,
    make_chain,
    options,
    print_results,
    sample,
    summary_row,
    translate,
)
from llmchain_fed import FederatedAveraging, TrainingConfig
from llmchain_fed.federated.reporting.page_rounds import held_out_picture


def main() -> None:
    """Runs the demo."""
    parser = options(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--picture", type=Path, help="where the report's chart goes; by default beside it")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()

    splits = split_publishers(PUBLISHERS, args.language, train=args.train, test=args.test, seed=args.seed)
    print(f"English → {LANGUAGES.get(args.language, args.language)}: ", end="")
    print(", ".join(f"{name} {len(s.train)} + {len(s.held_out)} held out" for name, s in splits.items()))
    print("loading SmolLM2-135M-Instruct (the first time it is dequantised: about 30 s) …", flush=True)
    chain = make_chain(args.language)
    print(chain.model)

    print("translating the held-out texts with the untrained model …", flush=True)
    before = {name: translate(chain, s.held_out) for name, s in splits.items()}
    federation = FederatedAveraging(
        chain,
        participants={name: s.train for name, s in splits.items()},
        evaluation={name: s.held_out for name, s in splits.items()},
        training=TrainingConfig(learning_rate=args.lr, batch_size=args.batch_size, precision=args.precision),
        seed=args.seed,
        samples=3,
    )
    history = federation.fit(rounds=args.rounds)
    after = {name: translate(chain, s.held_out) for name, s in splits.items()}  # the same object, averaged weights

    rows = [summary_row(name, split, before, after, history) for name, split in splits.items()]
    samples = [sample(name, i, splits, before, after) for i in range(min(3, args.test)) for name in splits]
    args.out.mkdir(parents=True, exist_ok=True)
    chain.save(args.out / "chain")
    history.save(args.out / "history.json")
    print_results(rows, samples)
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} s in all. No training step saw two publishers' texts; each round they handed over their")
    print(
        "trained adapter, two counts and a few losses. The samples are held-out texts, shown because you are all four."
    )

    title = f"Four publishers, one translator: English → {LANGUAGES.get(args.language, args.language)}"
    path = history.report(args.out / "report.html", title=title)
    (args.picture or args.out / "report.svg").write_text(held_out_picture(history, title), encoding="utf-8")
    print(f"report: {path}\nchain:  {args.out / 'chain'}  (LLMChain.load reads it)")


if __name__ == "__main__":
    main()
