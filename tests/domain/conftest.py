"""How hypothesis works here: no deadline (a loaded machine is no bug), as many examples as two cores have time for."""

from hypothesis import settings

settings.register_profile("domain", deadline=None, max_examples=60)
settings.load_profile("domain")
