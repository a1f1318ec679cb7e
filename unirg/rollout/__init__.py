"""Rollouts: sampling G reports per study from the policy, behind one `Sampler` interface whatever engine does it."""

from unirg.rollout.sampler import (
    ApartSampler,
    GeneratedReport,
    RolloutConfig,
    Sample,
    Sampler,
    SamplingConfig,
    generate_reports,
    open_sampler,
    request_seed,
)

__all__ = [
    "ApartSampler",
    "GeneratedReport",
    "RolloutConfig",
    "Sample",
    "Sampler",
    "SamplingConfig",
    "generate_reports",
    "open_sampler",
    "request_seed",
]
