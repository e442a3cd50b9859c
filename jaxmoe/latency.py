"""Which calls take the low-latency kernels on GPUs: `mode` of `ExpertParallel`."""

from __future__ import annotations

MODES = ("auto", "throughput", "low_latency")
# The most choices of all devices in such a call: kMaxLatencyChoices of xla_ffi/cuda/layout.h.
MAX_CHOICES = 16384
# The most calls of a group between their start and their done: kMaxPending there.
MAX_PENDING = 8
# Where "auto" ends: beyond, the other kernels are about as fast, and the slots would take much
# memory. Measured by benchmarks/cuda/latency.cu on two H200 (D=7168, K=8, bf16): dispatch and
# combine together take 69 us for 512 tokens by these kernels and 94 us by the others.
_AUTO_BYTES, _AUTO_TOKENS = 8 << 20, 1024


def most_tokens(num_devices: int, top_k: int) -> int:
    """Most tokens per device of a call that the low-latency kernels can serve."""
    return MAX_CHOICES // (num_devices * top_k)


def tokens_of(mode: str, max_tokens: int, num_devices: int, top_k: int, row_bytes: int) -> int:
    """Up to how many tokens per device a call takes the low-latency kernels; 0: none does."""
    if mode == "throughput":
        return 0
    most = min(max_tokens, most_tokens(num_devices, top_k))
    return most if mode == "low_latency" else min(most, _AUTO_TOKENS, _AUTO_BYTES // row_bytes)
