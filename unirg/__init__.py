"""UniRG: reinforcement learning of vision-language models on the metrics that medical reports are judged by."""

__version__ = "0.1.0"
