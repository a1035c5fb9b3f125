"""The local rollout engine beside Hugging Face `generate`, on the same model.

Groups of 8 responses to 8 prompts of unequal length. Eight tokens of 272 stop a response, so lengths are long-tailed
as a trained model's are: finished responses leave this project's batch, and a group's prompt is read once.
Greedy decoding gives the same tokens on both sides; sampled responses differ, so speed is by token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.types import Prompt, SamplingSettings
from tools.bench import models
from tools.bench.harness import Bench

GROUP, MAX_TOKENS = 8, 48
STOP_TOKENS = tuple(range(8))  # of 272: a response has 33 tokens on average without its limit
PAD_TOKEN = 256


def measure(bench: Bench) -> None:
    """The same greedy responses, then the speed of sampling."""
    with tempfile.TemporaryDirectory() as directory:
        models.write_checkpoint(Path(directory))
        engine = LocalEngine(Path(directory))
        engine.update_weights(load_file(Path(directory) / "model.safetensors").items(), version=0)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    texts = [rng.integers(8, 256, 8 + 4 * number) for number in range(8)]
    prompts = [Prompt(str(n), tuple(map(int, ids)), "", "") for n, ids in enumerate(texts)]
    greedy = sample(engine, prompts, 1, temperature=0.0)
    expected = generate(theirs, prompts, 1, do_sample=False)
    bench.same("greedy tokens", torch.cat(greedy).float(), torch.cat(expected).float(), tolerance=0)

    speeds: dict[str, list[tuple[float, int]]] = {"ours": [], "generate": []}
    sides: dict[str, Callable[[], list[torch.Tensor]]] = {
        "ours": partial(sample, engine, prompts, GROUP, temperature=1.0),
        "generate": partial(generate, theirs, prompts, GROUP, do_sample=True, top_k=0, top_p=1.0),
    }
    bench.alternate({name: partial(timed, side, speeds[name]) for name, side in sides.items()})
    ours, others = (per_round(speeds[name]) for name in ("ours", "generate"))
    ratios = [mine / other for mine, other in zip(ours, others, strict=True)]
    bench.figure("tokens a second: ours / generate", ratios, better="higher", aim=1.0)
    bench.profile(sides["ours"], repeats=1)


def timed(side: Callable[[], list[torch.Tensor]], into: list[tuple[float, int]]) -> None:
    started = time.process_time()
    responses = side()
    into.append((time.process_time() - started, sum(map(len, responses))))


def per_round(turns: list[tuple[float, int]]) -> list[float]:
    """Tokens a second of the two turns of each round; the first turn was before the clock started."""
    rounds = zip(turns[1::2], turns[2::2], strict=True)
    return [(first[1] + second[1]) / (first[0] + second[0]) for first, second in rounds]


def sample(engine: LocalEngine, prompts: list[Prompt], group: int, temperature: float) -> list[torch.Tensor]:
    """This project's responses, each with its stop token."""
    settings = SamplingSettings(MAX_TOKENS, temperature=temperature, stop_token_ids=STOP_TOKENS, seed=1)
    groups = engine.generate(prompts, group, settings)
    return [torch.from_numpy(response.token_ids) for responses in groups for response in responses]


def generate(model: PreTrainedModel, prompts: list[Prompt], group: int, **options: object) -> list[torch.Tensor]:
    """What `generate` gives, cut behind the first stop token."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.tensor([[PAD_TOKEN] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts])
    torch.manual_seed(1)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=(ids != PAD_TOKEN).long(),
            max_new_tokens=MAX_TOKENS,
            num_return_sequences=group,
            eos_token_id=list(STOP_TOKENS),
            pad_token_id=PAD_TOKEN,
            **options,
        )[:, width:]
    is_stop = torch.isin(out, torch.tensor(STOP_TOKENS))
    lengths = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, out.shape[1])
    return [row[:length] for row, length in zip(out, lengths.tolist(), strict=True)]
