"""Which experts each token activates: Routing Replay, and how far an update changes the routes (expert volatility, §5.3).

Recording and replaying happens inside Megatron's routers, for the length of a `with` block:

    tap.py                  how does a router's question find its answer?   a model in, record and replay contexts out
    replay.py               what is it answered, and was all of it used?    routes in, experts and live scores out
    record.py               how are routes kept?                            layers and tokens in, room for experts out
    engine_routes.py        what did the rollout engine choose (R3)?        its arrays in, packed routes out

Measuring is pure functions on index tensors, one file a question:

    change.py               which experts did a token lose?             routes in, experts replaced out
    load.py                 how is the work spread over the experts?    token counts in, CV, entropy, dead experts out
    margin.py               does a close decision flip more easily?     router margins in, bins and AUC out
    volatility.py           all of that, for every MoE layer            routes in, counts that add up out
    volatility_metrics.py   what is reported and kept                   counts in, metrics and arrays out
    ratio_coupling.py       are the ratios of rerouted tokens noisier?  ratios and change in, spreads, correlation out
    ratio_decomposition.py  how much of a ratio's variance is routing?  two measurements of a ratio in, shares out

Everything that is collected adds up (`additive.py`): over micro-batches, mini-batches and, in one all-reduce, over ranks.
"""
