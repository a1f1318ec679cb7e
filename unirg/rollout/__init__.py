"""Rollouts: sampling G reports per study from the policy, behind one `Sampler` interface whatever engine does it."""

from unirg.rollout.sampler import GeneratedReport, Sample, Sampler, SamplingConfig, generate_reports, request_seed

__all__ = ["GeneratedReport", "Sample", "Sampler", "SamplingConfig", "generate_reports", "request_seed"]
