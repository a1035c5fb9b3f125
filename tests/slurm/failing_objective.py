"""An objective that cannot be made, for a run that fails at the same step however often it is tried."""

raise RuntimeError("this objective always fails")
