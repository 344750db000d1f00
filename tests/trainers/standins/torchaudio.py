"""Stands in for torchaudio, which LLaMA-Factory imports at its start and uses for audio alone.

The newest torchaudio on PyPI was built for an older torch and for CUDA: it cannot be loaded beside torch's CPU build.
"""
