"""TRL's step: `python -m tools.bench.steps.trls CHECKPOINT MAX_RESPONSE_TOKENS`, told by `turns.Teller`.

Runs where TRL is installed. A step is a generation and the four optimizer steps on it; the trainer's own loop goes on,
and waits where the next begins.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tools.bench import steps
from tools.bench.steps.processes import processor_seconds
from tools.bench.steps.turns import Compared, Step, Told


def main(checkpoint: str, max_response_tokens: str) -> None:
    """Train, a step whenever told to."""
    told = Told()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    turns = Turns(told, len(tokenizer(steps.PROBLEMS[0])["input_ids"]))
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=turns.reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in steps.PROBLEMS]),
        args=settings(tempfile.mkdtemp(), int(max_response_tokens)),
        callbacks=[turns],
    )
    told.say(compared(trainer))
    trainer.train()


def settings(directory: str, max_response_tokens: int) -> GRPOConfig:
    """GSPO as TRL's documentation sets it up, at the sizes of `steps`."""
    responses = steps.PROMPTS * steps.RESPONSES_PER_PROMPT
    beta1, beta2 = steps.ADAM_BETAS
    return GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=steps.CLIP_LOW,
        epsilon_high=steps.CLIP_HIGH,
        beta=0.0,
        router_aux_loss_coef=0.0,  # by default the checkpoint's, which the paper's objective has no term for
        num_generations=steps.RESPONSES_PER_PROMPT,
        steps_per_generation=steps.MINI_BATCHES,
        per_device_train_batch_size=responses // steps.MINI_BATCHES,
        max_completion_length=max_response_tokens,
        temperature=1.0,
        learning_rate=steps.LEARNING_RATE,
        adam_beta1=beta1,
        adam_beta2=beta2,
        lr_scheduler_type="constant",
        max_steps=100_000,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


class Turns(TrainerCallback):
    """Counts tokens, and holds the trainer's loop until the next step is wanted."""

    def __init__(self, told: Told, prompt_tokens: int) -> None:
        self._told = told
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._started = 0.0

    def reward(self, completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """As this project's side scores."""
        self._tokens += sum(self._prompt_tokens + len(ids) for ids in completion_ids)
        return [steps.score(text) for text in completions]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before anything is generated."""
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last optimizer step on a generation, before the next is made."""
        if state.global_step % steps.MINI_BATCHES == 0:
            self._told.say(Step(processor_seconds() - self._started, self._tokens))
            self._wait(control)

    def _wait(self, control: Any) -> None:
        control.should_training_stop = not self._told.wait()
        self._tokens, self._started = 0, processor_seconds()


def compared(trainer: GRPOTrainer) -> Compared:
    """Make one update on `FIXED`: the trainer's loss and optimizer, in the order that its loop calls them in.

    The loop itself would sample. It goes on with the same optimizer.
    """
    before = probe(trainer.model)
    inputs = fixed_inputs()
    whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        own, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, whole, attended, inputs["completion_ids"].shape[1]
        )
    shifts = padded([fixed.shifts for fixed in steps.FIXED])
    loss = trainer.compute_loss(trainer.model, inputs | {"old_per_token_logps": own + shifts})
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    optimizer = trainer.create_optimizer()
    optimizer.step()
    optimizer.zero_grad()
    return Compared(before, loss.item(), norm.item(), probe(trainer.model))


def fixed_inputs() -> dict[str, torch.Tensor]:
    """`FIXED` as the trainer's loss takes it."""
    prompts = torch.tensor([fixed.prompt for fixed in steps.FIXED])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": padded([fixed.response for fixed in steps.FIXED]),
        "completion_mask": padded([[1] * len(fixed.response) for fixed in steps.FIXED]),
        "advantages": torch.tensor([fixed.advantage for fixed in steps.FIXED]),
    }


def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """[rows, longest], with 0 behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def probe(model: torch.nn.Module) -> list[float]:
    """Log-probs of `PROBE` after its first token."""
    ids = torch.tensor([steps.PROBE])
    with torch.no_grad():
        log_p = model(ids).logits.log_softmax(-1)[:, :-1]
    found: list[float] = log_p.gather(-1, ids[:, 1:, None]).flatten().tolist()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
