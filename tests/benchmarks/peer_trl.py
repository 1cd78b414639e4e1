"""The peer in training: TRL's SFTTrainer on the same pairs, with the same adapter, optimizer and steps.

Everything that costs it time here and buys nothing on a CPU is switched off: gradient checkpointing (on by
default), bf16 (on by default; the comparison is float32), logging, saving, evaluation, pinned memory and
clipping. `random` is its own order of the data, `group_by_length` the order that suits it best.

    .venv-bench/bin/python tests/benchmarks/peer_trl.py WORK.json SEED random|group_by_length
"""

import sys
import tempfile
import time
from typing import Any

import common
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """From the first step's beginning to the last one's end: no set-up, no tokenising."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def train(work: dict[str, Any], seed: int, sampling: str) -> None:
    module, tokenizer = common.load(work["model"], lora=True)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-trl-"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        completion_only_loss=True,
        packing=False,
        max_length=common.MAX_LENGTH,
        per_device_train_batch_size=common.BATCH_SIZE,
        num_train_epochs=1,
        train_sampling_strategy=sampling,
        learning_rate=common.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,  # off
        optim="adamw_torch",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
        data_seed=seed,
    )
    clock = Clock()
    pairs = Dataset.from_list(work["train"])
    trainer = SFTTrainer(model=module, args=config, train_dataset=pairs, processing_class=tokenizer, callbacks=[clock])
    common.warm_up(module, common.encode(tokenizer, work["train"]), tokenizer.pad_token_id)
    trainer.train()

    held_out = common.encode(tokenizer, work["held_out"])
    common.answer(
        examples_per_s=len(pairs) / clock.seconds,
        held_out_loss=common.held_out_loss(module, held_out, tokenizer.pad_token_id),
        tokens=sum(map(len, trainer.train_dataset["input_ids"])),
        steps=trainer.state.global_step,
    )


if __name__ == "__main__":
    train(common.read_work(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
