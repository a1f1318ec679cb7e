"""One policy and its prompts for all tests of a module: engines start slowly."""

import pytest

from tests.vllm.engines import lively_policy
from unirg.policy import EncodedPrompt, Policy
from unirg.study import Study


@pytest.fixture(scope="module")
def policy() -> Policy:
    return lively_policy()


@pytest.fixture(scope="module")
def prompts(policy: Policy, studies: list[Study]) -> list[EncodedPrompt]:
    return [policy.encode(study) for study in studies]
