"""From a recipe to jobs on a SLURM cluster, and what has become of them.

In: a recipe, perhaps several arms and seeds of it. Out: a batch script a person can read (`slurm/train.sbatch` filled in),
submitted once everything that can be wrong has been looked at; and later each run's state.
"""
