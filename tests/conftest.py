"""Settings for every test."""

from hypothesis import settings

# How long an example takes depends on what else the machine does; pytest's own time limit stops a test that hangs.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
