"""The paper in miniature: runs a study of GSPO and GRPO through the program, and says which of the paper's claims it bears out.

    study.py       what is run: models, arms, experiments; decided before any result
    claims.py      what is asked, and the rule by which each answer is given; decided before any result
    answers.py, reward_rules.py, routing_rules.py   the rules
    plan.py        the runs, in order, with what they cost
    models.py      the models' directories
    worker.py      one run in a process of its own, forked from one that has imported the program
    schedule.py    all runs: side by side, gone on with where they were stopped, never twice
    measure.py     run directories in, numbers out
    intervals.py   paired differences and their intervals
    figures.py     PNGs
    document.py    the results as Markdown and JSON

The analysis reads run directories alone.
"""
