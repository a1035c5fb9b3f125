"""The process that rewards run in: `python -m megatron_gspo.reward.worker`.

In: requests on standard input, one JSON object a line. Out: one JSON object a line for each, on standard output.

    {"load": "package.module:function"}                      -> {} or {"error": …}
    {"score": "package.module:function", "prompt": {…},
     "response_text": …, "finished": …}                      -> {"reward": 0.5} or {"error": …}

A reward may hang, take the process with it, or print: whoever started the process deals with the first two, and what is
printed goes to standard error. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import json
import numbers
import os
import sys
from collections.abc import Callable
from typing import IO

import numpy as np

from megatron_gspo.import_path import import_attribute
from megatron_gspo.types import Prompt, UserError

_LARGEST_REWARD = float(np.finfo(np.float32).max)


def main() -> None:
    """Answer requests until standard input ends."""
    requests, replies = _claim_standard_streams()
    functions: dict[str, Callable[..., object]] = {}
    for line in requests:
        request = json.loads(line)
        reply = _load(request["load"], functions) if "load" in request else _score(request, functions)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _claim_standard_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Keep the two pipes for requests and replies; a reward that prints or reads gets standard error and nothing."""
    requests = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return requests, replies


def _load(import_path: str, functions: dict[str, Callable[..., object]]) -> dict[str, object]:
    try:
        function = import_attribute(import_path)
    except UserError as error:
        return {"error": str(error)}
    if not callable(function):
        return {"error": f"{import_path!r} is not a function"}
    functions[import_path] = function
    return {}


def _score(request: dict[str, object], functions: dict[str, Callable[..., object]]) -> dict[str, object]:
    function = functions[str(request["score"])]
    fields = request["prompt"]
    assert isinstance(fields, dict), "the scorer writes every request"
    prompt = Prompt(**{**fields, "token_ids": tuple(fields["token_ids"])})
    try:
        return {"reward": _checked(function(prompt, request["response_text"], request["finished"]))}
    except Exception as error:  # a reward of one's own may raise anything: that it did is the reply
        return {"error": f"{type(error).__name__}: {error}"}


def _checked(reward: object) -> float:
    if not isinstance(reward, numbers.Real):
        raise TypeError(f"the reward returned a {type(reward).__name__}; a number is accepted")
    number = float(reward)
    if not abs(number) <= _LARGEST_REWARD:  # also true of NaN
        raise ValueError(f"the reward returned {number}; a finite float32 is accepted")
    return number


if __name__ == "__main__":
    main()
