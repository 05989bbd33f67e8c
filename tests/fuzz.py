"""How many random cases a kernel test tries: n, or 25 times as many with `--hypothesis-profile=thorough`."""

from hypothesis import HealthCheck, Phase, settings

_QUICK_EXAMPLES, THOROUGH = 25, 25

# A fixture chooses the implementation, and holds for all cases of a test.
_FIXTURES = [HealthCheck.function_scoped_fixture]
settings.register_profile(
    "quick", max_examples=_QUICK_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=_FIXTURES
)
# For mutants, which most tests notice: fewer cases, and no search for the simplest failure.
settings.register_profile(
    "mutants", settings.get_profile("quick"), max_examples=10, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile(
    "thorough", max_examples=THOROUGH * _QUICK_EXAMPLES, deadline=None, suppress_health_check=_FIXTURES
)


def cases(n: int) -> settings:
    """A decorator for `@given` tests. It reads the profile, so pytest must have chosen it before."""
    profile = settings.get_profile(settings.get_current_profile_name())
    return settings(max_examples=n * profile.max_examples // _QUICK_EXAMPLES)
