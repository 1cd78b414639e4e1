"""Did federating help four software publishers? One call of `fed.compare` on a model that translates.

    python -m examples.translation.compare_arms                  # five arms, five seeds; hours on two cores
    python -m examples.translation.compare_arms --seeds 2 --train 16 --test 12 --rounds 2 --precision bf16

Says first how long it will take. Finished trainings lie in `out/arms/`: killed and started again, it goes on there.
Prints the table, and writes it to `out/arms/comparison.html` and `comparison.json`.
"""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging as transformers_logging

from examples.common.catalogues import split_publishers
from examples.common.translation import PUBLISHERS, make_chain, options
from llmchain_fed import FederatedAveraging, TrainingConfig


def main() -> None:
    """Runs the comparison."""
    parser = options("Did federating help? Base, alone, federated, centralised and personal, on the same texts.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grid", type=float, nargs="+", help="learning rates that each arm chooses from")
    parser.add_argument("--arms", nargs="+", default=["base", "alone", "federated", "centralised", "personal"])
    parser.add_argument("--rule", default="fedit", help="how the federation averages")
    parser.add_argument("--out", type=Path, default=Path("out/arms"))
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    splits = split_publishers(PUBLISHERS, args.language, train=args.train, test=args.test, seed=0)
    fed = FederatedAveraging(
        make_chain(args.language),
        participants={name: split.train for name, split in splits.items()},
        evaluation={name: split.held_out for name, split in splits.items()},
        aggregation=args.rule,
        training=TrainingConfig(learning_rate=args.lr, batch_size=args.batch_size, precision=args.precision),
    )
    found = fed.compare(args.arms, seeds=args.seeds, rounds=args.rounds, grid=args.grid, out=args.out)
    (args.out / "comparison.html").write_text(found._repr_html_(), encoding="utf-8")
    print(f"\n{found}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
