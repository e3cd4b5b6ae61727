"""What all tests share."""

from hypothesis import settings

# No time limit per example: the machine that runs the tests may be busy.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")
