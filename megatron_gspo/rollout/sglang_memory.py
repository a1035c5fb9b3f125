"""The memory of servers that share GPUs with the trainer: given back while the policy is updated.

In: a server at rest. Out: the same server without weights and key-value cache, and later with them again. Weights come
back empty, so a server whose memory is released calls them by a label that no version has, and new ones are sent between
`resume_weights` and `resume_cache`, so that the cache and what an update takes are not in memory together.
"""

from __future__ import annotations

from megatron_gspo.rollout.sglang_http import SglangHttp, weight_label

RELEASED = ".released"
#: How long a server may take to come to rest after its last response has arrived.
REST_TIMEOUT_S = 60


async def release(http: SglangHttp, url: str, label: str) -> None:
    """Have a server give back its memory. `label`: of the weights it holds.

    SGLang 0.5.21 ends when it is asked for this with requests under way, so it is first waited for.
    """
    await http.tell(url, f"/flush_cache?timeout={REST_TIMEOUT_S}", {})
    await http.ask(url, "/update_weight_version", {"new_version": label + RELEASED, "abort_all_requests": False})
    await http.ask(url, "/release_memory_occupation", {"tags": ["kv_cache", "weights"]})


async def resume_weights(http: SglangHttp, url: str) -> bool:
    """Have a server take memory for weights again. Returns whether it had released it: one started anew has not."""
    if not str(await weight_label(http, url)).endswith(RELEASED):
        return False
    await http.ask(url, "/resume_memory_occupation", {"tags": ["weights"]})
    return True


async def resume_cache(http: SglangHttp, url: str) -> None:
    """Have a server that holds weights again take memory for its cache."""
    await http.ask(url, "/resume_memory_occupation", {"tags": ["kv_cache"]})
