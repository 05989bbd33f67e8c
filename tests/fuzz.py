"""How many random cases a test of a kernel tries: n, and 25 times as many with `--hypothesis-profile=thorough`."""

from hypothesis import Phase, settings

_QUICK_EXAMPLES, THOROUGH = 25, 25

settings.register_profile("quick", max_examples=_QUICK_EXAMPLES, deadline=None, derandomize=True)
# For mutants, which most tests notice: fewer cases, and of a failure not its simplest form.
settings.register_profile(
    "mutants", settings.get_profile("quick"), max_examples=10, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("thorough", max_examples=THOROUGH * _QUICK_EXAMPLES, deadline=None)


def cases(n: int) -> settings:
    """A decorator for `@given`, to be evaluated after pytest has chosen the profile, as test modules are."""
    profile = settings.get_profile(settings.get_current_profile_name())
    return settings(max_examples=n * profile.max_examples // _QUICK_EXAMPLES)
